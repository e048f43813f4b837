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

from msdetr.kernels.box_overlap import (
    intersection_and_union,
    is_finite,
    load_box,
    quotient,
    to_corners,
)

_BLOCK = 128


@triton.jit
def matching_cost_kernel(
    logits_ptr,  # [N, B, Q, K]
    boxes_ptr,  # [N, B, Q, 4]
    labels_ptr,  # [B, T], or None: all targets have class 0
    target_boxes_ptr,  # [B, T, 4]
    count_ptr,  # [B]
    cost_ptr,  # [N, B, T, Q] float32
    batch,
    num_queries,
    num_targets,
    num_classes,
    cost_class,
    cost_bbox,
    cost_giou,
    stride_ln,
    stride_lb,
    stride_lq,
    stride_lk,
    stride_bn,
    stride_bb,
    stride_bq,
    stride_bc,
    ALPHA: tl.constexpr,
    WORST: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Focal class cost (gamma 2), L1 and GIoU."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer_image = tl.program_id(1).to(tl.int64)
    layer = layer_image // batch
    image = layer_image % batch
    exists = query < num_queries
    wide_query = query.to(tl.int64)
    logits_ptr += layer * stride_ln + image * stride_lb + wide_query * stride_lq
    boxes_ptr += layer * stride_bn + image * stride_bb + wide_query * stride_bq
    x, y, width, height = load_box(boxes_ptr, stride_bc, exists)
    x0, y0, x1, y1 = to_corners(x, y, width, height)
    cost_ptr += layer_image * num_targets * num_queries + query
    target = tl.zeros((), tl.int32)
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    while target < count:
        slot = image * num_targets + target
        tx, ty, target_width, target_height = load_box(target_boxes_ptr + slot * 4, 1, True)
        distance = tl.abs(x - tx) + tl.abs(y - ty)
        distance += tl.abs(width - target_width) + tl.abs(height - target_height)
        tx0, ty0, tx1, ty1 = to_corners(tx, ty, target_width, target_height)
        intersection, union = intersection_and_union(x0, y0, x1, y1, tx0, ty0, tx1, ty1)
        hull_width = tl.maximum(tl.maximum(x1, tx1) - tl.minimum(x0, tx0), 0.0)
        hull_height = tl.maximum(tl.maximum(y1, ty1) - tl.minimum(y0, ty0), 0.0)
        hull = hull_width * hull_height
        giou = quotient(intersection, union) - quotient(hull - union, hull)
        cost = cost_bbox * distance - cost_giou * giou
        if HAS_CLASS:
            label = tl.zeros((), tl.int64)
            if labels_ptr is not None:
                label = tl.load(labels_ptr + slot)
                label = tl.minimum(tl.maximum(label, 0), num_classes - 1)
            logit = tl.load(logits_ptr + label * stride_lk, mask=exists, other=0.0)
            p = 1.0 / (1.0 + tl.exp(-logit.to(tl.float32)))
            positive = (1.0 - p) * (1.0 - p) * -tl.log(p + 1e-8)
            negative = p * p * -tl.log(1.0 - p + 1e-8)
            cost += cost_class * (ALPHA * positive - (1.0 - ALPHA) * negative)
        cost = tl.where(is_finite(cost), cost, WORST)
        tl.store(cost_ptr + target.to(tl.int64) * num_queries, cost, mask=exists)
        target += 1
    while target < num_targets:
        tl.store(cost_ptr + target.to(tl.int64) * num_queries, query * 0.0, mask=exists)
        target += 1


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
        logits,
        boxes,
        labels,
        target_boxes,
        count,
        cost,
        batch,
        queries,
        slots,
        logits.shape[-1],
        float(cost_class),
        float(cost_bbox),
        float(cost_giou),
        *logits.stride(),
        *boxes.stride(),
        ALPHA=alpha,
        WORST=worst,
        HAS_CLASS=cost_class != 0,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return cost
