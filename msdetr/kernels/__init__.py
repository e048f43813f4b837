"""Triton kernels, one module per kernel: its maths, its mapping to programs, its launcher."""
