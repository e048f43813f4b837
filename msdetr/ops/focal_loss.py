"""Sigmoid focal loss of all queries and classes (Lin et al., ICCV 2017), without one-hot targets.

Every logit counts as background, but that of each query's own class. Nothing but the arguments is
kept for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import msdetr.ops.focal_loss_library  # noqa: F401
from msdetr.boxes import at_least_float32
from msdetr.ops.dispatch import Impl, resolve_impl

# What the kernels serve. The reference has no limits.
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
        target_class: [N, B, Q] int64, the class of each query. All that is not in 0 ... K - 1 is
            background, -1 by convention.
        alpha: weight of positives, in [0, 1]; negatives have 1 - alpha.
        gamma: focusing exponent, not negative.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        [N], float32 at least. NaN in a logit makes its layer's sum NaN.

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
    """Autograd would also keep the factors of the loss; this keeps the logits, in float32."""

    @staticmethod
    def forward(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
        loss = (1.0 - alpha) * _loss(logits, gamma)
        loss = _replace_own(loss, logits, target_class, lambda x: alpha * _loss(-x, gamma))
        return loss.sum((1, 2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target_class, ctx.alpha, ctx.gamma = inputs
        ctx.save_for_backward(logits, target_class)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target_class = ctx.saved_tensors
        alpha, gamma = ctx.alpha, ctx.gamma
        slope = (1.0 - alpha) * _slope(logits, gamma)
        slope = _replace_own(slope, logits, target_class, lambda x: -alpha * _slope(-x, gamma))
        return grad_output[:, None, None, None] * slope, None, None, None


def _loss(x: Tensor, gamma: float) -> Tensor:
    """Unweighted loss of logits that should be low."""
    return x.sigmoid() ** gamma * F.softplus(x)


def _slope(x: Tensor, gamma: float) -> Tensor:
    """Derivative of `_loss`."""
    p = x.sigmoid()
    return p**gamma * (gamma * ((-x).sigmoid() * F.softplus(x)) + p)


def _replace_own(
    values: Tensor, logits: Tensor, target_class: Tensor, of_own: Callable[[Tensor], Tensor]
) -> Tensor:
    """`values`, but `of_own` of the logits of the queries' own classes."""
    is_positive = (target_class >= 0) & (target_class < logits.shape[3])
    index = torch.where(is_positive, target_class, 0)[..., None]
    own = torch.where(
        is_positive[..., None], of_own(logits.gather(3, index)), values.gather(3, index)
    )
    return values.scatter(3, index, own)


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
