"""Counts what a computation makes a GPU and its host do: launches, busy time and waits.

A launch is a kernel, a fill or a copy. Without a GPU, launches are counted as the operators of
torch that would do something there (not views, nor uninitialised tensors), each as one launch, its
minimum, and as the Triton kernels run in Triton's interpreter. Operators of this project count by
the operators and kernels that they call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

OUR_OPERATORS = "msdetr"
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_NOTHING_TO_DO = frozenset(
    {
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "is_same_size",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
    }
)


def is_launch(operator: Any) -> bool:
    """Whether an operator of torch that is not composed of others does work on the device."""
    return not operator.is_view and operator.overloadpacket.__name__ not in _NOTHING_TO_DO


@contextlib.contextmanager
def interpreted_launches(
    on_launch: Callable[[str], None], to_host: Callable[[Any], Any] = lambda leaf: leaf
) -> Iterator[None]:
    """Call `on_launch` for each launch in Triton's interpreter; the kernel's inside does not count.

    Args:
        on_launch: gets the name of the kernel, before it runs.
        to_host: maps an argument to the one that the interpreter uses.
    """
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    launch = GridExecutor.__call__

    def launch_and_report(self: Any, *args: Any, **kwargs: Any) -> None:
        on_launch(self.fn.__name__)
        args, kwargs = tree_map(to_host, (args, kwargs))
        with _disable_current_modes():
            launch(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch_and_report):
        yield


class _CountingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            if operator.namespace == OUR_OPERATORS:
                return operator.redispatch(CPU_KEYS, *args, **kwargs)
            # Below autograd, composite operators arrive undecomposed.
            result = operator.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if is_launch(operator):
            self.launches[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs)


@contextlib.contextmanager
def count_interpreted() -> Iterator[Counter[str]]:
    """Count by name the launches that the operations inside would make on a GPU.

    They work on tensors of the CPU, and kernels in Triton's interpreter: set TRITON_INTERPRET=1.
    """
    mode = _CountingMode()

    def count(name: str) -> None:
        mode.launches[name] += 1

    with interpreted_launches(count), mode:
        yield mode.launches


_CALLS = 3


class DeviceWork(NamedTuple):
    """Work of a GPU in one call."""

    kernels: float
    """Kernels, fills and copies."""
    busy_seconds: float
    """Time in which at least one of them ran."""


def device_work(call: Callable[[], object]) -> DeviceWork:
    """Work of the GPU in a warm call, by the profiler.

    The profiler slows the host, not the GPU, so gaps between kernels are not measured.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    spans = [(event.time_range.start, event.time_range.end) for event in device_events(profile)]
    return DeviceWork(len(spans) / _CALLS, covered(spans) / 1e6 / _CALLS)


def device_events(profile: torch.profiler.profile) -> list[Any]:
    """The kernels, fills and copies of a GPU in a profile."""
    # Named ranges, such as an optimizer's step, are listed as device events, too.
    return [
        event
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def host_waits(call: Callable[[], object]) -> int:
    """The number of times that a call makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
