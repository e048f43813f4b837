"""Machine code of the Triton kernels, inspected without a GPU."""
