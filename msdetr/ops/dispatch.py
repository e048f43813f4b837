"""Which implementation of an op runs: the only place that decides it.

An explicit request is obeyed or refused, never quietly replaced. `auto` takes the kernel on a GPU
where it serves the arguments, and the reference everywhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
"""`reference` is plain PyTorch on any device, `triton` a kernel, `auto` the best there is."""

_KERNELS: frozenset[str] = frozenset(
    {
        "focal_loss",
        "linear_assignment",
        "matching_cost",
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "one_to_many",
    }
)
"""Ops that have a Triton kernel."""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # The import is blocked.
        return False


_HAS_TRITON = _is_installed("triton")
# Triton reads it when the kernels' modules are imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def register_kernel(
    library: torch.library.Library, name: str, function: Callable[..., Any]
) -> None:
    """Let operator `name` of a library run `function` on a GPU, and in the interpreter on the CPU.

    On a GPU with the device of the first argument as the current one: Triton launches there,
    wherever its arguments are.
    """

    @functools.wraps(function)
    def run_on_its_device(tensor: Tensor, *args: Any) -> Any:
        with torch.cuda.device(tensor.device):
            return function(tensor, *args)

    library.impl(name, function, "CPU")
    library.impl(name, run_on_its_device, "CUDA")


def resolve_impl(
    op: str,
    impl: Impl,
    device: torch.device | None = None,
    unsupported: str | None = None,
) -> Literal["reference", "triton"]:
    """The implementation that serves this request.

    Args:
        op: name of the op.
        impl: the request.
        device: where the arguments are; not needed for ops without a kernel.
        unsupported: why the kernel cannot serve these arguments, or None if it can.

    Raises:
        ValueError: `impl` is not one of `Impl`.
        NotImplementedError: a kernel was asked for by name and the op has none, or it cannot run
            here or serve the arguments.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return "reference"
    reason = None
    if op not in _KERNELS:
        reason = f"{op} has no Triton kernel"
    elif not _HAS_TRITON:
        reason = "Triton is not installed"
    elif device is not None and device.type != "cuda" and not _INTERPRETED:
        reason = f"Triton needs a CUDA device (or TRITON_INTERPRET=1), got {device}"
    elif unsupported is not None:
        reason = f"{op}: {unsupported}"
    if impl == "auto":
        on_gpu = device is not None and device.type == "cuda"
        return "triton" if on_gpu and reason is None else "reference"
    if reason is not None:
        raise NotImplementedError(f"{reason}; use impl='reference' or 'auto'")
    return "triton"
