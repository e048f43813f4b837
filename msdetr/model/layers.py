"""Building blocks that encoder, decoder and heads share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msdetr.boxes import at_least_float32


def call_module(module: nn.Module, *inputs: Any, recompute: bool, has_dropout: bool = False) -> Any:
    """`module(*inputs)`, optionally keeping only the inputs for the backward pass.

    With `recompute` that computes everything else again (activation checkpointing, Chen et al.,
    arXiv:1604.06174). `has_dropout` then draws the same numbers again, for which the state of the
    random generators is kept.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)


class MLP(nn.Module):
    """Linear layers with ReLU in between."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] to [..., output_dim]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        output: Tensor = self.last(x)
        return output


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps one byte per element for the backward pass on every device.

    On a CPU, `torch.nn.functional.dropout` keeps a mask in floating point.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, same shape out."""
        if not self.training or self.p == 0.0:
            return input
        return torch.native_dropout(input, self.p, True)[0]


class FeedForward(nn.Module):
    """Residual feed-forward network with its LayerNorm, as in post-norm transformers."""

    def __init__(self, hidden_dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.activation_dropout = Dropout(dropout)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_dim], same shape out."""
        # The same as dropout after ReLU, which would keep its input besides.
        update = self.linear2(self.activation_dropout(self.linear1(x)).relu_())
        output: Tensor = self.norm(x + self.dropout(update))
        return output


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of a fraction; values closer than `eps` to 0 or 1 count as `eps` away from it."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1.0 - x).clamp(min=eps))


def refine_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Move reference boxes by predicted steps in logit space (Deformable DETR, eq. 4).

    Args:
        delta: [..., 4] raw output of a box head.
        reference: [..., 4] boxes (cxcywh), or [..., 2] points: the size is then `delta`'s alone.

    Returns:
        [..., 4] boxes in [0, 1], float32 at least.
    """
    delta = at_least_float32(delta)
    logits = inverse_sigmoid(reference)
    if reference.shape[-1] == 4:
        return (delta + logits).sigmoid()
    center, size = delta[..., :2], delta[..., 2:]
    return torch.cat((center + logits, size), dim=-1).sigmoid()
