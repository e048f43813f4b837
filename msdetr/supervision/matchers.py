"""Matchers: which queries of a branch answer for which targets.

A matcher is a frozen dataclass of its options whose call returns an `Assignment`. To add one, write
a class here that satisfies `Matcher`, and return it from the function below that builds the matcher
of its branch from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from msdetr.config import AssignmentConfig
from msdetr.ops.dispatch import Impl
from msdetr.ops.iou_assignment import assign_by_iou
from msdetr.ops.linear_assignment import linear_assignment_of_layers
from msdetr.ops.matching_cost import matching_cost
from msdetr.ops.one_to_many import one_to_many
from msdetr.structures import BACKGROUND, IGNORED, Assignment, Branch, Targets


class MatchContext(NamedTuple):
    """Everything besides predictions and targets that a matcher may depend on."""

    assignments: Mapping[str, Assignment] = {}
    """Assignments of the objectives before this one, by branch."""
    priority: Tensor | None = None
    """[N, B, Q] or [B, Q], random order in which positives are kept, for matchers that draw."""
    impl: Impl = "auto"
    """Implementation of the operators, see `msdetr.ops.dispatch`."""


class Matcher(Protocol):
    """Matches the queries of one branch with targets, for all layers and images at once.

    Reads nothing back from the device. Gradients are off. A matcher that reads `context.priority`
    has an attribute `is_random = True`.
    """

    def __call__(self, branch: Branch, targets: Targets, context: MatchContext) -> Assignment:
        """Assignment with k places per target."""
        ...


@dataclass(frozen=True, kw_only=True)
class Hungarian:
    """k queries per target at least total cost, and one target per query at most.

    With k = 1 the matching of DETR (Carion et al., eq. 1). Larger k are H-DETR's matching with
    targets that are repeated k times (arXiv:2207.13080, section 3.2). Where the targets need more
    queries than there are, some places stay empty. The costs are those of
    `msdetr.ops.matching_cost`.
    """

    cost_class: float
    cost_bbox: float
    cost_giou: float
    class_agnostic: bool = False
    """All targets have class 0, "object", whatever their labels."""
    by_anchors: bool = False
    """Match the anchors of the branch instead of its predicted boxes."""
    giou_eps: float = 0.0
    """Added to the denominators of the GIoU."""
    k: int = 1
    """Queries per target."""

    def __call__(self, branch: Branch, targets: Targets, context: MatchContext) -> Assignment:
        """Assignment with k places per target.

        Raises:
            ValueError: `by_anchors` is set and the branch has no anchors.
        """
        logits, boxes = branch.predictions
        if self.by_anchors:
            if branch.anchors is None:
                raise ValueError("the matcher reads anchors, and the branch has none")
            boxes = branch.anchors[None]
        cost = matching_cost(
            logits,
            boxes,
            targets,
            cost_class=self.cost_class,
            cost_bbox=self.cost_bbox,
            cost_giou=self.cost_giou,
            giou_eps=self.giou_eps,
            class_agnostic=self.class_agnostic,
            impl=context.impl,
        )
        labels = None if self.class_agnostic else targets.labels
        return Assignment(
            *linear_assignment_of_layers(
                cost, targets.count, labels, copies=self.k, impl=context.impl
            )
        )


@dataclass(frozen=True, kw_only=True)
class OneToMany:
    """Up to k queries per target (MS-DETR, section 3.3); see `msdetr.ops.one_to_many`.

    A query that serves several targets stands in the places of all of them and learns the class of
    the pair with the highest score.
    """

    is_random: ClassVar[bool] = True
    k: int
    threshold: float
    positive_fraction: float
    iou_weight: float
    class_weight: float
    merge_with: str | None = None
    """Branch whose one-to-one pairs are added as place k + 1. Each query then keeps only the target
    that it scores highest for, and a pair is added only where its query is still free."""

    def __call__(self, branch: Branch, targets: Targets, context: MatchContext) -> Assignment:
        """Assignment with k places per target, or k + 1 with `merge_with`.

        Raises:
            ValueError: there is no priority, or `merge_with` was not assigned before.
        """
        logits, boxes = branch.predictions
        if context.priority is None:
            raise ValueError("one-to-many matching needs a random priority per query")
        pairs = one_to_many(
            logits,
            boxes,
            targets,
            context.priority,
            k=self.k,
            threshold=self.threshold,
            positive_fraction=self.positive_fraction,
            iou_weight=self.iou_weight,
            class_weight=self.class_weight,
            impl=context.impl,
        )
        if self.merge_with is None:
            return Assignment(pairs.query_index, pairs.mask, pairs.best_class)
        other = context.assignments.get(self.merge_with)
        if other is None:
            raise ValueError(f"indices_merge needs the assignment of {self.merge_with!r} before it")
        num_slots = targets.labels.shape[1]  # `best_target` of a query without a target
        slots = torch.arange(num_slots, device=logits.device)[:, None]
        is_best = pairs.mask & (_at_pairs(pairs.best_target, pairs.query_index) == slots)
        is_free = other.mask & (_at_pairs(pairs.best_target, other.query_index) == num_slots)
        return Assignment(
            torch.cat((pairs.query_index, other.query_index), dim=-1),
            torch.cat((is_best, is_free), dim=-1),
            torch.where(pairs.best_target < num_slots, pairs.best_class, other.target_class),
        )


@dataclass(frozen=True, kw_only=True)
class ByIoU:
    """Up to k queries per target by the IoU of the anchors, in all layers the same (DETA).

    See `msdetr.ops.iou_assignment`. A query that serves several targets stands in the places of all
    of them and learns the class of the last one, as in the published code on a CPU.
    """

    is_random: ClassVar[bool] = True
    k: int
    threshold: float
    max_positives: int | None = None
    """At most this many positives per image; None: `positive_fraction` of the queries."""
    positive_fraction: float = 1.0
    class_agnostic: bool = False
    """All targets have class 0, "object", whatever their labels."""

    def __call__(self, branch: Branch, targets: Targets, context: MatchContext) -> Assignment:
        """Assignment with k places per target.

        Raises:
            ValueError: the branch has no anchors, or there is no priority.
        """
        if branch.anchors is None:
            raise ValueError("matching by IoU reads anchors, and the branch has none")
        priority = context.priority
        if priority is None:
            raise ValueError("matching by IoU needs a random priority per query")
        num_layers, _, num_queries, _ = branch.predictions.logits.shape
        max_positives = self.max_positives
        if max_positives is None:
            max_positives = int(self.positive_fraction * num_queries)
        query_index, mask, target = assign_by_iou(
            branch.anchors,
            targets,
            priority[-1] if priority.dim() == 3 else priority,
            k=self.k,
            threshold=self.threshold,
            max_positives=max_positives,
        )
        labels = torch.zeros_like(targets.labels) if self.class_agnostic else targets.labels
        target_class = torch.where(target >= 0, labels.gather(1, target.clamp(min=0)), BACKGROUND)
        layers = (x.expand(num_layers, *x.shape) for x in (query_index, mask, target_class))
        return Assignment(*layers)


@dataclass(frozen=True, kw_only=True)
class FixedPairs:
    """The pairs of denoising queries: query t of a group restores target t.

    The queries after the first T are negatives, which learn background. Empty slots carry no loss
    in DN-DETR; where there are negatives (DINO), they learn background, too.
    """

    def __call__(self, branch: Branch, targets: Targets, context: MatchContext) -> Assignment:
        """Assignment with one place per target."""
        num_layers, batch, num_queries, _ = branch.predictions.logits.shape
        num_slots = targets.labels.shape[1]
        query = torch.arange(num_slots, device=targets.labels.device)
        query_index = torch.where(targets.mask, query, 0)
        num_negatives = num_queries - num_slots
        no_object = BACKGROUND if num_negatives else IGNORED
        target_class = torch.where(targets.mask, targets.labels, no_object)
        negatives = target_class.new_full((batch, num_negatives), no_object)
        target_class = torch.cat((target_class, negatives), dim=1)
        fields = (query_index[..., None], targets.mask[..., None], target_class)
        return Assignment(*(x.expand(num_layers, *x.shape) for x in fields))


def one_to_one_matcher(config: AssignmentConfig) -> Matcher:
    """Matcher of predictions with real labels, by the costs of the configuration."""
    return _hungarian(config)


def decoder_matcher(config: AssignmentConfig) -> Matcher:
    """Matcher of the object queries."""
    if config.decoder_match == "iou":
        return ByIoU(
            k=config.iou_k,
            threshold=config.iou_threshold,
            positive_fraction=config.positive_fraction,
        )
    return one_to_one_matcher(config)


def hybrid_matcher(config: AssignmentConfig) -> Matcher:
    """Matcher of hybrid queries: the same costs, several queries per target."""
    return _hungarian(config, k=config.hybrid_k)


def one_to_many_matcher(config: AssignmentConfig) -> Matcher:
    """Matcher of the one-to-many branch."""
    return OneToMany(
        k=config.one_to_many_k,
        threshold=config.one_to_many_threshold,
        positive_fraction=config.positive_fraction,
        iou_weight=config.one_to_many_iou_weight,
        class_weight=config.one_to_many_class_score_weight,
        merge_with="one_to_one" if config.indices_merge else None,
    )


def encoder_matcher(config: AssignmentConfig) -> Matcher:
    """Matcher of the encoder's proposals. They tell objects from background, not classes."""
    if config.encoder_match == "iou":
        return ByIoU(
            k=config.iou_k,
            threshold=config.encoder_iou_threshold,
            max_positives=config.encoder_max_positives,
            class_agnostic=True,
        )
    return Hungarian(
        cost_class=config.encoder_cost_class,
        cost_bbox=config.cost_bbox,
        cost_giou=config.cost_giou,
        class_agnostic=True,
        by_anchors=config.encoder_match == "anchors",
        giou_eps=config.giou_eps,
    )


def _hungarian(config: AssignmentConfig, k: int = 1) -> Hungarian:
    return Hungarian(
        cost_class=config.cost_class,
        cost_bbox=config.cost_bbox,
        cost_giou=config.cost_giou,
        giou_eps=config.giou_eps,
        k=k,
    )


def _at_pairs(per_query: Tensor, query_index: Tensor) -> Tensor:
    """Values [N, B, Q] at the queries of pairs [N, B, T, k]."""
    return per_query.gather(2, query_index.flatten(2)).view_as(query_index)
