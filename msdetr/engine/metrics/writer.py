"""Rows of metrics in `metrics.jsonl` and in TensorBoard."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from msdetr.engine.distributed import Worker

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and, where it is installed, to TensorBoard.

    Does nothing on ranks other than 0.
    """

    def __init__(self, run_folder: Path, worker: Worker) -> None:
        self._folder = run_folder if worker.is_main else None

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append `row`, which has a `step`, as one JSON object that begins with its `kind`."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps({"kind": kind, **row}, allow_nan=False) + "\n")
        if self._tensorboard is None:
            return
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, row["step"])
        self._tensorboard.flush()

    @functools.cached_property
    def _tensorboard(self) -> Any:
        """TensorBoard's writer; None where it cannot be imported."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception:  # An optional extra: absent, or one of its dependencies is broken.
            return None
        return SummaryWriter(f"{self._folder}/tensorboard")
