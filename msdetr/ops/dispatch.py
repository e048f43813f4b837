"""Which implementation of an op runs: the only place that decides it.

An explicit request is obeyed or refused, never quietly replaced.
"""

from __future__ import annotations

from typing import Literal

Impl = Literal["auto", "reference", "triton"]
"""`reference` is plain PyTorch on any device, `triton` a kernel, `auto` the best there is."""

_KERNELS: frozenset[str] = frozenset()
"""Ops that have a Triton kernel."""


def resolve_impl(op: str, impl: Impl) -> Literal["reference", "triton"]:
    """The implementation that serves this request.

    Raises:
        ValueError: `impl` is not one of `Impl`.
        NotImplementedError: a kernel was asked for by name and the op has none.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "triton" and op not in _KERNELS:
        raise NotImplementedError(f"{op} has no Triton kernel: use impl='reference' or 'auto'")
    return "triton" if impl == "triton" else "reference"
