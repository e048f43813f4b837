"""One-to-many assignment in PyTorch: what the kernels are compared with, and what runs on a CPU.

Passes over all pairs are elementwise and in place where they can be: reductions that give indices,
comparisons that give booleans and fresh memory cost most. Large problems are taken in parts that
stay in a CPU's caches; what a CPU may read, like how many queries a target takes, saves work there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msdetr.boxes import SMALLEST_AREA, at_least_float32
from msdetr.structures import Targets

WORST_SCORE = -1.0
"""Stands for a score that is not finite, below any score."""

# On a CPU: pairs whose scores are held at once (8 MiB), and pairs per pass (2 MiB per array).
_BLOCK_PAIRS = 2**21
_CHUNK_PAIRS = 2**19
_VECTOR = 64  # A multiple of the elements that PyTorch computes at a time, on any CPU.


class Pairs(NamedTuple):
    """The first fields of `msdetr.ops.one_to_many.OneToMany`."""

    query_index: Tensor
    mask: Tensor
    score: Tensor


class _Problems(NamedTuple):
    """P problems: a layer and an image each."""

    logits: Tensor
    """[P, Q, K]"""
    planes: Tensor
    """[5, P, 1, Q] corners and area of the predicted boxes."""
    labels: Tensor
    """[P, T]"""
    target_planes: Tensor
    """[5, P, T, 1]"""
    mask: Tensor
    """[P, T], False in empty slots."""
    priority: Tensor
    """[P, Q]"""

    def part(self, which: slice) -> _Problems:
        """Some of the problems."""
        return _Problems(
            self.logits[which],
            self.planes[:, which],
            self.labels[which],
            self.target_planes[:, which],
            self.mask[which],
            self.priority[which],
        )


def find_pairs(
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
) -> Pairs:
    """The pairs of `msdetr.ops.one_to_many.one_to_many`; `limit` positives per image, `k` <= Q."""
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    if not layers * batch * slots:
        nothing = torch.zeros(layers, batch, slots, k, dtype=torch.int64, device=logits.device)
        return Pairs(nothing, nothing.bool(), nothing.to(at_least_float32(boxes).dtype))
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
    found = [
        _assign(problems.part(block), k, threshold, limit, cost_box, cost_class)
        for block in _parts(len(problems.logits), slots * queries, _BLOCK_PAIRS, logits.device)
    ]
    whole = (torch.cat(fields).unflatten(0, (layers, batch)) for fields in zip(*found, strict=True))
    return Pairs(*whole)


def _parts(problems: int, pairs: int, most: int, device: torch.device) -> list[slice]:
    """Problems of `pairs` pairs each, on a CPU as many at a time as have about `most` pairs; all at
    once on other devices."""
    if device.type != "cpu":
        return [slice(0, problems)]
    # Whole vectors: PyTorch's sigmoid may round differently in what is left over at the end.
    multiple = _VECTOR // math.gcd(_VECTOR, pairs)
    size = multiple * max(1, round(most / (multiple * pairs)))
    return [slice(begin, begin + size) for begin in range(0, problems, size)]


def _assign(
    problems: _Problems,
    k: int,
    threshold: float,
    limit: int,
    cost_box: float,
    cost_class: float,
) -> Pairs:
    """`Pairs` of shape [P, T, k]."""
    labels, mask = problems.labels, problems.mask
    score, best_score, best_target, groups = _scores(problems, cost_box, cost_class)
    begin = torch.arange(0, len(score), groups.shape[1], device=score.device)
    best = _best_of_rows(score, groups, begin)

    # An empty slot's best query means nothing; it must not become positive.
    best_query = (best.place % best_score.shape[1]).view(mask.shape)
    is_best = torch.zeros_like(best_target).scatter_add_(1, best_query, mask.long())
    positive = (best_score >= threshold) | (is_best > 0)
    kept = positive & _lowest(problems.priority, positive, limit)

    count = torch.zeros_like(labels).scatter_add_(1, best_target, kept.long())  # [P, T]
    count = count * mask
    top_score, top_query = _top_k_(score, groups, best, count.flatten(), k)
    shape = (*mask.shape, k)
    taken = torch.arange(k, device=count.device) < count[..., None]
    return Pairs(
        top_query.view(shape).masked_fill(~taken, 0),
        taken,
        top_score.view(shape).masked_fill(~taken, -math.inf),
    )


def _scores(
    problems: _Problems, cost_box: float, cost_class: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of all pairs in G groups of adjacent queries [P * T * G, Q / G], each query's best
    score and target [P, Q], and each target's best score of each group [P * T, G]."""
    number, slots = problems.mask.shape
    queries = problems.priority.shape[1]
    size = max(size for size in range(1, math.isqrt(queries) + 1) if queries % size == 0)
    score = problems.planes.new_empty(number, slots, queries)
    found = []
    for chunk in _parts(number, slots * queries, _CHUNK_PAIRS, score.device):
        part = problems.part(chunk)
        _iou(part.planes, part.target_planes, out=score[chunk])
        _score_(score[chunk], part.logits, part.labels, part.mask, cost_box, cost_class)
        # Several times faster than `amax` over short rows.
        groups = torch.max_pool1d(score[chunk].flatten(0, 1), size, size)
        found.append((*_first_max(score[chunk]), groups))
    best_score, best_target, groups = (torch.cat(fields) for fields in zip(*found, strict=True))
    return score.view(-1, size), best_score, best_target, groups


def _corners_and_area(boxes: Tensor) -> Tensor:
    """x0, y0, x1, y1 and area [5, P, M] of boxes [P, M, 4] cxcywh."""
    boxes = at_least_float32(boxes)
    center, size = boxes.movedim(-1, 0).split(2)
    planes = boxes.new_empty(5, *boxes.shape[:-1])
    torch.sub(center, size, alpha=0.5, out=planes[:2])
    torch.add(center, size, alpha=0.5, out=planes[2:4])
    width, height = planes[2:4] - planes[:2]
    # A box whose area is not a number overlaps nothing, or has coordinates that are not numbers.
    planes[4] = width.mul_(height).nan_to_num_(1.0, math.inf, -math.inf)
    return planes


def _iou(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`msdetr.boxes.box_iou` of planes [5, ...], in place and without temporaries [..., 4]."""
    width = torch.minimum(a[2], b[2], out=out).sub_(torch.maximum(a[0], b[0])).clamp_(min=0)
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (a[4] + b[4]).sub_(intersection)
    return intersection.div_(torch.threshold_(union, SMALLEST_AREA, 1.0))


def _score_(
    iou: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, cost_box: float, cost_class: float
) -> Tensor:
    """The IoU [P, T, Q] becomes the score, with logits [P, Q, K]; -inf in empty slots."""
    index = labels[:, None].expand(-1, logits.shape[1], -1)
    probability = at_least_float32(logits.gather(2, index)).sigmoid_()  # [P, Q, T]
    score = iou.mul_(cost_box).add_(probability.mul_(cost_class).transpose(1, 2))
    score.nan_to_num_(WORST_SCORE, WORST_SCORE, WORST_SCORE)
    return score.clamp_(max=torch.where(mask, math.inf, -math.inf)[..., None])


def _first_max(score: Tensor) -> tuple[Tensor, Tensor]:
    """`score.max(dim=1)` of scores [P, T, Q], the first of equals, several times faster."""
    slots = score.shape[1]
    best = score.amax(dim=1, keepdim=True)
    from_end = torch.arange(slots, 0, -1, dtype=score.dtype, device=score.device)[:, None]
    is_best = torch.eq(score, best, out=torch.empty_like(score))
    first = slots - is_best.mul_(from_end).amax(dim=1)
    return best[:, 0], first.long()


class _Best(NamedTuple):
    """The best score of each of M rows, the first of equals."""

    score: Tensor
    """[M]"""
    group: Tensor
    """[M] its group in its row."""
    place: Tensor
    """[M] its place among all scores."""


def _best_of_rows(score: Tensor, groups: Tensor, begin: Tensor) -> _Best:
    """Of M rows of scores in groups [R * G, S]: `groups` [M, G] are the best scores of these rows'
    groups, `begin` [M] the place of their first groups."""
    best, group = groups.max(dim=1)
    place = begin + group
    member = score.index_select(0, place).max(dim=1).indices  # `argmax` takes longer
    return _Best(best, group, place * score.shape[1] + member)


def _top_k_(
    score: Tensor, groups: Tensor, best: _Best, count: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The highest scores [R, k] of each of R rows and their queries, equals by index, given the
    best; at least the `count` [R] first of a row are right, the others arbitrary.

    `torch.topk` promises no order among equals. Here the scores stand in groups [R * G, S] of
    adjacent queries, and the best of each group [R, G] is kept up to date: the next best query is
    the first best of the first best group. A CPU leaves rows behind that need no more. Overwrites
    scores and groups.
    """
    num_rows, num_groups = groups.shape
    rows = torch.arange(num_rows, device=score.device)
    begin = rows * num_groups
    scores, places = (x[:, None].repeat(1, k) for x in (best.score, best.place))
    for rank in range(1, k):
        if score.device.type == "cpu":
            more = (count > rank).nonzero()[:, 0]
            if not len(more):
                break
            if len(more) < 0.75 * len(rows):  # else leaving rows behind costs more than it saves
                rows, begin, groups, count = (x[more] for x in (rows, begin, groups, count))
                best = _Best(*(x[more] for x in best))
        score.view(-1).index_fill_(0, best.place, -math.inf)
        left = score.index_select(0, begin + best.group).max(dim=1, keepdim=True).values
        groups.scatter_(1, best.group[:, None], left)
        best = _best_of_rows(score, groups, begin)
        scores[:, rank].index_copy_(0, rows, best.score)
        places[:, rank].index_copy_(0, rows, best.place)
    return scores, places % (num_groups * score.shape[1])


def _lowest(priority: Tensor, among: Tensor, limit: int) -> Tensor:
    """[P, Q] bool, True for the `limit` lowest priorities of those in `among`, equals by index;
    arbitrary outside."""
    if limit >= priority.shape[-1]:
        return among
    if limit <= 0:
        return torch.zeros_like(among)
    priority = at_least_float32(priority)
    # Infinity outside, by arithmetic: on a CPU choices by element take many times as long.
    outside = among.to(priority.dtype).mul_(-2.0).add_(1.0).mul_(math.inf)
    priority = outside.clamp_(min=priority)
    highest = _nth_lowest(priority, limit)
    lower, equal = priority < highest, priority == highest
    return lower | (equal & (equal.cumsum(-1) <= limit - lower.sum(-1, keepdim=True)))


def _nth_lowest(values: Tensor, n: int) -> Tensor:
    """[P, 1] of values [P, Q]."""
    if values.device.type == "cpu":  # 0.4 of the time of `topk`, less of `kthvalue`
        return torch.from_numpy(np.partition(values.numpy(), n - 1, axis=1)[:, n - 1 : n])
    return values.topk(n, largest=False, sorted=False).values.amax(-1, keepdim=True)
