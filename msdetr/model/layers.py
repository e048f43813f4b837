"""Layers that encoder, decoder and heads share."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

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


class FeedForward(nn.Module):
    """Residual feed-forward network with its LayerNorm, as in post-norm transformers."""

    def __init__(self, hidden_dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.activation = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_dim], same shape out."""
        update = self.linear2(self.activation(self.linear1(x)))
        output: Tensor = self.norm(x + self.dropout(update))
        return output
