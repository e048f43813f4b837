"""The training objective: one-to-one, one-to-many and encoder losses of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.assignment.one_to_many import assign_one_to_many
from msdetr.assignment.one_to_one import assign_one_to_one
from msdetr.config import AssignmentConfig, LossConfig
from msdetr.losses.terms import box_losses
from msdetr.ops.dispatch import Impl
from msdetr.ops.focal_loss import focal_loss
from msdetr.structures import Assignment, DetectorOutput, Predictions, Targets


class LossOutput(NamedTuple):
    """A step's losses, on the device of the predictions."""

    total: Tensor
    """0-dim, weighted sum of all terms."""
    terms: dict[str, Tensor]
    """Unweighted, detached, one value per layer: `one_to_one/class` [N], `one_to_many/bbox` [N],
    `encoder/giou` [1] and so on."""


def add_losses(losses: Sequence[LossOutput]) -> LossOutput:
    """The losses of a step from those of its micro-batches, all divided by the step's targets."""
    if len(losses) == 1:
        return losses[0]
    terms = {
        name: torch.stack([part.terms[name] for part in losses]).sum(0) for name in losses[0].terms
    }
    return LossOutput(torch.stack([part.total for part in losses]).sum(), terms)


class Criterion(nn.Module):
    """Assigns predictions to targets and weighs the losses.

    All losses are divided by the number of targets, not of positives: a one-to-many loss sums up
    to k pairs per target, as in the published recipe.
    """

    def __init__(
        self, assignment: AssignmentConfig, loss: LossConfig, *, impl: Impl = "auto"
    ) -> None:
        """Take the weights; `impl` chooses the implementation of assignment and focal loss."""
        super().__init__()
        self.assignment = assignment
        self.loss = loss
        self.impl: Impl = impl

    def forward(
        self,
        output: DetectorOutput,
        targets: Targets,
        *,
        num_targets: Tensor | None = None,
        priority: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Losses of one batch.

        Args:
            output: of a detector in training mode.
            targets: T slots per image; images and whole batches without targets run the same graph.
            num_targets: 0-dim, mean number of targets per rank (default: of this batch). At least
                1 is used.
            priority: [N, B, Q] or [B, Q], which one-to-many positives are kept (default: random).
            generator: source of random priorities.
        """
        if num_targets is None:
            num_targets = targets.count.sum()
        normalizer = num_targets.to(torch.promote_types(output.one_to_one.boxes.dtype, torch.float))
        normalizer = normalizer.clamp(min=1.0)
        costs, weights = self.assignment, self.loss

        one_to_one = self._supervised_layers(output.one_to_one)
        assignment = assign_one_to_one(
            *one_to_one,
            targets,
            cost_class=costs.cost_class,
            cost_bbox=costs.cost_bbox,
            cost_giou=costs.cost_giou,
            impl=self.impl,
        )
        branches = {
            "one_to_one": (
                self._terms(one_to_one, targets, assignment, normalizer),
                (weights.class_weight, weights.bbox_weight, weights.giou_weight),
            )
        }
        if output.one_to_many is not None:
            one_to_many = self._supervised_layers(output.one_to_many)
            assignment = assign_one_to_many(
                one_to_many,
                targets,
                costs,
                priority=priority,
                generator=generator,
                one_to_one=assignment,
                impl=self.impl,
            )
            branches["one_to_many"] = (
                self._terms(one_to_many, targets, assignment, normalizer),
                (
                    weights.one_to_many_class_weight,
                    weights.one_to_many_bbox_weight,
                    weights.one_to_many_giou_weight,
                ),
            )
        if output.encoder is not None:
            branches["encoder"] = (
                self._encoder_terms(output, targets, normalizer),
                (
                    weights.encoder_class_weight,
                    weights.encoder_bbox_weight,
                    weights.encoder_giou_weight,
                ),
            )
        return _weigh(branches)

    def _supervised_layers(self, predictions: Predictions) -> Predictions:
        if self.loss.auxiliary:
            return predictions
        return Predictions(predictions.logits[-1:], predictions.boxes[-1:])

    def _encoder_terms(
        self, output: DetectorOutput, targets: Targets, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Encoder losses: targets have one class, "object", which is class 0."""
        proposals, anchors = output.encoder, output.anchors
        assert proposals is not None
        assert anchors is not None
        targets = targets._replace(labels=torch.zeros_like(targets.labels))
        match_anchors = self.assignment.encoder_match == "anchors"
        assignment = assign_one_to_one(
            proposals.logits,
            anchors[None] if match_anchors else proposals.boxes,
            targets,
            cost_class=self.assignment.encoder_cost_class,
            cost_bbox=self.assignment.cost_bbox,
            cost_giou=self.assignment.cost_giou,
            impl=self.impl,
        )
        return self._terms(proposals, targets, assignment, normalizer)

    def _terms(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Assignment,
        normalizer: Tensor,
    ) -> dict[str, Tensor]:
        classification = focal_loss(
            predictions.logits,
            assignment.target_class,
            alpha=self.loss.focal_alpha,
            gamma=self.loss.focal_gamma,
            impl=self.impl,
        )
        l1, giou = box_losses(predictions.boxes, targets, assignment)
        return {
            "class": classification / normalizer,
            "bbox": l1 / normalizer,
            "giou": giou / normalizer,
        }


def _weigh(
    branches: dict[str, tuple[dict[str, Tensor], tuple[float, float, float]]],
) -> LossOutput:
    weighted, terms = [], {}
    for branch, (branch_terms, weights) in branches.items():
        for weight, (name, values) in zip(weights, branch_terms.items(), strict=True):
            weighted.append(weight * values.sum())
            terms[f"{branch}/{name}"] = values.detach()
    return LossOutput(torch.stack(weighted).sum(), terms)
