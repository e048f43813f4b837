"""The published assignment, restated: a loop over layers, images and targets.

It draws by given priorities, which all implementations share, and omits the checks of the published
code.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.assignment.cases import CONFIG, Inputs
from msdetr.boxes import cxcywh_to_xyxy, pairwise_generalized_iou, pairwise_iou
from msdetr.ops.matching_cost import FOCAL_ALPHA, FOCAL_GAMMA

Pairs = list[list[tuple[Tensor, Tensor]]]
"""Queries and targets [M] of the pairs, per layer and image."""

_BACKGROUND = -1


def published_one_to_many(
    inputs: Inputs,
    *,
    k: int = CONFIG.one_to_many_k,
    threshold: float = CONFIG.one_to_many_threshold,
) -> Pairs:
    """One image after the other; pairs are in ascending order of their score, as published."""
    return [
        [
            _published_image(logits, boxes, priority, targets, k, threshold)
            for logits, boxes, priority, targets in zip(*layer, inputs.image_targets, strict=True)
        ]
        for layer in zip(inputs.logits, inputs.boxes, inputs.priority, strict=True)
    ]


def _published_image(
    logits: Tensor,
    boxes: Tensor,
    priority: Tensor,
    targets: tuple[Tensor, Tensor],
    k: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    labels, target_boxes = targets
    num_queries = len(boxes)
    if not len(labels):
        return labels, labels
    iou = pairwise_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    probability = logits.sigmoid()[:, labels]
    score = (
        CONFIG.one_to_many_iou_weight * iou + CONFIG.one_to_many_class_score_weight * probability
    ).T  # [T, Q]

    best_score, best_target = score.max(dim=0)
    positive = best_score >= threshold
    positive[score.argmax(dim=1)] = True
    query_class = labels[best_target]
    query_class[~positive] = _BACKGROUND
    candidates = (query_class != _BACKGROUND).nonzero()[:, 0]
    others = (query_class == _BACKGROUND).nonzero()[:, 0]
    limit = int(CONFIG.positive_fraction * num_queries)
    drawn = candidates[priority[candidates].argsort()[:limit]]
    rest = others[torch.randperm(len(others), device=others.device)[: num_queries - len(drawn)]]
    sample = torch.cat((drawn, rest))
    kept = sample[query_class[sample] != _BACKGROUND]

    served, counts = best_target[kept].unique(return_counts=True)
    top_scores, top_queries = score[served].topk(min(k, num_queries), dim=1)
    scores, queries, owners = [], [], []
    for target, count, target_scores, target_queries in zip(
        served, counts, top_scores, top_queries, strict=True
    ):
        scores.append(target_scores[:count])
        queries.append(target_queries[:count])
        owners.append(target.expand(len(queries[-1])))
    if not queries:
        return served, served
    order = torch.cat(scores).argsort()
    return torch.cat(queries)[order], torch.cat(owners)[order]


def published_one_to_one(inputs: Inputs) -> Pairs:
    """One layer after the other; costs are of all predictions for the targets of all images."""
    repeated = [
        (labels.repeat(inputs.copies), boxes.repeat(inputs.copies, 1))
        for labels, boxes in inputs.image_targets
    ]
    labels, target_boxes = (torch.cat(parts) for parts in zip(*repeated, strict=True))
    counts = [len(image_labels) for image_labels, _ in repeated]
    pairs = []
    for logits, boxes in zip(inputs.logits, inputs.boxes, strict=True):
        probability, boxes = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
        positive = (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
        negative = probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
        class_cost = (FOCAL_ALPHA * positive)[:, labels] - ((1 - FOCAL_ALPHA) * negative)[:, labels]
        l1 = torch.cdist(boxes, target_boxes, p=1)
        giou = pairwise_generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        cost = CONFIG.cost_bbox * l1 + inputs.cost_class * class_cost - CONFIG.cost_giou * giou
        of_images = cost.unflatten(0, (len(counts), -1)).cpu().split(counts, dim=-1)
        pairs.append([solve(images[image]) for image, images in enumerate(of_images)])
    return pairs


def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the cheapest pairs in costs [Q, T] on the CPU, by SciPy."""
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)
