"""Metrics of a run: averages over steps, `metrics.jsonl`, TensorBoard, log lines, progress bars."""
