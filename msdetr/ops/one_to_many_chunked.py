"""One-to-many assignment on a CPU: the pairs of the reference, several times faster.

Large problems are processed in chunks that stay in the caches of a CPU. Passes over all pairs are
elementwise and in place where possible, because reductions that return indices, comparisons that
return booleans, and fresh memory are the most expensive. Queries are ranked only as far as a target
needs, which the host may read here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msdetr.boxes import SMALLEST_AREA, at_least_float32
from msdetr.structures import Targets

_BLOCK_PAIRS = 2**21  # pairs whose scores are held at once (8 MiB)
_CHUNK_PAIRS = 2**19  # pairs per pass (2 MiB per array)
_VECTOR = 64  # a multiple of the vector length of PyTorch's loops, on every CPU


class Pairs(NamedTuple):
    """The first fields of `msdetr.ops.one_to_many.OneToMany`."""

    query_index: Tensor
    mask: Tensor
    score: Tensor


class _Problems(NamedTuple):
    """P problems: one per layer and image."""

    logits: Tensor
    """[P, Q, K]"""
    planes: Tensor
    """[5, P, 1, Q], corners and areas of the predicted boxes."""
    labels: Tensor
    """[P, T]"""
    target_planes: Tensor
    """[5, P, T, 1]"""
    mask: Tensor
    """[P, T], False in empty slots."""
    priority: Tensor
    """[P, Q]"""

    def chunk(self, index: slice) -> _Problems:
        """A slice of the problems."""
        return _Problems(
            self.logits[index],
            self.planes[:, index],
            self.labels[index],
            self.target_planes[:, index],
            self.mask[index],
            self.priority[index],
        )


def find_pairs(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    priority: Tensor,
    worst: float,
    k: int,
    threshold: float,
    limit: int,
    iou_weight: float,
    class_weight: float,
) -> Pairs:
    """The pairs of `msdetr.ops.one_to_many.one_to_many`, with `k` <= Q.

    `limit` is the maximum number of positives per image, `worst` replaces scores that are not
    finite.
    """
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    if not layers * batch * slots:
        empty = torch.zeros(layers, batch, slots, k, dtype=torch.int64)
        return Pairs(empty, empty.bool(), empty.to(at_least_float32(boxes).dtype))
    planes = _corners_and_area(boxes.flatten(0, 1))
    target_planes = _corners_and_area(targets.boxes.to(planes.dtype))
    problems = _Problems(
        logits.flatten(0, 1),
        planes[:, :, None],
        targets.labels.repeat(layers, 1),
        target_planes.repeat(1, layers, 1)[..., None],
        targets.mask.repeat(layers, 1),
        priority.expand(layers, batch, queries).flatten(0, 1),
    )
    results = [
        _assign(problems.chunk(block), k, threshold, limit, iou_weight, class_weight, worst)
        for block in _chunks(len(problems.logits), slots * queries, _BLOCK_PAIRS)
    ]
    fields = map(torch.cat, zip(*results, strict=True))
    return Pairs(*(field.unflatten(0, (layers, batch)) for field in fields))


def _chunks(problems: int, pairs: int, max_pairs: int) -> list[slice]:
    """Chunks of about `max_pairs` pairs, of problems of `pairs` pairs each."""
    # Whole vectors: PyTorch's sigmoid may round differently in the remainder of a vectorized loop.
    multiple = _VECTOR // math.gcd(_VECTOR, pairs)
    size = multiple * max(1, round(max_pairs / (multiple * pairs)))
    return [slice(begin, begin + size) for begin in range(0, problems, size)]


def _assign(
    problems: _Problems,
    k: int,
    threshold: float,
    limit: int,
    iou_weight: float,
    class_weight: float,
    worst: float,
) -> Pairs:
    """`Pairs` of shape [P, T, k]."""
    labels, mask = problems.labels, problems.mask
    score, best_score, best_target, groups = _scores(problems, iou_weight, class_weight, worst)
    begin = torch.arange(0, len(score), groups.shape[1])
    best = _best_of_rows(score, groups, begin)

    # The best query of an empty slot is arbitrary: it does not become positive.
    best_query = (best.place % best_score.shape[1]).view(mask.shape)
    is_best = torch.zeros_like(best_target).scatter_add_(1, best_query, mask.long())
    positive = (best_score >= threshold) | (is_best > 0)
    kept = positive & _lowest(problems.priority, positive, limit)

    count = torch.zeros_like(labels).scatter_add_(1, best_target, kept.long())  # [P, T]
    count = count * mask
    top_score, top_query = _top_k_(score, groups, best, count.flatten(), k)
    shape = (*mask.shape, k)
    taken = torch.arange(k) < count[..., None]
    return Pairs(
        top_query.view(shape).masked_fill(~taken, 0),
        taken,
        top_score.view(shape).masked_fill(~taken, -math.inf),
    )


def _scores(
    problems: _Problems, iou_weight: float, class_weight: float, worst: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of all pairs in G groups of adjacent queries [P * T * G, Q / G], best score and target
    of each query [P, Q], and best score of each target in each group [P * T, G]."""
    number, slots = problems.mask.shape
    queries = problems.priority.shape[1]
    size = max(size for size in range(1, math.isqrt(queries) + 1) if queries % size == 0)
    score = problems.planes.new_empty(number, slots, queries)
    results = []
    for index in _chunks(number, slots * queries, _CHUNK_PAIRS):
        _score(problems.chunk(index), iou_weight, class_weight, worst, out=score[index])
        # Several times faster than `amax` over short rows.
        groups = torch.max_pool1d(score[index].flatten(0, 1), size, size)
        results.append((*_first_max(score[index]), groups))
    best_score, best_target, groups = map(torch.cat, zip(*results, strict=True))
    return score.view(-1, size), best_score, best_target, groups


def _corners_and_area(boxes: Tensor) -> Tensor:
    """x0, y0, x1, y1 and area [5, P, M] of boxes [P, M, 4] cxcywh."""
    boxes = at_least_float32(boxes)
    center, size = boxes.movedim(-1, 0).split(2)
    planes = boxes.new_empty(5, *boxes.shape[:-1])
    torch.sub(center, size, alpha=0.5, out=planes[:2])
    torch.add(center, size, alpha=0.5, out=planes[2:4])
    width, height = planes[2:4] - planes[:2]
    # A box whose area is NaN has no overlap with any box, or has coordinates that are NaN.
    planes[4] = width.mul_(height).nan_to_num_(1.0, math.inf, -math.inf)
    return planes


def _iou(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`msdetr.boxes.box_iou` of planes [5, ...], in place and without temporaries [..., 4]."""
    width = torch.minimum(a[2], b[2], out=out).sub_(torch.maximum(a[0], b[0])).clamp_(min=0)
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (a[4] + b[4]).sub_(intersection)
    return intersection.div_(torch.threshold_(union, SMALLEST_AREA, 1.0))


def _score(
    problems: _Problems, iou_weight: float, class_weight: float, worst: float, out: Tensor
) -> None:
    """Write the scores [P, T, Q] to `out`; -inf in empty slots."""
    index = problems.labels[:, None].expand(-1, problems.logits.shape[1], -1)
    probability = at_least_float32(problems.logits.gather(2, index)).sigmoid_()  # [P, Q, T]
    score = _iou(problems.planes, problems.target_planes, out=out)
    score.mul_(iou_weight).add_(probability.mul_(class_weight).transpose(1, 2))
    score.nan_to_num_(worst, worst, worst)
    score.clamp_(max=torch.where(problems.mask, math.inf, -math.inf)[..., None])


def _first_max(score: Tensor) -> tuple[Tensor, Tensor]:
    """`score.max(dim=1)` of scores [P, T, Q], several times faster. Ties go to the first target."""
    slots = score.shape[1]
    best = score.amax(dim=1, keepdim=True)
    from_end = torch.arange(slots, 0, -1, dtype=score.dtype)[:, None]
    is_best = torch.eq(score, best, out=torch.empty_like(score))
    first = slots - is_best.mul_(from_end).amax(dim=1)
    return best[:, 0], first.long()


class _Best(NamedTuple):
    """The best score of each of M rows. Ties go to the first query."""

    score: Tensor
    """[M]"""
    group: Tensor
    """[M], index of its group in its row."""
    place: Tensor
    """[M], index into all scores."""


def _best_of_rows(score: Tensor, groups: Tensor, begin: Tensor) -> _Best:
    """Best scores of M of R rows of scores [R * G, S].

    `groups` [M, G] holds the best score of each group of these rows, `begin` [M] the index of their
    first group.
    """
    best, group = groups.max(dim=1)
    place = begin + group
    member = score.index_select(0, place).max(dim=1).indices  # `argmax` takes longer
    return _Best(best, group, place * score.shape[1] + member)


def _top_k_(
    score: Tensor, groups: Tensor, best: _Best, count: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k highest scores of each of R rows and their queries [R, k], given the best ones.

    Ties go to the first query; `torch.topk` does not guarantee any order of ties. The first
    `count` [R] places of a row are correct, the others are arbitrary. Scores are in groups
    [R * G, S] of adjacent queries, and the best score of each group [R, G] is updated: the next
    best query is the first best query of the first best group. Complete rows are skipped.
    Overwrites scores and groups.
    """
    num_rows, num_groups = groups.shape
    rows = torch.arange(num_rows)
    begin = rows * num_groups
    scores, places = (x[:, None].repeat(1, k) for x in (best.score, best.place))
    for rank in range(1, k):
        incomplete = (count > rank).nonzero()[:, 0]
        if not len(incomplete):
            break
        if len(incomplete) < 0.75 * len(rows):  # otherwise, selecting rows costs more than it saves
            rows, begin, groups, count = (x[incomplete] for x in (rows, begin, groups, count))
            best = _Best(*(x[incomplete] for x in best))
        score.view(-1).index_fill_(0, best.place, -math.inf)
        left = score.index_select(0, begin + best.group).max(dim=1, keepdim=True).values
        groups.scatter_(1, best.group[:, None], left)
        best = _best_of_rows(score, groups, begin)
        scores[:, rank].index_copy_(0, rows, best.score)
        places[:, rank].index_copy_(0, rows, best.place)
    return scores, places % (num_groups * score.shape[1])


def _lowest(priority: Tensor, among: Tensor, limit: int) -> Tensor:
    """[P, Q] bool, True for the `limit` lowest priorities of those in `among`, arbitrary outside of
    `among`. Ties go to the first query."""
    if limit >= priority.shape[-1]:
        return among
    if limit <= 0:
        return torch.zeros_like(among)
    priority = at_least_float32(priority)
    # Infinity outside, by arithmetic: `torch.where` takes many times as long.
    outside = among.to(priority.dtype).mul_(-2.0).add_(1.0).mul_(math.inf)
    priority = outside.clamp_(min=priority)
    # 0.4 of the time of `torch.topk`, and less of `torch.kthvalue`.
    highest = torch.from_numpy(
        np.partition(priority.numpy(), limit - 1, axis=1)[:, limit - 1, None]
    )
    lower, equal = priority < highest, priority == highest
    return lower | (equal & (equal.cumsum(-1) <= limit - lower.sum(-1, keepdim=True)))
