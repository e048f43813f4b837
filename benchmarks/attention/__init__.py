"""Deformable attention and its kernels: durations and tuning."""
