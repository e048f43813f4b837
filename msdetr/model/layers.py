"""Layers that encoder, decoder and heads share."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


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
