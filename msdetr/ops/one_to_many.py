"""One-to-many assignment: several queries per target (MS-DETR, section 3.3; after DETA).

Every query goes to its best target if it scores well enough, every target keeps at least its best
query, and each target then takes as many of its best queries as went to it, k at most.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.boxes import SMALLEST_AREA, at_least_float32
from msdetr.ops.dispatch import Impl, register_kernel, resolve_impl
from msdetr.structures import Targets

WORST_SCORE = -1.0
"""Stands for a score that is not finite, below any score."""


_MAX_QUERIES = 16384  # A program of the kernel holds a row of scores.
_CHUNK_PAIRS = 2**19  # The reference's, on a CPU: 2 MiB per array, and few arrays at a time.
_VECTOR = 64  # A multiple of the elements that PyTorch computes at a time, on any CPU.

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "one_to_many(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor count, "
    "Tensor priority, int k, float threshold, int limit, float cost_box, float cost_class, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class OneToMany(NamedTuple):
    """Pairs of targets and queries; a query may serve several targets."""

    query_index: Tensor
    """[N, B, T, k] int64, best first; 0 where `mask` is False."""
    mask: Tensor
    """[N, B, T, k] bool"""
    score: Tensor
    """[N, B, T, k] score of the pair; -inf where `mask` is False."""
    best_target: Tensor
    """[N, B, Q] int64, of each query's pairs the target of the highest score, the lowest of equals;
    T where the query is in no pair."""
    best_class: Tensor
    """[N, B, Q] int64, the class of that target, -1 where there is none."""


class _Pairs(NamedTuple):
    """The first fields of `OneToMany`."""

    query_index: Tensor
    mask: Tensor
    score: Tensor


def one_to_many(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    positive_fraction: float,
    cost_box: float = 0.7,
    cost_class: float = 0.3,
    impl: Impl = "auto",
) -> OneToMany:
    """Assign queries to targets, for all layers and images at once.

    The score of a pair is `cost_box * IoU + cost_class * probability of the target's class`. A
    query is positive where its best score reaches `threshold`, or where it is the best query of
    some target. Of the positives of an image, the `int(positive_fraction * Q)` of lowest priority
    value are kept. A target with n kept queries takes the `min(n, k)` best of its whole score row:
    not necessarily the kept ones. Ties go to the lowest index.

    Args:
        logits: [N, B, Q, K]
        boxes: [N, B, Q, 4] cxcywh
        targets: T slots.
        priority: [N, B, Q] or [B, Q], random numbers in training.
        k: most queries per target.
        threshold: least score of a positive query.
        positive_fraction: share of the queries that may be kept.
        cost_box: weight of the IoU in the score.
        cost_class: weight of the class probability in the score.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        Pairs with k = min(k, Q) places per target.

    Raises:
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    queries = logits.shape[2]
    unsupported = None
    if boxes.dtype == torch.float64:
        unsupported = "the kernel computes in float32, got float64 boxes"
    elif queries > _MAX_QUERIES:
        unsupported = f"the kernel takes up to {_MAX_QUERIES} queries, got {queries}"
    found = torch.ops.msdetr.one_to_many(
        logits.detach(),
        boxes.detach(),
        *targets,
        priority,
        min(k, queries),
        threshold,
        int(positive_fraction * queries),
        cost_box,
        cost_class,
        resolve_impl("one_to_many", impl, boxes.device, unsupported),
    )
    return OneToMany(*found)


def _reference(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    *,
    k: int,
    threshold: float,
    limit: int,
    cost_box: float,
    cost_class: float,
) -> _Pairs:
    """The pairs of `one_to_many` in PyTorch.

    Passes over all pairs are elementwise and in place where they can be: reductions that give
    indices, comparisons that give booleans and fresh memory cost most.
    """
    num_layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    if not num_layers * batch * slots:
        nothing = torch.zeros(num_layers, batch, slots, k, dtype=torch.int64, device=logits.device)
        return _Pairs(nothing, nothing.bool(), nothing.to(at_least_float32(boxes).dtype))

    # From here, P = N * B problems.
    logits = logits.flatten(0, 1)
    planes = _corners_and_area(boxes.flatten(0, 1))[:, :, None]  # [5, P, 1, Q]
    target_planes = _corners_and_area(targets.boxes.to(planes.dtype))[..., None]
    target_planes = target_planes.repeat(1, num_layers, 1, 1)  # [5, P, T, 1]
    labels, mask = targets.labels.repeat(num_layers, 1), targets.mask.repeat(num_layers, 1)
    found = []
    for chunk in _chunks(len(logits), slots * queries, logits.device):
        iou = _iou(planes[:, chunk], target_planes[:, chunk])
        score = _score(iou, logits[chunk], labels[chunk], mask[chunk], cost_box, cost_class)
        found.append((*_first_max(score), *_top_k_(score, k)))
    best_score, best_target, top_score, top_query = (
        torch.cat(parts) for parts in zip(*found, strict=True)
    )

    # An empty slot's best query means nothing; it must not become positive.
    is_best = torch.zeros_like(best_target).scatter_add_(1, top_query[..., 0], mask.long())
    positive = (best_score >= threshold) | (is_best > 0)
    priority = priority.expand(num_layers, batch, queries).flatten(0, 1)
    kept = positive & _lowest(priority, positive, limit)

    count = torch.zeros_like(labels).scatter_add_(1, best_target, kept.long())  # [P, T]
    taken = (torch.arange(k, device=count.device) < count[..., None]) & mask[..., None]
    pairs = top_query.masked_fill(~taken, 0), taken, top_score.masked_fill(~taken, -math.inf)
    return _Pairs(*(field.unflatten(0, (num_layers, batch)) for field in pairs))


def _chunks(problems: int, pairs: int, device: torch.device) -> list[slice]:
    """Problems of `pairs` pairs each, so many at a time that a CPU's caches hold their scores; all
    at once on other devices."""
    if device.type != "cpu":
        return [slice(0, problems)]
    # Whole vectors: PyTorch's sigmoid may round differently in what is left over at the end.
    multiple = _VECTOR // math.gcd(_VECTOR, pairs)
    size = multiple * max(1, round(_CHUNK_PAIRS / (multiple * pairs)))
    return [slice(begin, begin + size) for begin in range(0, problems, size)]


def _corners_and_area(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] cxcywh to x0, y0, x1, y1 and area, [5, ...]."""
    center, size = at_least_float32(boxes).movedim(-1, 0).contiguous().split(2)
    corners = torch.cat((center - 0.5 * size, center + 0.5 * size))
    width, height = corners[2:] - corners[:2]
    # A box whose area is not a number overlaps nothing, or has coordinates that are not numbers.
    area = (width * height).nan_to_num_(1.0, math.inf, -math.inf)
    return torch.cat((corners, area[None]))


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """`msdetr.boxes.box_iou` by coordinate and in place, without temporaries [..., 4]."""
    width = torch.minimum(a[2], b[2]).sub_(torch.maximum(a[0], b[0])).clamp_(min=0)
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (a[4] + b[4]).sub_(intersection)
    return intersection.div_(torch.threshold_(union, SMALLEST_AREA, 1.0))


def _best_of_queries(pairs: _Pairs, targets: Targets, num_queries: int) -> tuple[Tensor, Tensor]:
    """`best_target` and `best_class` of `OneToMany`."""
    num_layers, batch, slots, _ = pairs.query_index.shape
    query, score = pairs.query_index.flatten(2), pairs.score.flatten(2)
    best = score.new_full((num_layers, batch, num_queries), float("-inf"))
    best.scatter_reduce_(2, query, score, "amax")
    wins = (score > float("-inf")) & (score == best.gather(2, query))
    slot = torch.arange(slots, device=score.device)[:, None].expand_as(pairs.query_index)
    target = query.new_full(best.shape, slots)
    target.scatter_reduce_(2, query, torch.where(wins, slot.flatten(2), slots), "amin")
    labels = torch.cat((targets.labels, targets.labels.new_full((batch, 1), -1)), dim=1)
    return target, labels.expand(num_layers, -1, -1).gather(2, target)


def _score(
    iou: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, cost_box: float, cost_class: float
) -> Tensor:
    """[P, T, Q] from the IoU, which it overwrites, and logits [P, Q, K]; -inf in empty slots."""
    index = labels[:, None].expand(-1, logits.shape[1], -1)
    probability = at_least_float32(logits.gather(2, index)).sigmoid_()  # [P, Q, T]
    score = iou.mul_(cost_box) + probability.mul_(cost_class).transpose(1, 2)
    score = score.nan_to_num_(WORST_SCORE, WORST_SCORE, WORST_SCORE)
    return score.clamp_(max=torch.where(mask, math.inf, -math.inf)[..., None])


def _first_max(score: Tensor) -> tuple[Tensor, Tensor]:
    """`score.max(dim=1)` of scores [P, T, Q], the first of equals, several times faster."""
    slots = score.shape[1]
    best = score.amax(dim=1, keepdim=True)
    from_end = torch.arange(slots, 0, -1, dtype=score.dtype, device=score.device)[:, None]
    first = slots - score.clone().eq_(best).mul_(from_end).amax(dim=1)
    return best[:, 0], first.long()


def _top_k_(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row of [P, T, Q] and their queries, equals by index.

    `torch.topk` promises no order among equals. Here the queries stand in groups, and the best of
    each group is kept up to date: the next best query is the first best of the first best group.
    Overwrites the scores.
    """
    problems, slots, queries = score.shape
    size = max(size for size in range(1, math.isqrt(queries) + 1) if queries % size == 0)
    score = score.view(-1, queries)
    # Several times faster than `amax` over short rows.
    groups = torch.max_pool1d(score, size, size)  # [P * T, Q / size]
    members = torch.arange(size, device=score.device)
    scores, indices = [], []
    for place in range(k):
        best, group = groups.max(dim=1, keepdim=True)
        index = group * size + members
        group_scores = score.gather(1, index)
        member = group_scores.argmax(dim=1, keepdim=True)
        scores.append(best)
        indices.append(group * size + member)
        if place == k - 1:
            break
        group_scores.scatter_(1, member, -math.inf)
        score.scatter_(1, indices[-1], -math.inf)
        groups.scatter_(1, group, group_scores.amax(dim=1, keepdim=True))
    shape = (problems, slots, k)
    return torch.cat(scores, dim=1).view(shape), torch.cat(indices, dim=1).view(shape)


def _lowest(priority: Tensor, among: Tensor, limit: int) -> Tensor:
    """[P, Q] bool, True for the `limit` lowest priorities of those in `among`, equals by index."""
    if limit >= priority.shape[-1]:
        return among
    if limit <= 0:
        return torch.zeros_like(among)
    priority = at_least_float32(priority).masked_fill(~among, math.inf)
    highest = priority.topk(limit, largest=False, sorted=False).values.amax(-1, keepdim=True)
    lower, equal = priority < highest, priority == highest
    return lower | (equal & (equal.cumsum(-1) <= limit - lower.sum(-1, keepdim=True)))


def _assign(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    priority: Tensor,
    k: int,
    threshold: float,
    limit: int,
    cost_box: float,
    cost_class: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        targets = Targets(labels, target_boxes, count)
        pairs = _reference(
            logits,
            boxes,
            targets,
            priority,
            k=k,
            threshold=threshold,
            limit=limit,
            cost_box=cost_box,
            cost_class=cost_class,
        )
        return *pairs, *_best_of_queries(pairs, targets, logits.shape[2])
    from msdetr.kernels import one_to_many as kernel

    return kernel.one_to_many(
        logits,
        boxes,
        labels.contiguous(),
        target_boxes.contiguous(),
        count.contiguous(),
        priority,
        k=k,
        threshold=threshold,
        limit=limit,
        cost_box=cost_box,
        cost_class=cost_class,
        worst=WORST_SCORE,
    )


def _fake(
    logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = rest[3]
    pairs = (*logits.shape[:2], labels.shape[1], k)
    return (
        logits.new_empty(pairs, dtype=torch.int64),
        logits.new_empty(pairs, dtype=torch.bool),
        logits.new_empty(pairs, dtype=torch.promote_types(boxes.dtype, torch.float32)),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
        logits.new_empty(logits.shape[:3], dtype=torch.int64),
    )


# An operator for either implementation: compiled code takes the reference as it is, too. Its many
# small operations on a CPU are slower where they are compiled, and take long to compile.
register_kernel(_LIBRARY, "one_to_many", _assign)
torch.library.register_fake("msdetr::one_to_many", _fake, lib=_LIBRARY)
