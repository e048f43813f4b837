"""Clipping of gradients by their total norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdetr.engine.parallel import full_tensor


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm`; 0 leaves them unchanged.

    Returns:
        The norm before scaling, over all shards; 0-dim, on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True))
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm
