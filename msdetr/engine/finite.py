"""Detection of non-finite losses and gradients without a host read in every step.

`FiniteCheck.record` notes on the device which step was the first bad one. `FiniteCheck.verify`
reads that, agrees with the other ranks, and raises. On the CPU reading is free and the trainer
verifies in every step; on CUDA when it logs, and always before a checkpoint or an evaluation.
`guard_update` makes the fused optimizer skip, on the device, every step whose gradient is not
finite, so the weights stay clean until then.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from msdetr.engine.distributed import Worker, all_gather_objects

_NEVER = 2**62


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. Names the step, the ranks and the images."""


class FiniteCheck:
    """Remembers the first step whose loss or gradient norm was not finite."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # First bad step of this rank's loss, and of the gradient, which is the same on all ranks.
        self._first_bad = torch.full((2,), _NEVER, dtype=torch.int64, device=worker.device)
        self._image_ids: dict[int, Tensor] = {}

    def record(self, step: int, loss: Tensor, grad_norm: Tensor, image_ids: Tensor) -> None:
        """Note step `step` (1 is the first): 0-dim `loss` and `grad_norm`, host `image_ids` [B]."""
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

    `found_inf` is how torch's gradient scaler tells fused optimizers about overflow; they leave
    weights and state untouched where it is 1.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def _describe(step: int, ranks: list[tuple[bool, list[int]]]) -> str:
    culprits = [rank for rank, (loss_is_bad, _) in enumerate(ranks) if loss_is_bad]
    what = "loss" if culprits else "gradient"
    involved = culprits or range(len(ranks))
    images = "; ".join(f"rank {rank}: image ids {ranks[rank][1]}" for rank in involved)
    return (
        f"the {what} of step {step} is not finite ({images}). It did not reach the weights, and "
        "the last checkpoint is untouched. A lower --optimizer.lr, more --optimizer.warmup-steps "
        "or --train.precision float32 may help; `msdetr doctor` checks the data"
    )
