"""Selection of the implementation of an op: the only module that decides it.

An explicit request is obeyed or refused, never replaced silently. `auto` takes the kernel on a GPU
if the kernel serves the arguments, the chunked implementation on a CPU if the op has one, and the
reference everywhere else.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton"]
"""`reference` is plain PyTorch on any device (SciPy for linear assignment), `triton` is a kernel,
`auto` is the fastest implementation that serves the arguments."""

_KERNELS = frozenset(
    {
        "focal_loss",
        "linear_assignment",
        "matching_cost",
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "nms_mask",
        "one_to_many",
    }
)
"""Ops that have a Triton kernel."""

_CHUNKED = frozenset({"ms_deform_attn", "ms_deform_attn_fused", "one_to_many"})
"""Ops that have an implementation for a CPU, which works on chunks that fit its caches."""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # The import is blocked.
        return False


_HAS_TRITON = _is_installed("triton")
# Triton reads this variable when the modules of the kernels are imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
kernel_devices = frozenset(("cuda", "cpu") if _INTERPRETED else ("cuda",))
"""Types of the devices whose tensors kernels take. Something else than Triton's interpreter that
runs kernels on the CPU assigns its own."""


def resolve_impl(
    op: str,
    impl: Impl,
    device: torch.device | None = None,
    unsupported: str | None = None,
) -> Literal["reference", "chunked", "triton"]:
    """The implementation that serves this request.

    Args:
        op: name of the op.
        impl: the request.
        device: device of the arguments; not needed for ops without a kernel.
        unsupported: why the kernel cannot serve these arguments, or None if it can.

    Raises:
        ValueError: `impl` is not one of `Impl`.
        NotImplementedError: the kernel was requested, and the op has none, or the kernel cannot run
            here or cannot serve the arguments.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return "reference"
    if impl == "auto" and device is not None and device.type == "cpu" and op in _CHUNKED:
        return "chunked"
    reason = None
    if op not in _KERNELS:
        reason = f"{op} has no Triton kernel"
    elif not _HAS_TRITON:
        reason = "Triton is not installed"
    elif device is not None and device.type not in kernel_devices:
        reason = f"Triton needs a CUDA device (or TRITON_INTERPRET=1), got {device}"
    elif unsupported is not None:
        reason = f"{op}: {unsupported}"
    if impl == "auto":
        on_gpu = device is not None and device.type == "cuda"
        return "triton" if on_gpu and reason is None else "reference"
    if reason is not None:
        raise NotImplementedError(f"{reason}; use impl='reference' or 'auto'")
    return "triton"
