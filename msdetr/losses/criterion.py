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

    def assign_encoder(self, anchors: Tensor | None, targets: Targets) -> Assignment | None:
        """The assignment of the encoder's proposals, where it does not depend on predictions.

        For `forward`, before there is an output, and beside what computes it.

        Args:
            anchors: [B, S, 4] boxes (cxcywh) that proposals start from; None without proposals.
            targets: T slots per image.

        Returns:
            An assignment with one place per target. None where proposals are matched by their
            predictions, or there are none.
        """
        config = self.assignment
        if anchors is None or config.encoder_match != "anchors" or config.encoder_cost_class:
            return None
        boxes = anchors[None]
        return self._match_encoder(boxes, boxes, targets)  # Logits are not read.

    def forward(
        self,
        output: DetectorOutput,
        targets: Targets,
        *,
        encoder_assignment: Assignment | None = None,
        num_targets: Tensor | None = None,
        priority: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Losses of one batch.

        Args:
            output: of a detector in training mode.
            targets: T slots per image; images and whole batches without targets run the same graph.
            encoder_assignment: from `assign_encoder`, for the same anchors and targets (default:
                computed here).
            num_targets: 0-dim, mean number of targets per rank (default: of this batch). At least
                1 is used.
            priority: [N, B, Q] or [B, Q], which one-to-many positives are kept (default: random).
            generator: source of random priorities.
        """
        if num_targets is None:
            num_targets = targets.count.sum()
        normalizer = num_targets.to(torch.promote_types(output.one_to_one.boxes.dtype, torch.float))
        normalizer = normalizer.clamp(min=1.0)
        assignments = self.assign(
            output,
            targets,
            encoder_assignment=encoder_assignment,
            priority=priority,
            generator=generator,
        )
        weights = self.loss
        branch_weights = {
            "one_to_one": (weights.class_weight, weights.bbox_weight, weights.giou_weight),
            "one_to_many": (
                weights.one_to_many_class_weight,
                weights.one_to_many_bbox_weight,
                weights.one_to_many_giou_weight,
            ),
            "encoder": (
                weights.encoder_class_weight,
                weights.encoder_bbox_weight,
                weights.encoder_giou_weight,
            ),
        }
        return _weigh(
            {
                name: (
                    self._terms(predictions, targets, assignments[name], normalizer),
                    branch_weights[name],
                )
                for name, predictions in self._supervised(output).items()
            }
        )

    def assign(
        self,
        output: DetectorOutput,
        targets: Targets,
        *,
        encoder_assignment: Assignment | None = None,
        priority: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Assignment]:
        """The assignments of all branches of an output: `one_to_one`, `one_to_many`, `encoder`.

        The arguments are those of `forward`.
        """
        costs, supervised = self.assignment, self._supervised(output)
        one_to_one = assign_one_to_one(
            *supervised["one_to_one"],
            targets,
            cost_class=costs.cost_class,
            cost_bbox=costs.cost_bbox,
            cost_giou=costs.cost_giou,
            impl=self.impl,
        )
        assignments = {"one_to_one": one_to_one}
        if "one_to_many" in supervised:
            assignments["one_to_many"] = assign_one_to_many(
                supervised["one_to_many"],
                targets,
                costs,
                priority=priority,
                generator=generator,
                one_to_one=one_to_one,
                impl=self.impl,
            )
        if "encoder" in supervised:
            proposals, anchors = supervised["encoder"], output.anchors
            if encoder_assignment is None:
                assert anchors is not None
                boxes = anchors[None] if costs.encoder_match == "anchors" else proposals.boxes
                encoder_assignment = self._match_encoder(proposals.logits, boxes, targets)
            assignments["encoder"] = encoder_assignment
        return assignments

    def _supervised(self, output: DetectorOutput) -> dict[str, Predictions]:
        """The layers of each branch that have losses."""
        branches = {"one_to_one": output.one_to_one, "one_to_many": output.one_to_many}
        layers = slice(None) if self.loss.auxiliary else slice(-1, None)
        supervised = {
            name: Predictions(branch.logits[layers], branch.boxes[layers])
            for name, branch in branches.items()
            if branch is not None
        }
        if output.encoder is not None:
            supervised["encoder"] = output.encoder
        return supervised

    def _match_encoder(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Assignment:
        """Targets have one class, "object", which is class 0."""
        return assign_one_to_one(
            logits,
            boxes,
            targets,
            cost_class=self.assignment.encoder_cost_class,
            cost_bbox=self.assignment.cost_bbox,
            cost_giou=self.assignment.cost_giou,
            class_agnostic=True,
            impl=self.impl,
        )

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
