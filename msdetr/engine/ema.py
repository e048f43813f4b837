"""The running average of the weights of a run (Polyak averaging, as an exponential moving average).

The average a of the weights w moves after every step: a <- a + (1 - d) (w - a). Its decay d grows
from 0 to `decay` as `decay * (1 - exp(-step / warmup_steps))`, so that the average soon forgets the
initial weights. It is a function of the step: nothing but the averages needs to be saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from msdetr.engine.parallel import local_tensor


class WeightAverage:
    """Averages of a model's trainable parameters, in float32, each sharded as its parameter is.

    What is not trained (frozen parameters, buffers) never changes and needs no average.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup_steps: int) -> None:
        """Start from the current weights of `model`."""
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._parameters.items()}
        """By parameter name; may be written into, to go on from a checkpoint."""
        self._decay = decay
        self._warmup_steps = warmup_steps
        device = next(iter(self._parameters.values())).device
        self._weight = torch.zeros((), device=device)

    def decay_at(self, step: int) -> float:
        """The decay of the update after `step` steps (1 is the first)."""
        if not self._warmup_steps:
            return self._decay
        return self._decay * (1.0 - math.exp(-step / self._warmup_steps))

    def set_step(self, step: int) -> None:
        """Take the decay of `step` for the next update."""
        self._weight.fill_(1.0 - self.decay_at(step))

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Move the averages towards the weights, unless `finite` (0-dim bool, on the device) is
        False."""
        # The weight is on the device, where `finite` is: `_foreach_lerp_` takes it from the host.
        weight = torch.where(finite, self._weight, 0.0)
        averages = [local_tensor(average) for average in self.averages.values()]
        steps = torch._foreach_sub(list(map(local_tensor, self._parameters.values())), averages)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)

    def restart(self) -> None:
        """Take the current weights as the averages."""
        for name, parameter in self._parameters.items():
            self.averages[name].copy_(parameter.detach())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages in this context, with its own weights after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            weight, average = local_tensor(parameter), local_tensor(self.averages[name])
            saved = weight.clone()
            weight.copy_(average)
            average.copy_(saved)
