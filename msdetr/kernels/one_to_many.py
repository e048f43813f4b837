"""One-to-many assignment in three launches, whatever the number of layers, images and targets.

1. `score_kernel`: a block of queries of one layer and image against the targets that exist: scores
   [N, B, T, Q], and each query's best target. Of the logits only the classes of present targets
   are read.
2. `best_queries_kernel`: one target: its k best queries, by k passes over its row of scores.
3. `select_kernel`: one layer and image: which queries are positive, the draw among them by
   priority where there are too many, how many each target keeps, and with that which of its best
   queries it takes.

The draw needs the `limit` lowest priorities of a set: their threshold is found by bisection over
the 32 bits of the number's ordered integer, each step one count. Arithmetic is float32 without
fused multiply-add, and quotients are rounded as IEEE asks, so that a score that reaches the
threshold exactly does so here and in PyTorch alike. Ties go to the lowest index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.box_overlap import intersection_and_union, is_finite, load_corners, quotient

_BLOCK = 128


@triton.jit
def score_kernel(
    logits_ptr,  # [N, B, Q, K]
    boxes_ptr,  # [N, B, Q, 4]
    labels_ptr,  # [B, T]
    target_boxes_ptr,  # [B, T, 4]
    count_ptr,  # [B]
    score_ptr,  # [N, B, T, Q] float32
    best_score_ptr,  # [N, B, Q] float32
    best_target_ptr,  # [N, B, Q] int32
    batch,
    num_queries,
    num_targets,
    num_classes,
    cost_box,
    cost_class,
    WORST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of pairs, and the best target of each query."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer_image = tl.program_id(1).to(tl.int64)
    image = layer_image % batch
    exists = query < num_queries
    row = layer_image * num_queries + query
    x0, y0, x1, y1 = load_corners(boxes_ptr + row * 4, exists)
    # Maxima and minima do not pass NaN on.
    broken = (x0 != x0) | (y0 != y0) | (x1 != x1) | (y1 != y1)
    score_ptr += layer_image * num_targets * num_queries + query
    best_score = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_target = tl.zeros((BLOCK,), tl.int32)
    target = tl.zeros((), tl.int32)
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    while target < count:
        slot = image * num_targets + target
        tx0, ty0, tx1, ty1 = load_corners(target_boxes_ptr + slot * 4, True)
        intersection, union = intersection_and_union(x0, y0, x1, y1, tx0, ty0, tx1, ty1)
        label = tl.load(labels_ptr + slot)
        label = tl.minimum(tl.maximum(label, 0), num_classes - 1)
        logit = tl.load(logits_ptr + row * num_classes + label, mask=exists, other=0.0)
        probability = tl.div_rn(1.0, 1.0 + tl.exp(-logit.to(tl.float32)))
        score = cost_box * quotient(intersection, union) + cost_class * probability
        score = tl.where(is_finite(score) & (broken == 0), score, WORST)
        tl.store(score_ptr + target.to(tl.int64) * num_queries, score, mask=exists)
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_target = tl.where(better, target, best_target)
        target += 1
    tl.store(best_score_ptr + row, best_score, mask=exists)
    tl.store(best_target_ptr + row, best_target, mask=exists)


@triton.jit
def best_queries_kernel(
    score_ptr,  # [N, B, T, Q]
    count_ptr,  # [B]
    query_ptr,  # [N, B, T, k] int64
    top_score_ptr,  # [N, B, T, k] float32
    batch,
    num_queries,
    num_targets,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # all queries
):
    """The K best queries of a target, best first."""
    target = tl.program_id(0)
    layer_image = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr + layer_image % batch).to(tl.int32)
    if target < count:
        query = tl.arange(0, BLOCK)
        exists = query < num_queries
        row = layer_image * num_targets + target
        score = tl.load(score_ptr + row * num_queries + query, mask=exists, other=-float("inf"))
        for place in tl.static_range(K):
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(query_ptr + row * K + place, index.to(tl.int64))
            tl.store(top_score_ptr + row * K + place, best)
            score = tl.where(query == index, -float("inf"), score)


@triton.jit
def select_kernel(
    best_score_ptr,  # [N, B, Q]
    best_target_ptr,  # [N, B, Q]
    priority_ptr,  # [N or 1, B, Q]
    count_ptr,  # [B]
    query_ptr,  # [N, B, T, k] int64, in and out
    top_score_ptr,  # [N, B, T, k] float32, in and out
    mask_ptr,  # [N, B, T, k] bool
    batch,
    num_queries,
    num_targets,
    limit,
    threshold,
    stride_priority_layer,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,  # all queries
):
    """Positive queries, the draw among them, and what each target takes."""
    layer_image = tl.program_id(0).to(tl.int64)
    image = layer_image % batch
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    query = tl.arange(0, BLOCK)
    exists = query < num_queries
    row = layer_image * num_queries
    best_score = tl.load(best_score_ptr + row + query, mask=exists, other=-float("inf"))
    best_target = tl.load(best_target_ptr + row + query, mask=exists, other=-1)
    query_ptr += layer_image * num_targets * K
    top_score_ptr += layer_image * num_targets * K
    mask_ptr += layer_image * num_targets * K

    positive = best_score >= threshold
    target = tl.zeros((), tl.int32)
    while target < count:
        positive = positive | (query == tl.load(query_ptr + target * K))
        target += 1
    positive = positive & exists & (count > 0)

    if tl.sum(positive.to(tl.int32), 0) > limit:
        priority_ptr += layer_image // batch * stride_priority_layer + image * num_queries
        priority = tl.load(priority_ptr + query, mask=exists, other=0.0) + 0.0  # no negative zero
        bits = priority.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # ordered as the numbers are
        low = tl.full((), -2147483648, tl.int64)
        high = tl.full((), 2147483647, tl.int64)
        while low < high:  # the least key that `limit` positives do not exceed
            middle = (low + high) >> 1
            enough = tl.sum((positive & (key <= middle)).to(tl.int32), 0) >= limit
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        below = positive & (key < low)
        ties = positive & (key == low)
        place = tl.cumsum(ties.to(tl.int32), 0)
        left = limit - tl.sum(below.to(tl.int32), 0)
        positive = below | (ties & (place <= left))

    place = tl.arange(0, PADDED_K)
    in_row = place < K
    target = tl.zeros((), tl.int32)
    while target < num_targets:
        kept = tl.sum((positive & (best_target == target)).to(tl.int32), 0)
        kept = tl.where(target < count, kept, 0)
        taken = in_row & (place < kept)
        top = tl.load(query_ptr + target * K + place, mask=taken, other=0)
        score = tl.load(top_score_ptr + target * K + place, mask=taken, other=-float("inf"))
        tl.store(query_ptr + target * K + place, top, mask=in_row)
        tl.store(top_score_ptr + target * K + place, score, mask=in_row)
        tl.store(mask_ptr + target * K + place, taken, mask=in_row)
        target += 1


def one_to_many(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    limit: int,
    cost_box: float,
    cost_class: float,
    worst: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [N, B, T, k] int64, mask and score of the pairs; all arguments contiguous.

    `priority` is [N, B, Q] or [B, Q]; `limit` is the most positives of an image.
    """
    layers, batch, queries, classes = logits.shape
    slots = labels.shape[1]
    device = logits.device
    query_index = torch.empty(layers, batch, slots, k, dtype=torch.int64, device=device)
    mask = torch.empty(layers, batch, slots, k, dtype=torch.bool, device=device)
    top_score = torch.empty(layers, batch, slots, k, dtype=torch.float32, device=device)
    if not query_index.numel():
        return query_index, mask, top_score
    score = torch.empty(layers, batch, slots, queries, dtype=torch.float32, device=device)
    best_score = torch.empty(layers, batch, queries, dtype=torch.float32, device=device)
    best_target = torch.empty(layers, batch, queries, dtype=torch.int32, device=device)
    block = max(triton.next_power_of_2(queries), 32)
    num_warps = max(1, min(block // 128, 16))
    problems = layers * batch
    score_kernel[(triton.cdiv(queries, _BLOCK), problems)](
        logits,
        boxes,
        labels,
        target_boxes,
        count,
        score,
        best_score,
        best_target,
        batch,
        queries,
        slots,
        classes,
        float(cost_box),
        float(cost_class),
        WORST=worst,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    best_queries_kernel[(slots, problems)](
        score,
        count,
        query_index,
        top_score,
        batch,
        queries,
        slots,
        K=k,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    select_kernel[(problems,)](
        best_score,
        best_target,
        priority,
        count,
        query_index,
        top_score,
        mask,
        batch,
        queries,
        slots,
        limit,
        float(threshold),
        batch * queries if priority.ndim == 3 else 0,
        K=k,
        PADDED_K=triton.next_power_of_2(k),
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return query_index, mask, top_score
