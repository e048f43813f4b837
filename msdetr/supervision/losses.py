"""Loss terms by name. Each is a sum per layer; the criterion divides by the number of targets.

To add a term, write a function of `LossInputs` here, enter it in `LOSS_TERMS`, and add the field
`<name>_weight` to `LossConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, generalized_box_iou
from msdetr.config import LossConfig
from msdetr.ops.dispatch import Impl
from msdetr.ops.focal_loss import focal_loss
from msdetr.structures import Assignment, Predictions, Targets


class LossInputs(NamedTuple):
    """What the loss terms of one branch are computed from."""

    predictions: Predictions
    """N layers, Q queries."""
    assignment: Assignment
    """k places for queries per target."""
    boxes: Tensor
    """[N, B, T, k, 4] predicted boxes (cxcywh) in these places, float32 at least."""
    target_boxes: Tensor
    """[N, B, T, k, 4] the target's box for each place, a view."""
    config: LossConfig
    impl: Impl
    """Implementation of the operators, see `msdetr.ops.dispatch`."""

    def sum_over_pairs(self, values: Tensor) -> Tensor:
        """[N], the sum of `values` [N, B, T, k] over the places that hold a query."""
        return torch.where(self.assignment.mask, values, 0.0).sum((1, 2, 3))


def loss_inputs(
    predictions: Predictions,
    targets: Targets,
    assignment: Assignment,
    config: LossConfig,
    *,
    impl: Impl = "auto",
) -> LossInputs:
    """Gather the boxes of the assigned pairs. A query with two targets stands in both pairs."""
    boxes = at_least_float32(predictions.boxes)
    query_index = assignment.query_index  # [N, B, T, k]
    index = query_index.flatten(2)[..., None].expand(-1, -1, -1, 4)
    matched = boxes.gather(2, index).view(*query_index.shape, 4)
    target_boxes = targets.boxes.to(boxes.dtype)[:, :, None].expand_as(matched)
    return LossInputs(predictions, assignment, matched, target_boxes, config, impl)


def class_loss(inputs: LossInputs) -> Tensor:
    """[N] focal loss of all queries, background included (Lin et al., arXiv:1708.02002, eq. 5)."""
    return focal_loss(
        inputs.predictions.logits,
        inputs.assignment.target_class,
        alpha=inputs.config.focal_alpha,
        gamma=inputs.config.focal_gamma,
        impl=inputs.impl,
    )


def bbox_loss(inputs: LossInputs) -> Tensor:
    """[N] L1 distance of the assigned boxes, as fractions of the image."""
    return inputs.sum_over_pairs((inputs.boxes - inputs.target_boxes).abs().sum(-1))


def giou_loss(inputs: LossInputs) -> Tensor:
    """[N] 1 - GIoU of the assigned boxes (Rezatofighi et al., arXiv:1902.09630)."""
    giou = generalized_box_iou(
        cxcywh_to_xyxy(inputs.boxes), cxcywh_to_xyxy(inputs.target_boxes), inputs.config.giou_eps
    )
    return inputs.sum_over_pairs(1.0 - giou)


LOSS_TERMS: dict[str, Callable[[LossInputs], Tensor]] = {
    "class": class_loss,
    "bbox": bbox_loss,
    "giou": giou_loss,
}
"""Loss terms by the name under which they are weighted and logged."""


def loss_weights(config: LossConfig, branch: str) -> dict[str, float]:
    """Weights of a branch by loss term.

    They are the fields `<branch>_<term>_weight` of the configuration, or `<term>_weight` where the
    branch has none of its own. A term without either is left out.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    weights = {}
    for term in LOSS_TERMS:
        names = (f"{branch}_{term}_weight", f"{term}_weight")
        name = next((name for name in names if name in fields), None)
        if name is not None:
            weights[term] = getattr(config, name)
    return weights
