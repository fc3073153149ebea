"""The correction op on a CUDA device, in Triton."""
