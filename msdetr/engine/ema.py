"""The exponential moving average (EMA) of the weights of a run.

The EMA weights a follow the weights w after every step: a <- a + (1 - d) (w - a). The decay d grows
from 0 to `decay` as `decay * (1 - exp(-step / warmup_steps))`, so that the initial weights are soon
forgotten. The decay is a function of the step, so that a checkpoint need not hold it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from msdetr.engine.parallel import local_tensor


class WeightEMA:
    """EMA of a model's trainable parameters, in float32, each sharded as its parameter is.

    Frozen parameters and buffers never change, and have no EMA.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup_steps: int) -> None:
        """Start from the current weights of `model`."""
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        """EMA weights by parameter name. Loading a checkpoint writes into them."""
        self._decay = decay
        self._warmup_steps = warmup_steps
        device = next(iter(self._parameters.values())).device
        self._one_minus_decay = torch.zeros((), device=device)

    def decay_at(self, step: int) -> float:
        """The decay of the update after `step` steps (1 is the first)."""
        if not self._warmup_steps:
            return self._decay
        return self._decay * (1.0 - math.exp(-step / self._warmup_steps))

    def set_step(self, step: int) -> None:
        """Use the decay of `step` in the next update."""
        self._one_minus_decay.fill_(1.0 - self.decay_at(step))

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Move the EMA weights towards the weights if `finite` (0-dim bool, on the device)."""
        # A product on the device, because `_foreach_lerp_` takes its factor from the host.
        factor = torch.where(finite, self._one_minus_decay, 0.0)
        ema = [local_tensor(weight) for weight in self.weights.values()]
        steps = torch._foreach_sub(list(map(local_tensor, self._parameters.values())), ema)
        torch._foreach_mul_(steps, factor)
        torch._foreach_add_(ema, steps)

    def restart(self) -> None:
        """Set the EMA weights to the current weights."""
        for name, parameter in self._parameters.items():
            self.weights[name].copy_(parameter.detach())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model use the EMA weights in this context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            weight, ema = local_tensor(parameter), local_tensor(self.weights[name])
            saved = weight.clone()
            weight.copy_(ema)
            ema.copy_(saved)
