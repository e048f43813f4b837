"""The training engine: steps, optimizer, checkpoints, processes, metrics."""
