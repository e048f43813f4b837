"""Dropout (Srivastava et al., JMLR 2014), with cheap random numbers on a CPU.

On a CPU, PyTorch draws Bernoulli numbers one by one, which took a sixth of a training step. Here
four elements share 64 random bits, so that `p` is rounded to a multiple of 2 ** -16. Elements that
are kept are scaled by the rounded probability, so that the mean is preserved. Other devices use
PyTorch's dropout. Compiled code draws the same numbers as eager code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdetr.ops.registration import register_op

_LEVELS = 1 << 16
"""Number of values of a 16-bit integer."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability `p` and divide the others by `1 - p`.

    Draws from the default generator of the device.

    Args:
        x: floating point, of any shape.
        p: from 0 to 1; on a CPU it is rounded to a multiple of 2 ** -16.

    Returns:
        Shape and dtype of `x`.
    """
    if not _is_ours(x, p):
        return F.dropout(x, p)
    output: Tensor = torch.ops.msdetr.dropout(x, p)[0]
    return output


def relu_dropout(x: Tensor, p: float) -> Tensor:
    """`dropout(relu(x), p)`. May overwrite `x`, and keeps only its output for the gradient.

    An element of the output is positive exactly where ReLU and dropout pass it.

    Args:
        x: floating point, of any shape; must not be a leaf, nor needed for another gradient.
        p: as for `dropout`.

    Returns:
        Shape and dtype of `x`.
    """
    if not _is_ours(x, p):
        return F.dropout(x.relu_(), p)
    output: Tensor = torch.ops.msdetr.relu_dropout(x, p)
    return output


def _is_ours(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and 0.0 < p < 1.0


def _levels_dropped(p: float) -> int:
    """Number of the 65,536 values for which an element is dropped; never all of them."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def _scale(p: float) -> float:
    return _LEVELS / (_LEVELS - _levels_dropped(p))


def _draw_kept(x: Tensor, p: float) -> Tensor:
    """A random mask of the shape of `x`, contiguous."""
    words = -(-x.numel() // 4)
    bits = torch.empty(words, dtype=torch.int64).random_(-(1 << 63), None)
    values = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return values >= _levels_dropped(p) - _LEVELS // 2


def _keep(x: Tensor, kept: Tensor, p: float) -> Tensor:
    # Faster than a product, which would first convert the whole mask.
    return torch.where(kept, x, 0.0).mul_(_scale(p))


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    kept = _draw_kept(x, p)
    return _keep(x, kept, p), kept


def _relu_dropout(x: Tensor, p: float) -> Tensor:
    return _keep(x, _draw_kept(x, p), p).relu_()


def _dropout_fake(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape, dtype=torch.bool)


def _relu_dropout_fake(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _save_kept(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.p = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _dropout_formula(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    (kept,) = ctx.saved_tensors
    return _keep(grad, kept, ctx.p), None


def _save_output(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output)


def _relu_dropout_formula(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (output,) = ctx.saved_tensors
    passed = torch.ops.aten.threshold_backward(grad, output, 0.0)
    return passed.mul_(_scale(ctx.p)), None


# The tag prevents compiled code from drawing again in the backward pass.
register_op(
    "dropout(Tensor x, float p) -> (Tensor output, Tensor kept)",
    _dropout,
    fake=_dropout_fake,
    backward=_dropout_formula,
    save=_save_kept,
    devices=("CPU",),
    tags=(torch.Tag.nondeterministic_seeded,),
)
register_op(
    "relu_dropout(Tensor x, float p) -> Tensor",
    _relu_dropout,
    fake=_relu_dropout_fake,
    backward=_relu_dropout_formula,
    save=_save_output,
    devices=("CPU",),
    tags=(torch.Tag.nondeterministic_seeded,),
)
