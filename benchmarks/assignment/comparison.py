"""Compares an assignment with the reference's, up to ties."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.assignment.cases import CONFIG, Inputs
from benchmarks.assignment.implementations import IMPLEMENTATIONS, REFERENCE, Result, dense_cost
from msdetr.boxes import box_iou, cxcywh_to_xyxy


def taken_pairs(result: Result, inputs: Inputs) -> Tensor:
    """[N, B, T, Q] bool on the CPU, the pairs of a result."""
    layers, batch, queries, _ = inputs.logits.shape
    slots = inputs.targets.labels.shape[1]
    taken = torch.zeros(layers, batch, slots, queries, dtype=torch.bool)
    if isinstance(result, list):
        for layer, images in enumerate(result):
            for image, (query, target) in enumerate(images):
                target = target.cpu() % max(len(inputs.image_targets[image][0]), 1)  # of copies
                taken[layer, image, target, query.cpu()] = True
        return taken
    query_index, mask = (x.cpu().view(layers, batch, slots, -1) for x in result[:2])
    places = torch.zeros(taken.shape, dtype=torch.int64)
    places.scatter_add_(3, query_index.clamp(min=0), mask.long())
    return places > 0


def pair_values(inputs: Inputs) -> Tensor:
    """[N, B, T, Q] float64, scores or costs."""
    exact = inputs._replace(logits=inputs.logits.double(), boxes=inputs.boxes.double())
    if inputs.task != "one_to_many":
        return dense_cost(exact, "reference").transpose(2, 3)
    boxes = cxcywh_to_xyxy(exact.boxes)[:, :, None]
    target_boxes = cxcywh_to_xyxy(exact.targets.boxes.double())[:, :, None]
    index = exact.targets.labels[None, :, None].expand(*exact.logits.shape[:3], -1)
    probability = exact.logits.gather(3, index).sigmoid().transpose(2, 3)
    return (
        CONFIG.one_to_many_iou_weight * box_iou(boxes, target_boxes)
        + CONFIG.one_to_many_class_score_weight * probability
    )


def find_difference(result: Result, inputs: Inputs) -> str | None:
    """How a result differs from the reference's beyond ties, or None."""
    expected = taken_pairs(IMPLEMENTATIONS[REFERENCE].runs[inputs.task](inputs), inputs)
    taken, values = taken_pairs(result, inputs), pair_values(inputs).cpu()
    if not torch.equal(taken.sum(3), expected.sum(3)):
        return "other numbers of queries per target"
    # Per target where the order of equals cannot matter elsewhere, else per problem.
    over = (3,) if inputs.task == "one_to_many" else (2, 3)
    total, wanted = ((values * pairs).sum(over) for pairs in (taken, expected))
    if not torch.allclose(total, wanted, rtol=1e-5, atol=1e-5):
        return f"values differ by up to {float((total - wanted).abs().max()):.2g}"
    if inputs.task != "one_to_many" and bool((taken.sum(2) > 1).any()):
        return "queries that serve several targets"
    return None
