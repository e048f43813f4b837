"""What a GPU and its host do in a call that is warm: counted by torch, without a clock."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

Call = Callable[[], object]

_CALLS = 3


class DeviceWork(NamedTuple):
    """Of one call."""

    kernels: float
    """Kernels, fills and copies."""
    busy_seconds: float
    """How long at least one of them ran."""


def device_work(call: Call) -> DeviceWork:
    """What the GPU does in a call, by the profiler.

    The profiler slows the host, not the GPU: what it says about gaps would be too much.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        # Named ranges (an optimizer's step) are shown on the device too.
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return DeviceWork(len(spans) / _CALLS, covered(spans) / 1e6 / _CALLS)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def host_waits(call: Call) -> int:
    """How often a call makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
