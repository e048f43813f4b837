"""Sigmoid focal loss of all queries and classes (Lin et al., ICCV 2017), without one-hot targets.

Each logit is a binary classification: positive for the class of its query, negative otherwise.
Only the arguments are kept for the gradient. Autocast does not change the kernels: logits are read
in their own type, and everything else is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdetr.boxes import at_least_float32
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.registration import no_second_derivative, register_op
from msdetr.structures import IGNORED

# Limits of the kernels. The reference has none.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CLASSES = 2**30
_MAX_LAYERS = 65535


def focal_loss(
    logits: Tensor,
    target_class: Tensor,
    *,
    alpha: float,
    gamma: float,
    impl: Impl = "auto",
) -> Tensor:
    """Sum of the focal losses of each layer.

    Args:
        logits: [N, B, Q, K], K at least 1.
        target_class: [N, B, Q] int64, the class of each query. All logits of a query of class
            `msdetr.structures.IGNORED` count as minus infinity, whatever they are: they have no
            loss, and their gradient is 0. Other values outside of 0 ... K - 1 are background (-1 by
            convention).
        alpha: weight of positives, in [0, 1]; negatives have 1 - alpha.
        gamma: focusing exponent, at least 0.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        [N], float32 at least. NaN in a logit that is not ignored makes its layer's sum NaN.

    Raises:
        ValueError: shapes, dtypes, devices or numbers are wrong; the message names the argument.
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    _check(logits, target_class, alpha, gamma)
    unsupported = _unsupported(logits)
    loss: Tensor
    if resolve_impl("focal_loss", impl, logits.device, unsupported) == "triton":
        loss = torch.ops.msdetr.focal_loss(logits, target_class, alpha, gamma)
    else:
        loss = _Reference.apply(at_least_float32(logits), target_class, alpha, gamma)
    return loss


class _Reference(torch.autograd.Function):
    """Keeps only the logits, in float32; autograd would also keep the factors of the loss."""

    @staticmethod
    def forward(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
        logits = _without_ignored(logits, target_class)
        loss = (1.0 - alpha) * _loss(logits, gamma)
        loss = _replace_positive(loss, logits, target_class, lambda x: alpha * _loss(-x, gamma))
        return loss.sum((1, 2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target_class, ctx.alpha, ctx.gamma = inputs
        ctx.save_for_backward(logits, target_class)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target_class = ctx.saved_tensors
        logits = _without_ignored(logits, target_class)
        alpha, gamma = ctx.alpha, ctx.gamma
        gradient = (1.0 - alpha) * _derivative(logits, gamma)
        gradient = _replace_positive(
            gradient, logits, target_class, lambda x: -alpha * _derivative(-x, gamma)
        )
        return grad_output[:, None, None, None] * gradient, None, None, None


def _without_ignored(logits: Tensor, target_class: Tensor) -> Tensor:
    return logits.masked_fill((target_class == IGNORED)[..., None], -math.inf)


def _loss(x: Tensor, gamma: float) -> Tensor:
    """Unweighted loss of negative logits."""
    return x.sigmoid() ** gamma * F.softplus(x)


def _derivative(x: Tensor, gamma: float) -> Tensor:
    """Derivative of `_loss`."""
    p = x.sigmoid()
    return p**gamma * (gamma * ((-x).sigmoid() * F.softplus(x)) + p)


def _replace_positive(
    values: Tensor, logits: Tensor, target_class: Tensor, of_positive: Callable[[Tensor], Tensor]
) -> Tensor:
    """`values`, replaced by `of_positive(logit)` at the class of each query."""
    is_positive = (target_class >= 0) & (target_class < logits.shape[3])
    index = torch.where(is_positive, target_class, 0)[..., None]
    positive = torch.where(
        is_positive[..., None], of_positive(logits.gather(3, index)), values.gather(3, index)
    )
    return values.scatter(3, index, positive)


def _check(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> None:
    if logits.ndim != 4 or logits.shape[3] < 1:
        raise ValueError(f"logits must be [N, B, Q, K], K at least 1, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if target_class.shape != logits.shape[:3]:
        raise ValueError(
            f"target_class must be {list(logits.shape[:3])}, got {list(target_class.shape)}"
        )
    if target_class.dtype != torch.int64:
        raise ValueError(f"target_class must be int64, got {target_class.dtype}")
    if target_class.device != logits.device:
        raise ValueError(f"target_class is on {target_class.device}, logits on {logits.device}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not 0.0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and not negative, got {gamma}")


def _unsupported(logits: Tensor) -> str | None:
    """Why the kernels cannot serve these arguments, or None."""
    if logits.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 or float16 logits, got {logits.dtype}"
    if logits.shape[0] > _MAX_LAYERS:
        return f"the kernel takes up to {_MAX_LAYERS} layers, got {logits.shape[0]}"
    if logits.shape[3] > _MAX_CLASSES:
        return f"the kernel takes up to {_MAX_CLASSES} classes, got {logits.shape[3]}"
    return None


def _forward(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
    from msdetr.kernels import focal_loss as kernels

    return kernels.forward(logits.contiguous(), target_class.contiguous(), alpha, gamma)


def _backward(
    grad_output: Tensor, logits: Tensor, target_class: Tensor, alpha: float, gamma: float
) -> Tensor:
    from msdetr.kernels import focal_loss as kernels

    return kernels.backward(
        grad_output, logits.contiguous(), target_class.contiguous(), alpha, gamma
    )


def _forward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _backward_fake(grad_output: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target_class, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target_class)


def _backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
    grad_logits: Tensor = torch.ops.msdetr.focal_loss_backward(
        grad_output, *ctx.saved_tensors, ctx.alpha, ctx.gamma
    )
    return grad_logits, None, None, None


register_op(
    "focal_loss(Tensor logits, Tensor target_class, float alpha, float gamma) -> Tensor",
    _forward,
    fake=_forward_fake,
    backward=_backward_formula,
    save=_save,
)
register_op(
    "focal_loss_backward(Tensor grad_output, Tensor logits, Tensor target_class, float alpha, "
    "float gamma) -> Tensor",
    _backward,
    fake=_backward_fake,
    backward=no_second_derivative("the focal loss kernel"),
)
