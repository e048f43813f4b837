"""Batched rectangular linear assignment: a query of its own for each target, at least cost."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.ops.dispatch import Impl, resolve_impl


def linear_assignment(cost: Tensor, count: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Solve P assignment problems.

    Args:
        cost: [P, Q, T], finite.
        count: [P] int64, number of targets of each problem: its first columns.
        impl: see `msdetr.ops.dispatch`. The reference is SciPy: one copy to the host, one back.

    Returns:
        [P, T] int64, the query of each target, 0 where it has none, and
        [P, T] bool, True where it has one. With more targets than queries some stay without.
    """
    resolve_impl("linear_assignment", impl)
    problems, _, slots = cost.shape
    # One transfer: counts travel with the costs, exact in float32 up to 2 ** 24.
    packed = torch.cat((cost.detach().flatten(1), count[:, None].to(cost.dtype)), dim=1).cpu()
    costs = packed[:, :-1].unflatten(1, cost.shape[1:]).numpy()
    # -1 stands for no query, so that one tensor travels back.
    queries = torch.full((problems, slots), -1, dtype=torch.int64)
    for problem, num_targets in enumerate(packed[:, -1].long().tolist()):
        matched_queries, matched_targets = linear_sum_assignment(costs[problem, :, :num_targets])
        queries[problem, torch.from_numpy(matched_targets)] = torch.from_numpy(matched_queries)
    queries = queries.to(cost.device)
    return queries.clamp(min=0), queries >= 0
