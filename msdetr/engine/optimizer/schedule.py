"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from msdetr.config import OptimizerConfig


def learning_rate_factor(
    step: int, *, steps_per_epoch: int, total_steps: int, config: OptimizerConfig
) -> float:
    """Factor on every group's learning rate at `step` (0 is the first).

    A pure function, so that a checkpoint need not hold it. `total_steps` is the length of the whole
    schedule (epochs x steps per epoch), even where a run stops earlier.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        factor = 0.1 ** (step // steps_per_epoch // config.lr_drop_epoch)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))
    return float(warmup * factor)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
