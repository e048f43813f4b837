"""Batched rectangular linear assignment: queries for each target, at minimum total cost."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.boxes import at_least_float32
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.registration import register_op

WORST_COST = 2.0**1000
"""Replaces costs that are not finite, so that these pairs are ranked last. It is higher than every
number in float32, and sums of it are finite in float64."""


def linear_assignment(cost: Tensor, count: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Solve P assignment problems.

    Arithmetic is float64. Beside a cost that cannot be avoided, differences that are 2^53 times
    smaller are lost, and the assignment may not be the cheapest one by such differences.

    Args:
        cost: [P, Q, T], of any floating type, with any strides. NaN, both infinities, and
            magnitudes of `WORST_COST` and more, which only float64 has, count as `WORST_COST`.
        count: [P] int64, number of targets of each problem; targets are the first columns.
        impl: see `msdetr.ops.dispatch`. The reference is SciPy: it copies the costs to the host and
            the result back. The kernel does not copy anything to the host.

    Returns:
        [P, T] int64, the query of each target, 0 if it has none, and
        [P, T] bool, True if it has one. With more targets than queries, some targets have none.

    Raises:
        ValueError: `cost` or `count` has the wrong shape, or is on another device.
    """
    if cost.ndim != 3:
        raise ValueError(f"cost must be [P, Q, T], got {list(cost.shape)}")
    if count.shape != cost.shape[:1]:
        raise ValueError(f"count must be [{cost.shape[0]}], got {list(count.shape)}")
    if count.device != cost.device:
        raise ValueError(f"count is on {count.device}, cost on {cost.device}")
    query, matched, _ = linear_assignment_of_layers(cost[None], count, None, impl=impl)
    return query[0, ..., 0], matched[0, ..., 0]


def linear_assignment_of_layers(
    cost: Tensor,
    count: Tensor,
    labels: Tensor | None,
    *,
    copies: int = 1,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the problems of N layers of the same B images, and give the class of each query.

    Args:
        cost: [N, B, Q, T], as for `linear_assignment`.
        count: [B] int64, number of targets of each image.
        labels: [B, T] int64, classes of the targets; None: all targets have class 0.
        copies: number of queries that each target gets, as if its column were repeated so often.
            With more targets times copies than queries, each query is paired, and some targets have
            fewer.
        impl: as for `linear_assignment`.

    Returns:
        [N, B, T, copies] int64 and bool as from `linear_assignment`. The queries of a target are in
        ascending order, and places without a query come last. And
        [N, B, Q] int64, the class of each query's target, -1 if it has none.

    Raises:
        ValueError: `copies` is less than 1.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    use_kernel = resolve_impl("linear_assignment", impl, cost.device) == "triton"
    op = (
        torch.ops.msdetr.linear_assignment
        if use_kernel
        else torch.ops.msdetr.linear_assignment_scipy
    )
    result: tuple[Tensor, Tensor, Tensor] = op(cost.detach(), count, labels, copies)
    return result


def _kernel(
    cost: Tensor, count: Tensor, labels: Tensor | None, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    from msdetr.kernels import linear_assignment as kernel

    labels = None if labels is None else labels.contiguous()
    return kernel.linear_assignment(cost, count.contiguous(), labels, copies)


def _scipy(
    cost: Tensor, count: Tensor, labels: Tensor | None, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    query = _solve(cost, count, copies)
    num_queries = cost.shape[2]
    if labels is None:
        labels = torch.zeros_like(query[0, ..., 0])
    # Places without a query write to one extra slot, which is cut off.
    target_class = query.new_full((*cost.shape[:2], num_queries + 1), -1)
    index = torch.where(query >= 0, query, num_queries)
    target_class.scatter_(2, index.flatten(2), labels[..., None].expand_as(query).flatten(2))
    return query.clamp(min=0), query >= 0, target_class[..., :num_queries].contiguous()


def _solve(cost: Tensor, count: Tensor, copies: int) -> Tensor:
    """[N, B, T, copies], the queries of each target in ascending order, then -1."""
    layers, batch, num_queries, slots = cost.shape
    # One copy to the host for costs and counts. Counts are exact in float32 up to 2 ** 24.
    cost = at_least_float32(cost)
    counts = count.to(cost.dtype).repeat(layers)
    packed = torch.cat((cost.flatten(0, 1).flatten(1), counts[:, None]), dim=1).cpu().double()
    costs = packed[:, :-1].unflatten(1, (num_queries, slots))
    costs = costs.where(costs.abs() < WORST_COST, WORST_COST).numpy()
    # -1 means that there is no query, so that one tensor is copied back.
    queries = torch.full((layers * batch, slots, copies), -1, dtype=torch.int64)
    for problem, num_targets in enumerate(packed[:, -1].long().tolist()):
        repeated = np.tile(costs[problem, :, :num_targets], copies)
        matched_queries, columns = linear_sum_assignment(repeated)  # queries ascend
        target = columns % max(num_targets, 1)
        order = target.argsort(kind="stable")
        target = target[order]
        place = np.arange(len(target)) - target.searchsorted(target)
        queries.numpy()[problem, target, place] = matched_queries[order]
    return queries.view(layers, batch, slots, copies).to(cost.device)


def _fake(
    cost: Tensor, count: Tensor, labels: Tensor | None, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, queries, slots = cost.shape
    return (
        cost.new_empty((layers, batch, slots, copies), dtype=torch.int64),
        cost.new_empty((layers, batch, slots, copies), dtype=torch.bool),
        cost.new_empty((layers, batch, queries), dtype=torch.int64),
    )


_SCHEMA = "(Tensor cost, Tensor count, Tensor? labels, int copies) -> (Tensor, Tensor, Tensor)"
register_op(f"linear_assignment{_SCHEMA}", _kernel, fake=_fake)
# SciPy cannot be traced either.
register_op(f"linear_assignment_scipy{_SCHEMA}", _scipy, fake=_fake)
