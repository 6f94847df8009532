"""LoRA itself: format, blocks, memory tiers, layers, kernels, merging. Knows no HTTP, no scheduler, no tenant."""
