"""Matching cost of every query and target of an image, the input of `linear_assignment`.

Maths. Focal class cost (gamma 2), L1 distance and negative GIoU of boxes, weighted; see
`msdetr.ops.matching_cost`.

Mapping. A program takes BLOCK queries of one layer and image, keeps their boxes in registers and
loops over the valid targets.

Traffic. Of the logits, only the classes of these targets are read. Costs are written once, in the
order [N, B, T, Q], so that the solver reads the costs of one target contiguously. Empty slots cost
0, so that every element is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.box_overlap import intersection_and_union, is_finite, load_box, quotient
from msdetr.kernels.scene import load_logit, load_queries, scene_of

_BLOCK = 128


@triton.jit
def matching_cost_kernel(
    scene,
    cost_ptr,  # [N, B, T, Q] float32
    cost_class,
    cost_bbox,
    cost_giou,
    GIOU_EPS: tl.constexpr,
    ALPHA: tl.constexpr,
    WORST: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Focal class cost (gamma 2), L1 and GIoU."""
    queries = load_queries(scene, BLOCK)
    a = queries.box
    cost_ptr += queries.layer_image * scene.num_targets * scene.num_queries + queries.index
    target = tl.zeros((), tl.int32)
    while target < queries.count:
        b = load_box(scene.target_boxes + (queries.first_slot + target) * 4, 1, True)
        distance = tl.abs(a.x - b.x) + tl.abs(a.y - b.y)
        distance += tl.abs(a.width - b.width) + tl.abs(a.height - b.height)
        intersection, union = intersection_and_union(a, b)
        hull = _hull(a, b)
        giou = quotient(intersection, union, GIOU_EPS)
        giou -= quotient(hull - union, hull, GIOU_EPS)
        cost = cost_bbox * distance - cost_giou * giou
        if HAS_CLASS:
            p = 1.0 / (1.0 + tl.exp(-load_logit(scene, queries, target)))
            positive = (1.0 - p) * (1.0 - p) * -tl.log(p + 1e-8)
            negative = p * p * -tl.log(1.0 - p + 1e-8)
            cost += cost_class * (ALPHA * positive - (1.0 - ALPHA) * negative)
        cost = tl.where(is_finite(cost), cost, WORST)
        tl.store(cost_ptr, cost, mask=queries.exists)
        cost_ptr += scene.num_queries
        target += 1
    target = queries.count
    while target < scene.num_targets:
        tl.store(cost_ptr, 0.0, mask=queries.exists)
        cost_ptr += scene.num_queries
        target += 1


@triton.jit
def _hull(a, b):
    """Area of the smallest box around two boxes."""
    width = tl.maximum(tl.maximum(a.x1, b.x1) - tl.minimum(a.x0, b.x0), 0.0)
    height = tl.maximum(tl.maximum(a.y1, b.y1) - tl.minimum(a.y0, b.y0), 0.0)
    return width * height


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor | None,
    target_boxes: Tensor,
    count: Tensor,
    *,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    giou_eps: float,
    alpha: float,
    worst: float,
) -> Tensor:
    """[N, B, T, Q] float32, zero in empty slots. Tensors of targets are contiguous.

    Without labels, all targets have class 0.
    """
    layers, batch, queries, _ = boxes.shape
    slots = target_boxes.shape[1]
    cost = boxes.new_empty((layers, batch, slots, queries), dtype=torch.float32)
    matching_cost_kernel[(triton.cdiv(queries, _BLOCK), layers * batch)](
        scene_of(logits, boxes, labels, target_boxes, count),
        cost,
        float(cost_class),
        float(cost_bbox),
        float(cost_giou),
        GIOU_EPS=float(giou_eps),
        ALPHA=alpha,
        WORST=worst,
        HAS_CLASS=cost_class != 0,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return cost
