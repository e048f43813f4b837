"""Activation checkpointing: keep a module's inputs, recompute the rest in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def call_module(
    module: nn.Module, *inputs: Any, activation_checkpointing: bool, has_dropout: bool = False
) -> Any:
    """`module(*inputs)`, with activation checkpointing if `activation_checkpointing` is set.

    Source: Chen et al., arXiv:1604.06174. With `has_dropout` the state of the random generators is
    kept, so that the second forward pass draws the same numbers.
    """
    if not (activation_checkpointing and torch.is_grad_enabled()):
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)
