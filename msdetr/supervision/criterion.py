"""The training criterion: the weighted losses of a list of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.ops.dispatch import Impl
from msdetr.structures import (
    Assignment,
    Branch,
    DetectorOutput,
    Predictions,
    TargetCount,
    Targets,
    split_groups,
)
from msdetr.supervision.losses import LOSS_TERMS, loss_inputs
from msdetr.supervision.matchers import MatchContext
from msdetr.supervision.objectives import Objective, build_objectives


class LossOutput(NamedTuple):
    """Losses of one step, on the device of the predictions."""

    total: Tensor
    """0-dim, weighted sum of all terms."""
    terms: dict[str, Tensor]
    """Unweighted, detached, one value per layer: `one_to_one/class` [N], `one_to_many/bbox` [N],
    `encoder/giou` [1] and so on."""


def add_losses(losses: Sequence[LossOutput]) -> LossOutput:
    """Losses of a step from those of its micro-batches, each divided by the step's targets."""
    if len(losses) == 1:
        return losses[0]
    terms = {
        name: torch.stack([chunk.terms[name] for chunk in losses]).sum(0)
        for name in losses[0].terms
    }
    return LossOutput(torch.stack([chunk.total for chunk in losses]).sum(), terms)


class Supervised(NamedTuple):
    """A branch as its objective sees it. Each group of queries is one more image of the batch."""

    objective: Objective
    num_groups: int
    branch: Branch
    """The supervised layers, for B * groups images."""
    targets: Targets
    """Of B * groups images."""


class Criterion(nn.Module):
    """Matches each branch with the targets and sums the weighted losses.

    All losses are divided by the number of targets, not of positives: a one-to-many loss sums up
    to k pairs per target, as in the published recipe. A target counts once for each group of
    queries, except as `LossConfig.sum_group_losses` says.
    """

    def __init__(
        self,
        assignment: AssignmentConfig,
        loss: LossConfig,
        *,
        objectives: Sequence[Objective] | None = None,
        impl: Impl = "auto",
    ) -> None:
        """Build the objectives.

        Args:
            assignment: options of the matchers.
            loss: weights and options of the loss terms.
            objectives: to use instead of those of the configuration.
            impl: implementation of assignment and focal loss; may be assigned to.
        """
        super().__init__()
        self.loss = loss
        if objectives is None:
            objectives = build_objectives(assignment, loss)
        self.objectives = tuple(objectives)
        self.impl: Impl = impl

    def forward(
        self,
        output: DetectorOutput,
        targets: Targets,
        *,
        num_targets: TargetCount | None = None,
        priority: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Losses of one batch.

        Args:
            output: of a detector in training mode.
            targets: T slots per image; images and whole batches without targets run the same graph.
            num_targets: of the step (default: of this batch). Losses are divided by their mean over
                the ranks, or by those of this rank where the objective says so, times the
                repetitions of a target, and at least by 1.
            priority: by branch, [N, B, Q] or [B, Q] with the queries of all groups, which
                positives are kept (default: random).
            generator: source of random priorities.

        Raises:
            ValueError: the output has a branch that no objective supervises.
        """
        if num_targets is None:
            num_targets = TargetCount(*[targets.count.sum()] * 2)
        dtype = torch.promote_types(output.one_to_one.boxes.dtype, torch.float)
        num_targets = TargetCount(*(count.to(dtype) for count in num_targets))
        if priority is None:
            priority = self.draw_priority(output, generator)
        supervised = self._supervised(output, targets)
        assignments = self._assign(supervised, priority)
        weighted, terms = [], {}
        for objective, num_groups, branch, branch_targets in supervised:
            assignment = assignments[objective.branch]
            inputs = loss_inputs(
                branch.predictions, branch_targets, assignment, self.loss, impl=self.impl
            )
            count = num_targets.local if objective.per_process else num_targets.mean
            repeated = objective.targets_repeated * (1 if objective.sum_groups else num_groups)
            least = repeated if objective.needs_targets else 1
            normalizer = (count * repeated).clamp(min=float(least))
            for term, weight in objective.weights.items():
                values = LOSS_TERMS[term](inputs) / normalizer
                if objective.needs_targets:
                    values = torch.where(count > 0, values, 0.0)
                weighted.append(weight * values.sum())
                terms[f"{objective.branch}/{term}"] = values.detach()
        return LossOutput(torch.stack(weighted).sum(), terms)

    def draw_priority(
        self, output: DetectorOutput, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Random priorities [N, B, Q] for each branch whose matcher draws.

        For `forward`, outside of compiled code, which cannot use a generator.
        """
        priority = {}
        for objective in self.objectives:
            branch = output.branches.get(objective.branch)
            if branch is not None and getattr(objective.matcher, "is_random", False):
                logits = branch.predictions.logits[objective.layers]
                drawn = torch.rand(logits.shape[:3], device=logits.device, generator=generator)
                priority[objective.branch] = drawn
        return priority

    def assign(
        self,
        output: DetectorOutput,
        targets: Targets,
        *,
        priority: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Assignment]:
        """Assignments of all supervised branches by name; the arguments are those of `forward`.

        Those of a branch with groups are for B * groups images, image-major.
        """
        if priority is None:
            priority = self.draw_priority(output, generator)
        return self._assign(self._supervised(output, targets), priority)

    @torch.no_grad()
    def _assign(
        self, supervised: Sequence[Supervised], priority: Mapping[str, Tensor]
    ) -> dict[str, Assignment]:
        assignments: dict[str, Assignment] = {}
        for objective, num_groups, branch, targets in supervised:
            order = priority.get(objective.branch)
            if order is not None:
                if order.dim() == 3:
                    order = order[objective.layers]
                order = split_groups(order, num_groups, dim=order.dim() - 1)
            context = MatchContext(assignments, order, self.impl)
            assignments[objective.branch] = objective.matcher(branch, targets, context)
        return assignments

    def _supervised(self, output: DetectorOutput, targets: Targets) -> list[Supervised]:
        """Objectives whose branch the output has, in the order of the objectives."""
        names = [objective.branch for objective in self.objectives]
        if unsupervised := output.branches.keys() - set(names):
            raise ValueError(f"no objective supervises {', '.join(sorted(unsupervised))}")
        repeated: dict[int, Targets] = {}  # by number of groups: copied once
        supervised = []
        for objective in self.objectives:
            branch = output.branches.get(objective.branch)
            if branch is not None:
                logits, boxes = (x[objective.layers] for x in branch.predictions)
                branch = branch._replace(predictions=Predictions(logits, boxes))
                num_groups = branch.num_groups
                if num_groups not in repeated:
                    repeated[num_groups] = targets.repeated(num_groups)
                supervised.append(
                    Supervised(
                        objective, num_groups, branch.groups_as_images(), repeated[num_groups]
                    )
                )
        return supervised
