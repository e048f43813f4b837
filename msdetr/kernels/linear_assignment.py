"""Batched rectangular linear assignment: shortest augmenting paths (Jonker and Volgenant, 1987; in
the rectangular form of Crouse, 2016, which SciPy uses), in two launches.

Rows are the smaller side of a problem: targets, or queries if there are more targets than queries.

1. `best_columns_kernel`: a program takes one row and finds its cheapest column. This uses the whole
   GPU.
2. `linear_assignment_kernel`: a program takes one problem. A row is matched to its cheapest column
   unless an earlier row has the same one. The potential of such a row is that cost, and potentials
   of columns are 0; these are optimal duals of the rows matched so far. (The initial column prices
   used for square problems would be wrong for columns that remain free.)

   The other rows are added one at a time. For each, a shortest path over the reduced costs
   c[i, j] - u[i] - v[j] is grown, column by column in order of distance, until it reaches a free
   column. Then potentials are updated and the path is flipped. A step of the search looks at all
   columns at once, shared by the threads of a program, in chunks of BLOCK. A row that is added
   needs between one step and as many steps as there are rows.

State is per column, in memory that the first-level cache holds: `v`, the potential of the matched
row (so that a scan of a row needs no look-up of its potential), distance, predecessor, and whether
the search has passed the column. Arithmetic is float64, as in SciPy: the optimum is the same
wherever it is unique. A cost that is not finite is replaced by 1e30. Of equal distances, a free
column goes first, then the lowest index.

Problems are ragged: programs read `count`, and do not access columns and rows beyond it. Every
element of the results is written by the kernels, and the host reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048
_WORST = tl.constexpr(1e30)
_MATCHED = tl.constexpr(1073741824)
"""Added to the index of a matched column, so that it comes after all free columns."""
_NONE = tl.constexpr(2147483647)
"""No row or no column; higher than every index."""


@triton.jit
def _shape(
    count_ptr, problem, batch, num_queries, num_targets, stride_cq, stride_ct, TALL: tl.constexpr
):
    """Number of targets, rows and columns of a problem, strides of rows and columns, and whether
    rows are queries. Rows can be queries only in TALL launches: with more slots than queries."""
    count = tl.minimum(tl.load(count_ptr + problem % batch).to(tl.int32), num_targets)
    if TALL:
        swap = count > num_queries
        rows = tl.where(swap, num_queries, count)
        columns = tl.where(swap, count, num_queries)
        stride_row = tl.where(swap, stride_cq, stride_ct)
        stride_column = tl.where(swap, stride_ct, stride_cq)
        return count, rows, columns, stride_row, stride_column, swap
    else:
        return count, count, num_queries, stride_ct, stride_cq, False


@triton.jit
def _load_cost(pointer, mask):
    """Costs in float64, made finite: otherwise a search might never end."""
    cost = tl.load(pointer, mask=mask, other=0.0).to(tl.float64)
    return tl.where(cost < _WORST, tl.maximum(cost, -_WORST), _WORST)


@triton.jit
def _nearest(a_distance, a_key, b_distance, b_key):
    """The nearer of two columns; of equal distances, the lower key."""
    first = (a_distance < b_distance) | ((a_distance == b_distance) & (a_key <= b_key))
    return tl.where(first, a_distance, b_distance), tl.where(first, a_key, b_key)


@triton.jit
def _next_row_left(column_of_row_ptr, after, rows, BLOCK: tl.constexpr):
    """The first row after `after` without a column; if there is none, a number >= `rows`."""
    result = tl.full((), _NONE, tl.int32)
    first = tl.zeros((), tl.int32)
    while first < rows:
        row = first + tl.arange(0, BLOCK)
        column = tl.load(column_of_row_ptr + row, mask=row < rows, other=0)
        result = tl.minimum(result, tl.min(tl.where((column == _NONE) & (row > after), row, _NONE)))
        first += BLOCK
    return result


@triton.jit
def _add_row(
    new_row,
    columns,
    cost_ptr,
    stride_row,
    stride_column,
    v_ptr,
    potential_ptr,
    distance_ptr,
    row_of_column_ptr,
    previous_ptr,
    passed_ptr,
    column_of_row_ptr,
    BLOCK: tl.constexpr,
):
    """Match one more row, by the shortest augmenting path."""
    lane = tl.arange(0, BLOCK)
    infinity = tl.full((), float("inf"), tl.float64)
    row = new_row
    row_potential = tl.zeros((), tl.float64)
    travelled = tl.zeros((), tl.float64)
    end = tl.full((), _NONE, tl.int32)
    searched = tl.zeros((), tl.int32)  # columns with distances of this search
    while end == _NONE:
        best_distance = infinity
        best_key = tl.full((), _NONE, tl.int32)
        first = tl.zeros((), tl.int32)
        while first < columns:
            column = first + lane
            exists = column < columns
            passed = tl.load(passed_ptr + column, mask=column < searched, other=0)
            open_ = exists & (passed == 0)
            offset = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
            cost = _load_cost(cost_ptr + offset, open_)
            v = tl.load(v_ptr + column, mask=exists, other=0.0)
            distance = tl.load(distance_ptr + column, mask=column < searched, other=float("inf"))
            through_row = travelled + (cost - row_potential - v)
            nearer = open_ & (through_row < distance)
            distance = tl.where(nearer, through_row, distance)
            tl.store(distance_ptr + column, distance, mask=nearer)
            tl.store(previous_ptr + column, lane * 0 + row, mask=nearer)
            tl.store(passed_ptr + column, lane * 0, mask=exists & (column >= searched))
            matched = tl.load(row_of_column_ptr + column, mask=exists, other=_NONE) != _NONE
            key = column + matched.to(tl.int32) * _MATCHED  # free columns first
            chunk_distance, chunk_key = tl.reduce(
                (tl.where(open_, distance, infinity), key), 0, _nearest
            )
            best_distance, best_key = _nearest(best_distance, best_key, chunk_distance, chunk_key)
            first += BLOCK
        searched = columns
        best_column = best_key & (_MATCHED - 1)
        tl.debug_barrier()
        tl.store(passed_ptr + best_column, 1)
        travelled = best_distance
        row = tl.load(row_of_column_ptr + best_column)
        row_potential = tl.load(potential_ptr + best_column, mask=row != _NONE, other=0.0)
        end = tl.where(row == _NONE, best_column, end)
        tl.debug_barrier()

    # Update the potentials of all columns that the search has passed.
    first = tl.zeros((), tl.int32)
    while first < columns:
        column = first + lane
        exists = column < columns
        passed = tl.load(passed_ptr + column, mask=exists, other=0) != 0
        passed = passed & (column != end)
        change = travelled - tl.load(distance_ptr + column, mask=passed, other=0.0)
        v = tl.load(v_ptr + column, mask=passed, other=0.0)
        potential = tl.load(potential_ptr + column, mask=passed, other=0.0)
        tl.store(v_ptr + column, v - change, mask=passed)
        tl.store(potential_ptr + column, potential + change, mask=passed)
        first += BLOCK
    tl.debug_barrier()

    # Flip the path, from its free end back to the new row.
    flipping = new_row >= 0
    while flipping:
        row = tl.load(previous_ptr + end)
        is_last = row == new_row
        before = tl.load(column_of_row_ptr + row, mask=is_last == 0, other=0)
        moved = tl.load(potential_ptr + before, mask=is_last == 0, other=0.0)
        tl.debug_barrier()
        tl.store(row_of_column_ptr + end, row)
        tl.store(column_of_row_ptr + row, end)
        tl.store(potential_ptr + end, tl.where(is_last, travelled, moved))
        tl.debug_barrier()
        end = before
        flipping = is_last == 0


@triton.jit
def best_columns_kernel(
    cost_ptr,  # [P, Q, T]
    count_ptr,  # [B]
    links_ptr,  # [P, 3 C + R] int32, see `linear_assignment_kernel`: the last R are written
    batch,
    num_queries,
    num_targets,
    num_columns,
    num_rows,
    stride_cp,
    stride_cq,
    stride_ct,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cheapest column of a row, the first of equal ones."""
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    _count, rows, columns, stride_row, stride_column, _swap = _shape(
        count_ptr, problem, batch, num_queries, num_targets, stride_cq, stride_ct, TALL
    )
    if row < rows:
        cost_ptr += problem * stride_cp + row.to(tl.int64) * stride_row
        lane = tl.arange(0, BLOCK)
        cheapest = tl.full((BLOCK,), float("inf"), tl.float64)
        best = tl.zeros((BLOCK,), tl.int32)
        first = tl.zeros((), tl.int32)
        while first < columns:
            column = first + lane
            exists = column < columns
            cost = _load_cost(cost_ptr + column.to(tl.int64) * stride_column, exists)
            better = exists & (cost < cheapest)
            cheapest = tl.where(better, cost, cheapest)
            best = tl.where(better, column, best)
            first += BLOCK
        _cheapest, best_column = tl.reduce((cheapest, best), 0, _nearest)
        links_ptr += problem * (3 * num_columns + num_rows) + 3 * num_columns
        tl.store(links_ptr + row, best_column)


@triton.jit
def linear_assignment_kernel(
    cost_ptr,  # [P, Q, T]
    count_ptr,  # [B], number of targets, at most T
    labels_ptr,  # [B, T], or None: all targets have class 0
    query_ptr,  # [P, T] int64: query of each target, 0 if none
    mask_ptr,  # [P, T] bool: whether it has one
    class_ptr,  # [P, Q] int64: class of each query's target, -1 if none
    state_ptr,  # [P, 3, C] float64: v, potential of the matched row, distance
    links_ptr,  # [P, 3 C + R] int32: row, predecessor, passed of columns; column of rows
    batch,
    num_queries,
    num_targets,
    num_columns,  # C: maximum number of columns of a problem
    num_rows,  # R: maximum number of rows
    stride_cp,
    stride_cq,
    stride_ct,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve a problem. The targets of problem p are those of image p % B."""
    problem = tl.program_id(0).to(tl.int64)
    count, rows, columns, stride_row, stride_column, rows_are_queries = _shape(
        count_ptr, problem, batch, num_queries, num_targets, stride_cq, stride_ct, TALL
    )
    cost_ptr += problem * stride_cp
    v_ptr = state_ptr + problem * 3 * num_columns
    potential_ptr = v_ptr + num_columns
    distance_ptr = potential_ptr + num_columns
    row_of_column_ptr = links_ptr + problem * (3 * num_columns + num_rows)
    previous_ptr = row_of_column_ptr + num_columns
    passed_ptr = previous_ptr + num_columns
    column_of_row_ptr = passed_ptr + num_columns  # initially its best column
    lane = tl.arange(0, BLOCK)

    first = tl.zeros((), tl.int32)
    while first < columns:
        column = first + lane
        tl.store(v_ptr + column, tl.zeros((BLOCK,), tl.float64), mask=column < columns)
        tl.store(row_of_column_ptr + column, lane * 0 + _NONE, mask=column < columns)
        first += BLOCK
    tl.debug_barrier()

    # Each column goes to the first row whose best column it is.
    first = tl.zeros((), tl.int32)
    while first < rows:
        row = first + lane
        column = tl.load(column_of_row_ptr + row, mask=row < rows, other=0)
        tl.atomic_min(row_of_column_ptr + column, row, mask=row < rows, sem="relaxed")
        first += BLOCK
    tl.debug_barrier()
    first = tl.zeros((), tl.int32)
    while first < rows:
        row = first + lane
        column = tl.load(column_of_row_ptr + row, mask=row < rows, other=0)
        has = tl.load(row_of_column_ptr + column, mask=row < rows, other=_NONE) == row
        offset = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
        tl.store(potential_ptr + column, _load_cost(cost_ptr + offset, has), mask=has)
        tl.store(column_of_row_ptr + row, _NONE, mask=(row < rows) & ~has)
        first += BLOCK
    tl.debug_barrier()

    new_row = tl.full((), -1, tl.int32)
    while new_row < rows:
        new_row = _next_row_left(column_of_row_ptr, new_row, rows, BLOCK)
        if new_row < rows:
            _add_row(
                new_row,
                columns,
                cost_ptr,
                stride_row,
                stride_column,
                v_ptr,
                potential_ptr,
                distance_ptr,
                row_of_column_ptr,
                previous_ptr,
                passed_ptr,
                column_of_row_ptr,
                BLOCK,
            )

    query_of_target = tl.where(rows_are_queries, 0, 3 * num_columns)
    target_of_query = 3 * num_columns - query_of_target
    first = tl.zeros((), tl.int32)
    while first < num_targets:
        target = first + lane
        query = tl.load(
            row_of_column_ptr + query_of_target + target, mask=target < count, other=_NONE
        )
        offset = problem * num_targets + target
        has = query != _NONE
        tl.store(
            query_ptr + offset, tl.where(has, query, 0).to(tl.int64), mask=target < num_targets
        )
        tl.store(mask_ptr + offset, has, mask=target < num_targets)
        first += BLOCK
    first = tl.zeros((), tl.int32)
    while first < num_queries:
        query = first + lane
        exists = query < num_queries
        target = tl.load(row_of_column_ptr + target_of_query + query, mask=exists, other=_NONE)
        has = target != _NONE
        label = tl.zeros((BLOCK,), tl.int64)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + problem % batch * num_targets + target, mask=has, other=0)
        tl.store(class_ptr + problem * num_queries + query, tl.where(has, label, -1), mask=exists)
        first += BLOCK


def linear_assignment(
    cost: Tensor, count: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query of each target and whether it has one [N, B, T], and class of each query [N, B, Q], -1
    if none. Takes costs [N, B, Q, T], and contiguous `count` [B] and `labels` [B, T].

    Without labels, all targets have class 0.
    """
    layers, batch, queries, targets = cost.shape
    problems, columns, rows = layers * batch, max(queries, targets), min(queries, targets)
    cost = cost.flatten(0, 1)
    query_index = cost.new_empty((layers, batch, targets), dtype=torch.int64)
    mask = torch.empty_like(query_index, dtype=torch.bool)
    target_class = cost.new_empty((layers, batch, queries), dtype=torch.int64)
    state = cost.new_empty((problems, 3, columns), dtype=torch.float64)
    links = cost.new_empty((problems, 3 * columns + rows), dtype=torch.int32)
    block = min(max(triton.next_power_of_2(columns), 32), _MAX_BLOCK)
    sizes = (batch, queries, targets, columns, rows)
    launch = {
        "TALL": targets > queries,
        "BLOCK": block,
        "num_warps": max(1, min(block // 128, 8)),
        # Strides computed at run time need registers; by default, ptxas would spill instead.
        "maxnreg": 96 if targets > queries else None,
        "enable_fp_fusion": False,
    }
    best_columns_kernel[(problems, rows)](cost, count, links, *sizes, *cost.stride(), **launch)
    linear_assignment_kernel[(problems,)](
        cost,
        count,
        labels,
        query_index,
        mask,
        target_class,
        state,
        links,
        *sizes,
        *cost.stride(),
        **launch,
    )
    return query_index, mask, target_class
