"""Averages of losses over steps, and the speed of the steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from msdetr.engine.distributed import MeanOverRanks, Worker


class StepMeter:
    """Averages the loss, its terms and the gradient norm over steps, and measures the speed.

    Sums stay on the device. Only `read` copies them to the host, once per log line.
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
        """Leave the time spent in this context (a checkpoint, an evaluation) out of the speed."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def add_wait(self, seconds: float) -> None:
        """Add time that a step waited for its batch."""
        self._wait_seconds += seconds

    def add(self, loss: Tensor, grad_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Add a step: 0-dim `loss` and `grad_norm`, and terms [N] with one value per layer."""
        values = torch.cat([loss.detach().reshape(1), grad_norm.reshape(1), *terms.values()])
        self._layout = [(name, len(term)) for name, term in terms.items()]
        self._sums = values if self._sums is None else self._sums + values
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Averages over the steps since the last call and over ranks. Terms are summed over layers.

        All ranks call it. It waits for the device.
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
