"""How many kernels, fills and copies a computation asks a GPU for: counted on one, or without.

Without a GPU, operators of torch are counted that would do something there (not views, nor
uninitialised tensors), each as one launch, which is the least, and the launches of Triton kernels
in Triton's interpreter. Our own operators are looked into.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
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
    """Whether an operator of torch, not made of others, does something on the device."""
    return not operator.is_view and operator.overloadpacket.__name__ not in _NOTHING_TO_DO


@contextlib.contextmanager
def interpreted_launches(
    on_launch: Callable[[str], None], to_host: Callable[[Any], Any] = lambda leaf: leaf
) -> Iterator[None]:
    """Hear of each launch in Triton's interpreter, by the kernel's name; nothing inside counts.

    Args:
        on_launch: is told before the kernel runs.
        to_host: what the interpreter is to see for an argument.
    """
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    launch = GridExecutor.__call__

    def launch_and_tell(self: Any, *args: Any, **kwargs: Any) -> None:
        on_launch(self.fn.__name__)
        args, kwargs = tree_map(to_host, (args, kwargs))
        with _disable_current_modes():
            launch(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch_and_tell):
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
            # Below autograd, operators that are made of others arrive as they are.
            result = operator.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if is_launch(operator):
            self.launches[operator.overloadpacket.__name__] += 1
        return operator(*args, **kwargs)


@contextlib.contextmanager
def count_interpreted() -> Iterator[Counter[str]]:
    """What is done to tensors of the CPU inside would launch these on a GPU, by name.

    Kernels run in Triton's interpreter: set TRITON_INTERPRET=1.
    """
    mode = _CountingMode()

    def count(name: str) -> None:
        mode.launches[name] += 1

    with interpreted_launches(count), mode:
        yield mode.launches


def count_on_gpu(call: Callable[[], object]) -> int:
    """Kernels, fills and copies of a call on a GPU, which is warm."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())
