"""Batched rectangular linear assignment: a query of its own for each target, at least cost."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.ops.dispatch import Impl, register_kernel, resolve_impl

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define("linear_assignment(Tensor cost, Tensor count, str impl) -> Tensor")


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
    resolved = resolve_impl("linear_assignment", impl, cost.device)
    query = torch.ops.msdetr.linear_assignment(cost.detach(), count, resolved)
    return query.clamp(min=0), query >= 0


def _solve(cost: Tensor, count: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from msdetr.kernels import linear_assignment as kernel

        return kernel.linear_assignment(cost, count)
    return _reference(cost, count)


def _reference(cost: Tensor, count: Tensor) -> Tensor:
    problems, _, slots = cost.shape
    # One transfer: counts travel with the costs, exact in float32 up to 2 ** 24.
    packed = torch.cat((cost.flatten(1), count[:, None].to(cost.dtype)), dim=1).cpu()
    costs = packed[:, :-1].unflatten(1, cost.shape[1:]).numpy()
    # -1 stands for no query, so that one tensor travels back.
    queries = torch.full((problems, slots), -1, dtype=torch.int64)
    for problem, num_targets in enumerate(packed[:, -1].long().tolist()):
        matched_queries, matched_targets = linear_sum_assignment(costs[problem, :, :num_targets])
        queries[problem, torch.from_numpy(matched_targets)] = torch.from_numpy(matched_queries)
    return queries.to(cost.device)


def _fake(cost: Tensor, count: Tensor, impl: str) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)


# An operator for either implementation: neither can be traced.
register_kernel(_LIBRARY, "linear_assignment", _solve)
torch.library.register_fake("msdetr::linear_assignment", _fake, lib=_LIBRARY)
