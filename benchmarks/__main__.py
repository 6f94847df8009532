"""What `make bench` runs: the comparison that needs no GPU. The others are listed in RESULTS.md, a command each."""

from benchmarks.mixed_batch import main

main()
