"""Batched rectangular linear assignment: a query of its own for each target, at least cost."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.ops.dispatch import Impl, register_kernel, resolve_impl

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "linear_assignment(Tensor cost, Tensor count, Tensor? labels, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)


def linear_assignment(cost: Tensor, count: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Solve P assignment problems.

    Args:
        cost: [P, Q, T], finite, with any strides. (The kernel ranks costs that are not finite
            last, SciPy refuses them.)
        count: [P] int64, number of targets of each problem: its first columns.
        impl: see `msdetr.ops.dispatch`. The reference is SciPy: one copy to the host, one back. The
            kernel leaves everything on the device.

    Returns:
        [P, T] int64, the query of each target, 0 where it has none, and
        [P, T] bool, True where it has one. With more targets than queries some stay without.

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
    return query[0], matched[0]


def linear_assignment_of_layers(
    cost: Tensor, count: Tensor, labels: Tensor | None, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the problems of N layers of the same B images, and say what each query is to predict.

    Args:
        cost: [N, B, Q, T], as for `linear_assignment`.
        count: [B] int64, number of targets of each image.
        labels: [B, T] int64, classes of the targets; None: all are of class 0.
        impl: as for `linear_assignment`.

    Returns:
        [N, B, T] int64 and bool as from `linear_assignment`, and
        [N, B, Q] int64, the class of each query's target, -1 where it has none.
    """
    resolved = resolve_impl("linear_assignment", impl, cost.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.msdetr.linear_assignment(
        cost.detach(), count, labels, resolved
    )
    return found


def _solve(
    cost: Tensor, count: Tensor, labels: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from msdetr.kernels import linear_assignment as kernel

        labels = None if labels is None else labels.contiguous()
        return kernel.linear_assignment(cost, count.contiguous(), labels)
    query = _reference(cost, count)
    num_queries = cost.shape[2]
    if labels is None:
        labels = torch.zeros_like(query[0])
    # One slot more than there are queries takes what unmatched targets would write.
    target_class = query.new_full((*cost.shape[:2], num_queries + 1), -1)
    index = torch.where(query >= 0, query, num_queries)
    target_class.scatter_(2, index, labels.expand_as(query))
    return query.clamp(min=0), query >= 0, target_class[..., :num_queries].contiguous()


def _reference(cost: Tensor, count: Tensor) -> Tensor:
    """[N, B, T], the query of each target, -1 where it has none."""
    layers, batch, num_queries, slots = cost.shape
    # One transfer: counts travel with the costs, exact in float32 up to 2 ** 24.
    counts = count.to(cost.dtype).repeat(layers)
    packed = torch.cat((cost.flatten(0, 1).flatten(1), counts[:, None]), dim=1).cpu()
    costs = packed[:, :-1].unflatten(1, (num_queries, slots)).numpy()
    # -1 stands for no query, so that one tensor travels back.
    queries = torch.full((layers * batch, slots), -1, dtype=torch.int64)
    for problem, num_targets in enumerate(packed[:, -1].long().tolist()):
        matched_queries, matched_targets = linear_sum_assignment(costs[problem, :, :num_targets])
        queries[problem, torch.from_numpy(matched_targets)] = torch.from_numpy(matched_queries)
    return queries.view(layers, batch, slots).to(cost.device)


def _fake(
    cost: Tensor, count: Tensor, labels: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, queries, slots = cost.shape
    return (
        cost.new_empty((layers, batch, slots), dtype=torch.int64),
        cost.new_empty((layers, batch, slots), dtype=torch.bool),
        cost.new_empty((layers, batch, queries), dtype=torch.int64),
    )


# An operator for either implementation: neither can be traced.
register_kernel(_LIBRARY, "linear_assignment", _solve)
torch.library.register_fake("msdetr::linear_assignment", _fake, lib=_LIBRARY)
