"""Detection of non-finite losses and gradients without a host read in every step.

`FiniteCheck.record` stores on the device the number of the first bad step. `FiniteCheck.verify`
reads it, compares it between ranks, and raises. On the CPU, where reading costs nothing, the
trainer verifies in every step. On CUDA it verifies when it logs, and before each checkpoint and
evaluation. `guard_update` makes the fused optimizer skip, on the device, every step whose gradient
is not finite, so that the weights stay finite until then.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from msdetr.engine.distributed import Worker, all_gather_objects

_NEVER = 2**62


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. The message names step, ranks and images."""


class FiniteCheck:
    """Remembers the first step whose loss or gradient norm was not finite."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # First bad step of this rank's loss, and of the gradient, which is the same on all ranks.
        self._first_bad = torch.full((2,), _NEVER, dtype=torch.int64, device=worker.device)
        self._image_ids: dict[int, Tensor] = {}

    def record(self, step: int, loss: Tensor, grad_norm: Tensor, image_ids: Tensor) -> None:
        """Record a step, from 1: 0-dim `loss` and `grad_norm`, `image_ids` [B] on the host."""
        bad = ~torch.stack((torch.isfinite(loss.detach()), torch.isfinite(grad_norm)))
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)
        self._image_ids[step] = image_ids

    def verify(self) -> None:
        """Raise if a step since the last call was bad. All ranks call it at the same step.

        Raises:
            NonFiniteError: on every rank, with the same text.
        """
        first_bad = self._first_bad.clone()
        if self._worker.world_size > 1:
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        step = int(first_bad.min())
        if step == _NEVER:
            self._image_ids.clear()
            return
        loss_is_bad = int(self._first_bad[0]) == step
        mine = (loss_is_bad, self._image_ids[step].tolist())
        raise NonFiniteError(_describe(step, all_gather_objects(mine, self._worker)))


def guard_update(optimizer: Optimizer, finite: Tensor) -> None:
    """Make a fused optimizer skip its next step, on the device, unless `finite` (0-dim bool).

    Fused optimizers leave weights and state unchanged where their `found_inf` is 1. Torch's
    gradient scaler sets it after an overflow.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def _describe(step: int, ranks: list[tuple[bool, list[int]]]) -> str:
    culprits = [rank for rank, (loss_is_bad, _) in enumerate(ranks) if loss_is_bad]
    quantity = "loss" if culprits else "gradient"
    involved = culprits or range(len(ranks))
    images = "; ".join(f"rank {rank}: image ids {ranks[rank][1]}" for rank in involved)
    return (
        f"the {quantity} of step {step} is not finite ({images}). It did not reach the weights, "
        "and the last checkpoint is unchanged. A lower --optimizer.lr, more "
        "--optimizer.warmup-steps or --train.precision float32 may help; `msdetr doctor` checks "
        "the data"
    )
