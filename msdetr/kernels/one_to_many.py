"""One-to-many assignment in three launches, for any number of layers, images and targets.

1. `score_kernel`: a program takes a block of queries of one layer and image and loops over the
   valid targets. It writes scores [N, B, T, Q] and the best target of each query. Of the logits, it
   reads only the classes of these targets.
2. `best_queries_kernel`: a program takes one target and finds its k best queries by k passes over
   its row of scores. The first of them is positive whatever its score: its best score is set to
   infinity.
3. `select_kernel`: a program takes one layer and image. It finds the positive queries, keeps those
   of the lowest priorities if there are too many, counts the kept queries of each target, and
   writes which of its best queries each target takes, and the class of each query.

To keep the `limit` lowest priorities of a set, the highest of them is found by bisection over the
32 bits of its ordered integer; each step is one count. Relaxed integer atomics of one program count
the kept queries and select the best pair of each query. Here a pair is an integer: the score is its
upper half, the negated target its lower half. The order of atomics does not affect the result.

Arithmetic is float32 without fused multiply-add, with quotients rounded as IEEE requires, so that a
score that equals the threshold does so in PyTorch too. Ties go to the lowest index. Every element
of the results is written by the kernels.

Traffic. Scores are written once and read once; everything else is small.
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
_PAIRS = 512
_NO_PAIR = tl.constexpr(-(2**63))
_LOW_BITS = tl.constexpr(2147483647)


@triton.jit
def _ordered(x):
    """int32 numbers in the order of float32 numbers."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
    pair_ptr,  # [N, B, Q] int64, initialised: no pair
    batch,
    num_queries,
    num_targets,
    num_classes,
    iou_weight,
    class_weight,
    stride_ln,
    stride_lb,
    stride_lq,
    stride_lk,
    stride_bn,
    stride_bb,
    stride_bq,
    stride_bc,
    WORST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of pairs, and the best target of each query."""
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
    # Maximum and minimum do not propagate NaN.
    broken = (x0 != x0) | (y0 != y0) | (x1 != x1) | (y1 != y1)
    score_ptr += layer_image * num_targets * num_queries + query
    best_score = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_target = tl.zeros((BLOCK,), tl.int32)
    target = tl.zeros((), tl.int32)
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    while target < count:
        slot = image * num_targets + target
        tx, ty, target_width, target_height = load_box(target_boxes_ptr + slot * 4, 1, True)
        tx0, ty0, tx1, ty1 = to_corners(tx, ty, target_width, target_height)
        intersection, union = intersection_and_union(x0, y0, x1, y1, tx0, ty0, tx1, ty1)
        label = tl.load(labels_ptr + slot)
        label = tl.minimum(tl.maximum(label, 0), num_classes - 1)
        logit = tl.load(logits_ptr + label * stride_lk, mask=exists, other=0.0)
        probability = tl.div_rn(1.0, 1.0 + tl.exp(-logit.to(tl.float32)))
        score = iou_weight * quotient(intersection, union) + class_weight * probability
        score = tl.where(is_finite(score) & (broken == 0), score, WORST)
        tl.store(score_ptr + target.to(tl.int64) * num_queries, score, mask=exists)
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_target = tl.where(better, target, best_target)
        target += 1
    row = layer_image * num_queries + query
    tl.store(best_score_ptr + row, best_score, mask=exists)
    tl.store(best_target_ptr + row, best_target, mask=exists)
    tl.store(pair_ptr + row, tl.full((BLOCK,), _NO_PAIR, tl.int64), mask=exists)


@triton.jit
def best_queries_kernel(
    score_ptr,  # [N, B, T, Q]
    best_score_ptr,  # [N, B, Q] float32
    count_ptr,  # [B]
    query_ptr,  # [N, B, T, k] int64
    top_score_ptr,  # [N, B, T, k] float32
    kept_ptr,  # [N, B, T] int32, initialised: 0
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
    row = layer_image * num_targets + target
    tl.store(kept_ptr + row, 0)
    if target < count:
        query = tl.arange(0, BLOCK)
        exists = query < num_queries
        score = tl.load(score_ptr + row * num_queries + query, mask=exists, other=-float("inf"))
        for place in tl.static_range(K):
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(query_ptr + row * K + place, index.to(tl.int64))
            tl.store(top_score_ptr + row * K + place, best)
            if place == 0:
                tl.store(best_score_ptr + layer_image * num_queries + index, float("inf"))
            score = tl.where(query == index, -float("inf"), score)


@triton.jit
def select_kernel(
    best_score_ptr,  # [N, B, Q]
    best_target_ptr,  # [N, B, Q]
    priority_ptr,  # [N, B, Q]
    count_ptr,  # [B]
    labels_ptr,  # [B, T]
    kept_ptr,  # [N, B, T] int32, zero
    query_ptr,  # [N, B, T, k] int64, in and out
    top_score_ptr,  # [N, B, T, k] float32, in and out
    mask_ptr,  # [N, B, T, k] bool
    pair_ptr,  # [N, B, Q] int64: in, no pair; out, the target of the best pair, T if none
    class_ptr,  # [N, B, Q] int64: the class of that target, -1 if none
    batch,
    num_queries,
    num_targets,
    limit,
    threshold,
    stride_pn,
    stride_pb,
    stride_pq,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TARGETS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # all queries
):
    """Select positive queries, the queries of each target, and the class of each query."""
    layer_image = tl.program_id(0).to(tl.int64)
    layer = layer_image // batch
    image = layer_image % batch
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    query = tl.arange(0, BLOCK)
    exists = query < num_queries
    row = layer_image * num_queries + query
    best_score = tl.load(best_score_ptr + row, mask=exists, other=-float("inf"))
    positive = exists & (best_score >= threshold)

    if tl.sum(positive.to(tl.int32), 0) > limit:
        offset = layer * stride_pn + image * stride_pb + query.to(tl.int64) * stride_pq
        priority = tl.load(priority_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        key = _ordered(priority).to(tl.int64)
        low = tl.full((), -2147483648, tl.int64)
        high = tl.full((), 2147483647, tl.int64)
        while low < high:  # the lowest key that at least `limit` positives do not exceed
            middle = (low + high) >> 1
            enough = tl.sum((positive & (key <= middle)).to(tl.int32), 0) >= limit
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        below = positive & (key < low)
        ties = positive & (key == low)
        place = tl.cumsum(ties.to(tl.int32), 0)
        left = limit - tl.sum(below.to(tl.int32), 0)
        positive = below | (ties & (place <= left))

    kept_ptr += layer_image * num_targets
    best_target = tl.load(best_target_ptr + row, mask=exists, other=0)
    positive = positive & (best_target < count)  # none without targets
    tl.atomic_add(kept_ptr + best_target, 1, mask=positive, sem="relaxed")
    tl.debug_barrier()

    place = tl.arange(0, PADDED_K)[None, :]
    first = tl.zeros((), tl.int32)
    while first < num_targets:
        target = first + tl.arange(0, TARGETS)[:, None]
        kept = tl.load(kept_ptr + target, mask=target < count, other=0)
        stored = (target < num_targets) & (place < K)
        taken = stored & (place < kept)
        offset = (layer_image * num_targets + target) * K + place
        top = tl.load(query_ptr + offset, mask=taken, other=0)
        score = tl.load(top_score_ptr + offset, mask=taken, other=-float("inf"))
        tl.store(query_ptr + offset, top, mask=stored)
        tl.store(top_score_ptr + offset, score, mask=stored)
        tl.store(mask_ptr + offset, taken, mask=stored)
        pair = (_ordered(score).to(tl.int64) << 32) | (target ^ _LOW_BITS).to(tl.int64)
        tl.atomic_max(pair_ptr + layer_image * num_queries + top, pair, mask=taken, sem="relaxed")
        first += TARGETS
    tl.debug_barrier()

    pair = tl.load(pair_ptr + row, mask=exists, other=_NO_PAIR)
    has = pair != _NO_PAIR
    target = tl.where(has, (pair ^ _LOW_BITS) & _LOW_BITS, num_targets)
    label = tl.load(labels_ptr + image * num_targets + target, mask=has, other=-1)
    tl.store(pair_ptr + row, target, mask=exists)
    tl.store(class_ptr + row, label, mask=exists)


def one_to_many(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    worst: float,
    k: int,
    threshold: float,
    limit: int,
    iou_weight: float,
    class_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `msdetr.ops.one_to_many.OneToMany`.

    Tensors of targets are contiguous. `priority` is [N, B, Q] or [B, Q]; `limit` is the maximum
    number of positives of an image; `worst` replaces scores that are not finite.
    """
    layers, batch, queries, classes = logits.shape
    slots = labels.shape[1]
    query_index = logits.new_empty((layers, batch, slots, k), dtype=torch.int64)
    mask = torch.empty_like(query_index, dtype=torch.bool)
    top_score = torch.empty_like(query_index, dtype=torch.float32)
    target = logits.new_empty((layers, batch, queries), dtype=torch.int64)
    target_class = torch.empty_like(target)
    if not queries:
        return query_index, mask, top_score, target, target_class
    score = logits.new_empty((layers, batch, slots, queries), dtype=torch.float32)
    best_score = torch.empty_like(target, dtype=torch.float32)
    best_target = torch.empty_like(target, dtype=torch.int32)
    kept = logits.new_empty((layers, batch, slots), dtype=torch.int32)
    block = max(triton.next_power_of_2(queries), 32)
    num_warps = max(1, min(block // 128, 16))
    padded_k = triton.next_power_of_2(k)
    problems = layers * batch
    sizes = (batch, queries, slots)
    score_kernel[(triton.cdiv(queries, _BLOCK), problems)](
        logits,
        boxes,
        labels,
        target_boxes,
        count,
        score,
        best_score,
        best_target,
        target,
        *sizes,
        classes,
        float(iou_weight),
        float(class_weight),
        *logits.stride(),
        *boxes.stride(),
        WORST=worst,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    best_queries_kernel[(slots, problems)](
        score,
        best_score,
        count,
        query_index,
        top_score,
        kept,
        *sizes,
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
        labels,
        kept,
        query_index,
        top_score,
        mask,
        target,
        target_class,
        *sizes,
        limit,
        float(threshold),
        *priority.expand(layers, batch, queries).stride(),
        K=k,
        PADDED_K=padded_k,
        TARGETS=max(_PAIRS // padded_k, 1),
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return query_index, mask, top_score, target, target_class
