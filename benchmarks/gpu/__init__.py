"""Everything that a GPU decides, in one command: `python -m benchmarks.gpu`."""
