"""Conversion of DETA's command line, which adds four options to Deformable-DETR's.

- With `--assign_second_stage` its post-processing applies NMS at 0.7, and otherwise none.
- `--assign_first_stage` has no effect without `--two_stage`, and is dropped with a warning.
- `--finetune` loads all but the class heads of a file. It becomes `weights`, which keeps the
  initialisation of class heads only where their number of classes differs. A warning says so.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from msdetr.config import DataConfig
from msdetr.published import deformable
from msdetr.published.shared import Recipe, effective

logger = logging.getLogger(__name__)

_PROPOSAL_NMS = 0.9
_DETECTION_NMS = 0.7


def unsupported(values: argparse.Namespace) -> list[str]:
    """Reasons against values of this command line that are not supported."""
    reasons = deformable.unsupported(values)
    if values.assign_second_stage and not values.two_stage:
        reasons.append("assign_second_stage: its boxes come from proposals, it needs two_stage")
    return reasons


def recipe(values: argparse.Namespace, batch_size: int) -> Recipe:
    """The recipe of these values. Warns of values that change or go."""
    base = deformable.recipe(values, batch_size, "deta")
    assignment = base.assignment
    first = effective(values, "assign_first_stage", needs="two_stage")
    if first:
        assignment = replace(assignment, encoder_match="iou", encoder_cost_class=0.0)
    if values.finetune and not values.resume:
        logger.warning("finetune: class heads of as many classes are loaded too, other than there")
    return base._replace(
        model=replace(
            base.model,
            proposal_content=values.two_stage,
            proposal_nms_iou_threshold=_PROPOSAL_NMS if first else None,
        ),
        assignment=replace(
            assignment, decoder_match="iou" if values.assign_second_stage else "hungarian"
        ),
        data=_bigger(base.data) if values.bigger else base.data,
        eval=replace(
            base.eval, nms_iou_threshold=_DETECTION_NMS if values.assign_second_stage else None
        ),
    )


def _bigger(data: DataConfig) -> DataConfig:
    """Images of 1.5 times the size."""
    return replace(
        data,
        train_sizes=tuple(int(1.5 * size) for size in data.train_sizes),
        test_size=1200,
        max_size=2000,
    )
