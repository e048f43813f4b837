"""Deformable attention and its kernels: durations, tuning, plots, memory rates."""
