"""A pretended GPU: counts what would make the host wait, without a GPU.

It is a Python backend of torch (PrivateUse1) that keeps its tensors on the host and computes there.
So values are real, while all code sees a device that is not the CPU. Operations that would wait
reach the dispatcher: reads of values, results whose shape depends on values, masks as indices,
copies to the host, and copies from it that are not asynchronous. (`numpy()` of such a tensor is an
error, as on a GPU.) Each is counted by the innermost line of the package that led to it.

Triton kernels run in Triton's interpreter. Their launchers are followed, the kernels are not, as a
kernel cannot wait. The device stays in the process for good.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast
from unittest import mock

import torch

# Triton reads it when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.launches import CPU_KEYS, OUR_OPERATORS, interpreted_launches, is_launch
from msdetr.ops import dispatch

_PRETEND = "pretend"

_READS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
"""Operators that always wait. Further ones are found by their tags."""
_READ_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = frozenset(
    {
        "_index_put_impl_",
        "_unsafe_index",
        "_unsafe_index_put",
        "index",
        "index_put",
        "index_put_",
    }
)


@dataclass(frozen=True, order=True)
class Wait:
    """One way to make the host wait."""

    where: str
    """FILE:LINE of the caller."""
    operation: str
    """The operator, and why it waits."""


@dataclass
class Tally:
    """Operations on the pretended device."""

    waits: Counter[Wait]
    """How often the host would have waited."""
    operations: int = 0
    """Operators that would do work on the device: not views, nor uninitialised tensors."""
    launches: int = 0
    """Launches of Triton kernels."""


class PretendTensor(torch.Tensor):
    """A tensor of the pretended device."""

    host: Tensor
    """The tensor on the host that holds its values."""

    @staticmethod
    def __new__(cls, host: Tensor) -> PretendTensor:
        """Wrap a tensor of the host, which it shares its memory with."""
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=pretended_device(),
        )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """From a copy on the host, as for a GPU; torch refuses it for subclasses."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast(Tensor, memo.setdefault(id(self), self.detach().clone()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: outside of `pretending` nothing counts."""
        raise RuntimeError(f"{operator} on the pretended device, outside of `pretending`")


@functools.cache
def pretended_device() -> torch.device:
    """The device; the first call registers it for the life of the process."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(_PRETEND, Module())
    return torch.device(_PRETEND, 0)


class _Call:
    """A call of an operator, some of whose arguments may be on the pretended device."""

    def __init__(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.operator = operator
        self.args = args
        self.kwargs = kwargs
        self.name = operator.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.from_device = any(isinstance(tensor, PretendTensor) for tensor in self.tensors)
        self.names_device = any(map(is_pretended, leaves))

    def argument(self, position: int, name: str) -> Any:
        """An argument that may be given either way, or None."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name)

    @property
    def to_device(self) -> bool:
        """Whether the result is on the device."""
        if self.kwargs.get("device") is not None:
            return self.names_device
        return self.from_device

    def why_it_waits(self) -> str | None:
        """Why the call makes the host wait, or None.

        Raises:
            RuntimeError: a GPU would refuse the call.
        """
        if self.name == "_to_copy":
            return self._why_a_copy_waits(self.args[0], self.to_device)
        if self.name == "copy_":
            return self._why_a_copy_waits(self.args[1], isinstance(self.args[0], PretendTensor))
        if not self.from_device:
            return None
        if self.name in _INDEXING:
            indices = [index for index in self.args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "a mask as index"
            if not all(isinstance(index, PretendTensor) for index in indices):
                return "an index from the host"
            return None
        if self.name == "repeat_interleave" and self.kwargs.get("output_size") is not None:
            return None
        if self.name in _READS or _READ_TAGS.intersection(self.operator.tags):
            return "values are read"
        if any(tensor.ndim and not isinstance(tensor, PretendTensor) for tensor in self.tensors):
            raise RuntimeError(f"{self.operator} got tensors of the device and of the host")
        return None

    def _why_a_copy_waits(self, source: Tensor, to_device: bool) -> str | None:
        from_device = isinstance(source, PretendTensor)
        if from_device and not to_device:
            return "to the host"
        non_blocking = self.argument(2, "non_blocking") or False
        if to_device and not from_device and not non_blocking:
            return "from the host"
        return None

    def compute(self) -> Any:
        """The result, computed on the host."""
        # An operator that works in place returns its argument, the same object.
        known = {id(_on_host(tensor)): tensor for tensor in self.tensors}

        def from_host(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in known:
                return known[id(leaf)]
            return PretendTensor(leaf) if self.to_device else leaf

        args, kwargs = tree_map(_on_host, (self.args, self.kwargs))
        return tree_map(from_host, self.operator(*args, **kwargs))


def is_pretended(leaf: object) -> bool:
    """Whether an argument is the pretended device."""
    return isinstance(leaf, torch.device) and leaf.type == _PRETEND


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, PretendTensor):
        return leaf.host
    return torch.device("cpu") if is_pretended(leaf) else leaf


class _PretendMode(TorchDispatchMode):
    """Computes the operations of the pretended device on the host, and counts."""

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__()
        self.tally = Tally(Counter())
        self._folders = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call = _Call(operator, args, kwargs or {})
        if not (call.from_device or call.names_device):
            return call.compute()
        if operator.namespace == OUR_OPERATORS:
            # Its implementation is Python that could wait, so it runs inside this mode.
            with self:
                return operator.redispatch(CPU_KEYS, *call.args, **call.kwargs)
        # Below autograd, composite operators arrive undecomposed.
        with self:
            result = operator.decompose(*call.args, **call.kwargs)
        if result is not NotImplemented:
            return result
        self.tally.operations += is_launch(operator)
        reason = call.why_it_waits()
        if reason is not None:
            self.tally.waits[Wait(self._caller(), f"{operator.overloadpacket}: {reason}")] += 1
        return call.compute()

    def count_kernel(self, name: str) -> None:
        """Count the launch of a Triton kernel."""
        self.tally.launches += 1

    def _caller(self) -> str:
        """FILE:LINE of the innermost frame in one of the folders."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            path = frame.f_code.co_filename
            for folder in self._folders:
                if path.startswith(folder):
                    relative = Path(path).relative_to(Path(folder).parent)
                    return f"{relative.as_posix()}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"


@contextlib.contextmanager
def pretending(*folders: Path) -> Iterator[Tally]:
    """Compute operations on `pretended_device()`, and count those that would wait.

    Args:
        folders: files below them are reported as callers.
    """
    pretended_device()
    mode = _PretendMode(folders)
    make_generator = torch.Generator

    def generator(device: Any = "cpu") -> torch.Generator:
        """A generator on the host, where that of a GPU keeps its state as well."""
        return make_generator("cpu" if is_pretended(torch.device(device)) else device)

    lifted = torch._C._only_lift_cpu_tensors()
    # So that `torch.tensor(..., device=...)` is a copy from the host, which the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(torch, "Generator", generator),
            mock.patch.object(dispatch, "kernel_devices", {*dispatch.kernel_devices, _PRETEND}),
            interpreted_launches(mode.count_kernel, _on_host),
            torch.autograd.set_multithreading_enabled(False),  # so that callers are known
            mode,
        ):
            yield mode.tally
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
