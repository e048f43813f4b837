"""The tensors of a run: weights, EMA weights and optimizer state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from msdetr.engine.checkpoint import EMA, MODEL, OPTIMIZER, Checkpoint, optimizer_tensors
from msdetr.engine.ema import WeightEMA
from msdetr.engine.optimizer.state import (
    load_optimizer_state,
    optimizer_state_by_name,
    optimizer_state_targets,
)
from msdetr.engine.parallel import full_tensor
from msdetr.model.checkpoint_adapter import check_state
from msdetr.model.detector import Detector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Everything that training changes, apart from the step."""

    model: Detector
    optimizer: Optimizer
    ema: WeightEMA | None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under their names in a checkpoint; shards where the model is sharded."""
        return {
            **_with_prefix(self.model.state_dict(), MODEL),
            **_with_prefix({} if self.ema is None else self.ema.weights, EMA),
            **optimizer_tensors(optimizer_state_by_name(self.optimizer, self.model)),
        }

    def exported_weights(self) -> dict[str, Tensor]:
        """Whole weights for evaluation: the EMA weights where there are any. All ranks call it."""
        weights = self.model.state_dict() | ({} if self.ema is None else self.ema.weights)
        return {name: full_tensor(tensor) for name, tensor in weights.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the tensors of a checkpoint.

        Raises:
            ValueError: they do not fit the model.
        """
        index = checkpoint.tensors.index
        check_state(self.model, _without_prefix(index, MODEL))
        states = optimizer_state_targets(self.model, _without_prefix(index, OPTIMIZER))
        targets = _with_prefix(self.model.state_dict(), MODEL) | optimizer_tensors(states)
        if self.ema is not None and checkpoint.has_ema:
            targets |= _with_prefix(self.ema.weights, EMA)
        missing = sorted(targets.keys() - index.keys())
        if missing:
            raise ValueError(f"{checkpoint.path} lacks {', '.join(missing[:5])}")
        checkpoint.tensors.load(targets)
        load_optimizer_state(self.optimizer, self.model, states)
        if self.ema is not None and not checkpoint.has_ema:
            self.ema.restart()
            logger.warning("%s has no EMA weights: they start from its weights", checkpoint.path)
        elif self.ema is None and checkpoint.has_ema:
            logger.warning("the EMA weights of %s are dropped: no ema_decay", checkpoint.path)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
