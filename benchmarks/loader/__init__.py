"""The training loader, and the padding of its batches."""
