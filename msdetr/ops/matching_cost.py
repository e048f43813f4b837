"""Cost of matching predictions with targets (DETR, eq. 2; focal class cost of Deformable DETR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdetr.boxes import at_least_float32, cxcywh_to_xyxy, pairwise_generalized_iou
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.registration import register_op
from msdetr.structures import Targets

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
WORST_COST = 1e6
"""Replaces costs that are not finite, so that a solver ranks these pairs last."""


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    class_agnostic: bool = False,
    giou_eps: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Cost of every prediction for every target of its own image, all layers at once.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots; the costs of empty slots are arbitrary.
        cost_class: weight of the focal class cost; if it is 0, the logits are not read.
        cost_bbox: weight of the L1 distance.
        cost_giou: weight of the negative GIoU.
        class_agnostic: treat all targets as class 0, whatever their labels.
        giou_eps: added to both denominators of GIoU; see `msdetr.boxes.generalized_box_iou`.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        [N, B, Q, T], float32 at least, always finite. The kernel returns a view of [N, B, T, Q]:
        the costs of a target are contiguous.

    Raises:
        NotImplementedError: `impl` is "triton" and the boxes are float64.
    """
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    if resolve_impl("matching_cost", impl, boxes.device, unsupported) == "triton":
        cost: Tensor = torch.ops.msdetr.matching_cost(
            logits.detach(),
            boxes.detach(),
            None if class_agnostic else targets.labels,
            targets.boxes,
            targets.count,
            cost_class,
            cost_bbox,
            cost_giou,
            giou_eps,
        )
        return cost.transpose(2, 3)
    boxes = at_least_float32(boxes)
    target_boxes = targets.boxes.to(boxes.dtype)
    l1 = sum(
        (boxes[..., :, None, side] - target_boxes[:, None, :, side]).abs() for side in range(4)
    )
    giou = pairwise_generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes), giou_eps)
    cost = cost_bbox * l1 - cost_giou * giou
    if cost_class:
        labels = torch.zeros_like(targets.labels) if class_agnostic else targets.labels
        index = labels[None, :, None].expand(*logits.shape[:3], -1)
        cost = cost + cost_class * _focal_cost(at_least_float32(logits.gather(3, index)))
    return torch.nan_to_num(cost, nan=WORST_COST, posinf=WORST_COST, neginf=WORST_COST)


def _focal_cost(logits: Tensor) -> Tensor:
    probability = logits.sigmoid()
    positive = (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
    negative = probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
    return FOCAL_ALPHA * positive - (1 - FOCAL_ALPHA) * negative


def _kernel(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor | None,
    target_boxes: Tensor,
    count: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    giou_eps: float,
) -> Tensor:
    from msdetr.kernels import matching_cost as kernel

    return kernel.matching_cost(
        logits,
        boxes,
        None if labels is None else labels.contiguous(),
        target_boxes.contiguous(),
        count.contiguous(),
        cost_class=cost_class,
        cost_bbox=cost_bbox,
        cost_giou=cost_giou,
        giou_eps=giou_eps,
        alpha=FOCAL_ALPHA,
        worst=WORST_COST,
    )


def _fake(
    logits: Tensor, boxes: Tensor, labels: Tensor | None, target_boxes: Tensor, *rest: Any
) -> Tensor:
    layers, batch, queries, _ = boxes.shape
    return boxes.new_empty((layers, batch, target_boxes.shape[1], queries), dtype=torch.float32)


register_op(
    "matching_cost(Tensor logits, Tensor boxes, Tensor? labels, Tensor target_boxes, Tensor count, "
    "float cost_class, float cost_bbox, float cost_giou, float giou_eps) -> Tensor",
    _kernel,
    fake=_fake,
)
