"""Batches on the device one step ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from msdetr.engine.device import to_device
from msdetr.structures import Batch


class StepInput(NamedTuple):
    """The micro-batches of a step."""

    host: Sequence[Batch]
    """On the host, as loaded."""
    device: Sequence[Batch]
    """The same on the device."""


def on_device(micro_batches: Sequence[Batch], device: torch.device) -> StepInput:
    """The input of a step, copied on the current stream."""
    return StepInput(micro_batches, [to_device(batch, device) for batch in micro_batches])


def prefetch(steps: Iterable[Sequence[Batch]], device: torch.device) -> Iterator[StepInput]:
    """The inputs of `steps`. On CUDA, a separate stream copies each during the step before."""
    if device.type != "cuda":
        yield from (on_device(step, device) for step in steps)
        return
    stream = torch.cuda.Stream(device)
    ahead: StepInput | None = None
    for step in steps:
        with torch.cuda.stream(stream):
            following = on_device(step, device)
        if ahead is not None:
            yield ahead
        # Only now has the caller queued its work on the batch before.
        _hand_over(following, stream)
        ahead = following
    if ahead is not None:
        yield ahead


def _hand_over(step: StepInput, copies: torch.cuda.Stream) -> None:
    """Let the current stream wait for the copies, and keep their memory until it has used them."""
    current = torch.cuda.current_stream()
    current.wait_stream(copies)
    for batch in step.device:
        for tensor in (*batch.images, *batch.targets, batch.original_sizes):
            tensor.record_stream(current)
