"""The LoRA products: `reference` states the mathematics in torch; the Triton kernels compute the same on a GPU."""
