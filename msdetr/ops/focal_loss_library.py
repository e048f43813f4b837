"""`torch.ops.msdetr.focal_loss*`: the kernels as operators that autograd, torch.compile and
torch.export know.

Autocast leaves them alone: logits are read in their own type, and all else is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdetr.ops.dispatch import register_kernel

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "focal_loss(Tensor logits, Tensor target_class, float alpha, float gamma) -> Tensor"
)
_LIBRARY.define(
    "focal_loss_backward(Tensor grad_output, Tensor logits, Tensor target_class, float alpha, "
    "float gamma) -> Tensor"
)


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


def _forward_fake(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _backward_fake(
    grad_output: Tensor, logits: Tensor, target_class: Tensor, alpha: float, gamma: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target_class, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target_class)


def _backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
    grad_logits: Tensor = torch.ops.msdetr.focal_loss_backward(
        grad_output, *ctx.saved_tensors, ctx.alpha, ctx.gamma
    )
    return grad_logits, None, None, None


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "the kernels of the focal loss have no second derivative: use impl='reference'"
    )


register_kernel(_LIBRARY, "focal_loss", _forward)
register_kernel(_LIBRARY, "focal_loss_backward", _backward)
torch.library.register_fake("msdetr::focal_loss", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("msdetr::focal_loss_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "msdetr::focal_loss", _backward_formula, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd("msdetr::focal_loss_backward", _no_second_derivative, lib=_LIBRARY)
