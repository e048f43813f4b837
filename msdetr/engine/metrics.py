"""What a run reports: averages of its steps, a line per event, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from msdetr.engine.distributed import MeanOverRanks, Worker

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"


class StepMeter:
    """Averages loss, loss terms and gradient norm over steps, on the device, and times the steps.

    Adding a step reads nothing back; `read` does, once per log line.
    """

    def __init__(self, worker: Worker, images_per_step: int) -> None:
        self._worker = worker
        self._images_per_step = images_per_step
        self._sums: Tensor | None = None
        self._layout: list[tuple[str, int]] = []
        self._restart()

    def _restart(self) -> None:
        self._sums = None
        self._num_steps = 0
        self._wait_seconds = 0.0
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens in this context (a checkpoint, an evaluation) out of the speed."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def add_wait(self, seconds: float) -> None:
        """Count time that the step spent waiting for its batch."""
        self._wait_seconds += seconds

    def add(self, loss: Tensor, grad_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Count a step: 0-dim `loss` and `grad_norm`, and terms [N] with one value per layer."""
        values = torch.cat([loss.detach().reshape(1), grad_norm.reshape(1), *terms.values()])
        self._layout = [(name, len(term)) for name, term in terms.items()]
        self._sums = values if self._sums is None else self._sums + values
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Averages since the last call, over steps and ranks; terms are summed over layers.

        A collective: all ranks call it. Waits for the device.
        """
        if self._sums is None:
            raise ValueError("no step was added since the last reading")
        means = (MeanOverRanks(self._sums, self._worker).wait() / self._num_steps).tolist()
        seconds = time.perf_counter() - self._started
        row = {"loss": means[0], "grad_norm": means[1]}
        start = 2
        for name, num_layers in self._layout:
            row[name] = math.fsum(means[start : start + num_layers])
            start += num_layers
        row["images_per_second"] = self._num_steps * self._images_per_step / seconds
        row["data_wait_share"] = self._wait_seconds / seconds
        self._restart()
        return row


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and, where it is installed, to TensorBoard.

    Does nothing on ranks other than 0.
    """

    def __init__(self, run_folder: Path, worker: Worker) -> None:
        self._folder = run_folder if worker.is_main else None
        self._tensorboard: Any = None

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append `row`, which has a `step`, as one JSON object with its `kind` in front."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps({"kind": kind, **row}, allow_nan=False) + "\n")
        if self._tensorboard is None:
            self._tensorboard = _tensorboard_writer(self._folder / "tensorboard")
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()


class _NoTensorBoard:
    """Stands in where TensorBoard is not installed."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # an optional extra: absent, or broken by what it imports in turn
        return _NoTensorBoard()
    return SummaryWriter(str(folder))


def progress(iterable: Iterable[T], description: str, worker: Worker, **options: Any) -> tqdm[T]:
    """`iterable` with a progress bar on rank 0's terminal, and without one elsewhere."""
    return tqdm(
        iterable,
        desc=description,
        disable=not (worker.is_main and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
        **options,
    )
