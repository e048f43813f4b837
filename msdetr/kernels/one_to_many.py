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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.box_overlap import intersection_and_union, is_finite, load_box, quotient
from msdetr.kernels.scene import load_logit, load_queries, scene_of

_BLOCK = 128
_PAIRS = 512
_NO_PAIR = tl.constexpr(-(2**63))
_LOW_BITS = tl.constexpr(2147483647)


class _Pairs(NamedTuple):
    """What a kernel finds for the next ones, and sizes; an argument of all three."""

    score: Any  # [N, B, T, Q] float32
    best_score: Any  # [N, B, Q] float32
    best_target: Any  # [N, B, Q] int32
    pair: Any  # [N, B, Q] int64: the best pair, then its target, T if none
    query: Any  # [N, B, T, k] int64
    top_score: Any  # [N, B, T, k] float32
    kept: Any  # [N, B, T] int32
    batch: Any
    num_queries: Any
    num_targets: Any


@triton.jit
def _ordered(x):
    """int32 numbers in the order of float32 numbers."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_kernel(scene, pairs, iou_weight, class_weight, WORST: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of pairs, and the best target of each query."""
    queries = load_queries(scene, BLOCK)
    a, exists = queries.box, queries.exists
    # Maximum and minimum do not propagate NaN.
    broken = (a.x0 != a.x0) | (a.y0 != a.y0) | (a.x1 != a.x1) | (a.y1 != a.y1)
    scores = queries.layer_image * scene.num_targets * scene.num_queries + queries.index
    score_ptr = pairs.score + scores
    best_score = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_target = tl.zeros((BLOCK,), tl.int32)
    target = tl.zeros((), tl.int32)
    while target < queries.count:
        b = load_box(scene.target_boxes + (queries.first_slot + target) * 4, 1, True)
        intersection, union = intersection_and_union(a, b)
        logit = load_logit(scene, queries, target)
        probability = tl.div_rn(1.0, 1.0 + tl.exp(-logit))
        score = iou_weight * quotient(intersection, union) + class_weight * probability
        score = tl.where(is_finite(score) & (broken == 0), score, WORST)
        tl.store(score_ptr, score, mask=exists)
        score_ptr += scene.num_queries
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_target = tl.where(better, target, best_target)
        target += 1
    row = queries.layer_image * scene.num_queries + queries.index
    tl.store(pairs.best_score + row, best_score, mask=exists)
    tl.store(pairs.best_target + row, best_target, mask=exists)
    tl.store(pairs.pair + row, _NO_PAIR, mask=exists)


@triton.jit
def best_queries_kernel(
    pairs,
    count_ptr,  # [B]
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # all queries
):
    """The K best queries of a target, best first."""
    target = tl.program_id(0)
    layer_image = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr + layer_image % pairs.batch).to(tl.int32)
    row = layer_image * pairs.num_targets + target
    tl.store(pairs.kept + row, 0)
    if target < count:
        query = tl.arange(0, BLOCK)
        scores = pairs.score + row * pairs.num_queries + query
        score = tl.load(scores, mask=query < pairs.num_queries, other=-float("inf"))
        for place in tl.static_range(K):
            best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(pairs.query + row * K + place, index.to(tl.int64))
            tl.store(pairs.top_score + row * K + place, best)
            if place == 0:
                # Targets may share their best query: their programs store the same value, in any
                # order, and the next launch reads it.
                best_score = pairs.best_score + layer_image * pairs.num_queries + index
                tl.store(best_score, float("inf"))
            score = tl.where(query == index, -float("inf"), score)


@triton.jit
def _lowest(positive, key, limit):
    """The `limit` positives of the lowest keys [BLOCK] int64, of equal keys the first ones."""
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
    return below | (ties & (place <= limit - tl.sum(below.to(tl.int32), 0)))


@triton.jit
def select_kernel(
    pairs,
    priority_ptr,  # [N, B, Q]
    stride_pn,
    stride_pb,
    stride_pq,
    count_ptr,  # [B]
    labels_ptr,  # [B, T]
    mask_ptr,  # [N, B, T, k] bool
    class_ptr,  # [N, B, Q] int64: the class of a query's best pair, -1 if none
    limit,
    threshold,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TARGETS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # all queries
):
    """Select positive queries, the queries of each target, and the class of each query."""
    layer_image = tl.program_id(0).to(tl.int64)
    layer = layer_image // pairs.batch
    image = layer_image % pairs.batch
    num_targets = pairs.num_targets
    count = tl.minimum(tl.load(count_ptr + image).to(tl.int32), num_targets)
    query = tl.arange(0, BLOCK)
    exists = query < pairs.num_queries
    row = layer_image * pairs.num_queries + query
    best_score = tl.load(pairs.best_score + row, mask=exists, other=-float("inf"))
    positive = exists & (best_score >= threshold)
    if tl.sum(positive.to(tl.int32), 0) > limit:
        offset = layer * stride_pn + image * stride_pb + query.to(tl.int64) * stride_pq
        priority = tl.load(priority_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        positive = _lowest(positive, _ordered(priority).to(tl.int64), limit)

    kept_ptr = pairs.kept + layer_image * num_targets
    best_target = tl.load(pairs.best_target + row, mask=exists, other=0)
    positive = positive & (best_target < count)  # none without targets
    tl.atomic_add(kept_ptr + best_target, 1, mask=positive, sem="relaxed")
    tl.debug_barrier()

    place = tl.arange(0, PADDED_K)[None, :]
    best_pairs = pairs.pair + layer_image * pairs.num_queries
    first = tl.zeros((), tl.int32)
    while first < num_targets:
        target = first + tl.arange(0, TARGETS)[:, None]
        kept = tl.load(kept_ptr + target, mask=target < count, other=0)
        stored = (target < num_targets) & (place < K)
        taken = stored & (place < kept)
        offset = (layer_image * num_targets + target) * K + place
        top = tl.load(pairs.query + offset, mask=taken, other=0)
        score = tl.load(pairs.top_score + offset, mask=taken, other=-float("inf"))
        tl.store(pairs.query + offset, top, mask=stored)
        tl.store(pairs.top_score + offset, score, mask=stored)
        tl.store(mask_ptr + offset, taken, mask=stored)
        pair = (_ordered(score).to(tl.int64) << 32) | (target ^ _LOW_BITS).to(tl.int64)
        tl.atomic_max(best_pairs + top, pair, mask=taken, sem="relaxed")
        first += TARGETS
    tl.debug_barrier()

    pair = tl.load(pairs.pair + row, mask=exists, other=_NO_PAIR)
    has = pair != _NO_PAIR
    target = tl.where(has, (pair ^ _LOW_BITS) & _LOW_BITS, num_targets)
    label = tl.load(labels_ptr + image * num_targets + target, mask=has, other=-1)
    tl.store(pairs.pair + row, target, mask=exists)
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
    layers, batch, queries, _ = logits.shape
    slots = labels.shape[1]
    query_index = logits.new_empty((layers, batch, slots, k), dtype=torch.int64)
    mask = torch.empty_like(query_index, dtype=torch.bool)
    top_score = torch.empty_like(query_index, dtype=torch.float32)
    target = logits.new_empty((layers, batch, queries), dtype=torch.int64)
    target_class = torch.empty_like(target)
    if not queries:
        return query_index, mask, top_score, target, target_class
    pairs = _Pairs(
        score=logits.new_empty((layers, batch, slots, queries), dtype=torch.float32),
        best_score=torch.empty_like(target, dtype=torch.float32),
        best_target=torch.empty_like(target, dtype=torch.int32),
        pair=target,
        query=query_index,
        top_score=top_score,
        kept=logits.new_empty((layers, batch, slots), dtype=torch.int32),
        batch=batch,
        num_queries=queries,
        num_targets=slots,
    )
    block = max(triton.next_power_of_2(queries), 32)
    padded_k = triton.next_power_of_2(k)
    launch = {
        "K": k,
        "BLOCK": block,
        "num_warps": max(1, min(block // 128, 16)),
        "enable_fp_fusion": False,
    }
    score_kernel[(triton.cdiv(queries, _BLOCK), layers * batch)](
        scene_of(logits, boxes, labels, target_boxes, count),
        pairs,
        float(iou_weight),
        float(class_weight),
        WORST=worst,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    best_queries_kernel[(slots, layers * batch)](pairs, count, **launch)
    select_kernel[(layers * batch,)](
        pairs,
        priority,
        *priority.expand(layers, batch, queries).stride(),
        count,
        labels,
        mask,
        target_class,
        limit,
        float(threshold),
        PADDED_K=padded_k,
        TARGETS=max(_PAIRS // padded_k, 1),
        **launch,
    )
    return query_index, mask, top_score, target, target_class
