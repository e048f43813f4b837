"""Triton kernels. A module holds a kernel or a few that belong together, and their launcher."""
