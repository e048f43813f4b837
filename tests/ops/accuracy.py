"""Comparison of kernels with a reference and with float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_as_accurate(
    result: list[Tensor], reference: list[Tensor], exact: list[Tensor], *, rounding: int
) -> None:
    """Compare errors with respect to float64.

    An error may be the maximum error of the reference in the same types, plus one unit in the last
    place of the result's type, plus `rounding` units of float32 at the magnitude of the tensor's
    largest element. The reference itself must be within a hundredth of that element, or the
    comparison would show nothing.
    """
    for mine, theirs, truth in zip(result, reference, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        if not mine.numel():
            continue
        own = (theirs.double() - truth).abs().amax()
        largest = truth.abs().amax()
        assert own <= 0.01 * largest, f"the reference is off by {own:.1e}, of {largest:.1e}"
        allowed = own + torch.finfo(mine.dtype).eps * truth.abs()
        allowed = allowed + rounding * torch.finfo(torch.float32).eps * largest
        error = (mine.double() - truth).abs()
        assert (error <= allowed).all(), f"{(error / allowed).max().item():.2f} x the allowed error"


class PoisonedMemory(TorchDispatchMode):
    """Fills new memory with NaN, so that elements that are not written show."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (
            name in ("empty", "new_empty", "empty_like", "empty_strided")
            and result.is_floating_point()
        ):
            result.fill_(float("nan"))
        return result
