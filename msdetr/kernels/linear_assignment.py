"""Batched rectangular linear assignment: shortest augmenting paths (Jonker and Volgenant, 1987; in
the rectangular form of Crouse, 2016, which SciPy uses), one program per problem.

Rows are added one at a time. For each, a shortest path over reduced costs c[i, j] - u[i] - v[j] is
grown, column by column in order of distance, until it reaches a free column; potentials are updated
and the path is flipped. A step of the search looks at all columns at once: that is what the threads
of a program share, in chunks of BLOCK. So a problem costs (steps) x (columns / threads); there are
as many steps as rows if rows do not compete, and at most rows^2 / 2.

State is kept per column, in memory, which the first-level cache holds: `v`, the potential of the
row that the column is matched with (so that a row is scanned without looking up its potential),
distance, predecessor, and whether the search has passed. Arithmetic is float64, as SciPy's: the
optimum is SciPy's wherever it is unique. A cost that is not finite counts as 1e30. Of equal
distances a free column goes first, then the one of lowest index.

Problems are ragged: `count` is read by the program, columns and rows beyond are never touched. With
more rows than columns (more targets than queries) the problem is solved transposed, by a launch of
its own in which other problems return at once. Nothing is read by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FREE = -1
_MAX_BLOCK = 2048
_WORST = tl.constexpr(1e30)


@triton.jit
def _nearest(a_distance, a_key, a_column, b_distance, b_key, b_column):
    """The nearer of two columns; of equals, the one of lower key."""
    first = (a_distance < b_distance) | ((a_distance == b_distance) & (a_key <= b_key))
    return (
        tl.where(first, a_distance, b_distance),
        tl.where(first, a_key, b_key),
        tl.where(first, a_column, b_column),
    )


@triton.jit
def linear_assignment_kernel(
    cost_ptr,  # [P, Q, T]
    count_ptr,  # [P], T' <= T: targets that exist
    query_ptr,  # [P, T] int64: query of each target, -1: none
    state_ptr,  # [P, 3, C] float64: v, potential of the matched row, distance
    links_ptr,  # [P, 3, C] int32: matched row, predecessor, passed
    column_of_row_ptr,  # [P, R] int32
    num_queries,
    num_targets,
    num_columns,  # C: most columns of a problem of this launch
    num_rows,  # R: and rows
    stride_cp,
    stride_cq,
    stride_ct,
    TRANSPOSED: tl.constexpr,  # rows are queries: problems with more targets than queries
    BLOCK: tl.constexpr,
):
    """Solve the problems whose shape suits TRANSPOSED."""
    problem = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + problem).to(tl.int32)
    count = tl.minimum(count, num_targets)
    if TRANSPOSED:
        mine = count > num_queries
        rows = tl.where(mine, num_queries, 0)
        columns = tl.where(mine, count, 0)
        stride_row = stride_cq
        stride_column = stride_ct
    else:
        mine = count <= num_queries
        rows = tl.where(mine, count, 0)
        columns = tl.where(mine, num_queries, 0)
        stride_row = stride_ct
        stride_column = stride_cq
    cost_ptr += problem * stride_cp
    query_ptr += problem * num_targets
    v_ptr = state_ptr + problem * 3 * num_columns
    potential_ptr = v_ptr + num_columns
    distance_ptr = potential_ptr + num_columns
    row_of_column_ptr = links_ptr + problem * 3 * num_columns
    previous_ptr = row_of_column_ptr + num_columns
    passed_ptr = previous_ptr + num_columns
    column_of_row_ptr += problem * num_rows
    lane = tl.arange(0, BLOCK)
    infinity = tl.full((), float("inf"), tl.float64)

    first = tl.zeros((), tl.int32)
    while first < columns:
        column = first + lane
        exists = column < columns
        tl.store(v_ptr + column, tl.zeros((BLOCK,), tl.float64), mask=exists)
        tl.store(row_of_column_ptr + column, lane * 0 - 1, mask=exists)
        first += BLOCK

    new_row = tl.zeros((), tl.int32)
    while new_row < rows:
        # Distances start at infinity.
        first = tl.zeros((), tl.int32)
        while first < columns:
            column = first + lane
            exists = column < columns
            tl.store(distance_ptr + column, tl.zeros((BLOCK,), tl.float64) + infinity, mask=exists)
            tl.store(passed_ptr + column, lane * 0, mask=exists)
            first += BLOCK
        tl.debug_barrier()

        row = new_row
        row_potential = tl.zeros((), tl.float64)
        travelled = tl.zeros((), tl.float64)
        end = tl.full((), -1, tl.int32)
        while end < 0:
            best_distance = infinity
            best_key = tl.full((), 2147483647, tl.int32)
            best_column = tl.zeros((), tl.int32)
            first = tl.zeros((), tl.int32)
            while first < columns:
                column = first + lane
                exists = column < columns
                open_ = exists & (tl.load(passed_ptr + column, mask=exists, other=1) == 0)
                cost = tl.load(
                    cost_ptr + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column,
                    mask=open_,
                    other=0.0,
                ).to(tl.float64)
                # Whatever comes in, distances stay finite: else the search might never end.
                cost = tl.where(cost < _WORST, tl.maximum(cost, -_WORST), _WORST)
                v = tl.load(v_ptr + column, mask=exists, other=0.0)
                distance = tl.load(distance_ptr + column, mask=exists, other=0.0)
                through_row = travelled + (cost - row_potential - v)
                nearer = open_ & (through_row < distance)
                distance = tl.where(nearer, through_row, distance)
                tl.store(distance_ptr + column, distance, mask=nearer)
                tl.store(previous_ptr + column, lane * 0 + row, mask=nearer)
                matched = tl.load(row_of_column_ptr + column, mask=exists, other=-1) >= 0
                key = column + matched.to(tl.int32) * 1073741824  # free columns first
                chunk_distance, chunk_key, chunk_column = tl.reduce(
                    (tl.where(open_, distance, infinity), key, column), 0, _nearest
                )
                best_distance, best_key, best_column = _nearest(
                    best_distance,
                    best_key,
                    best_column,
                    chunk_distance,
                    chunk_key,
                    chunk_column,
                )
                first += BLOCK
            tl.debug_barrier()
            tl.store(passed_ptr + best_column, 1)
            travelled = best_distance
            row = tl.load(row_of_column_ptr + best_column)
            row_potential = tl.load(potential_ptr + best_column, mask=row >= 0, other=0.0)
            end = tl.where(row < 0, best_column, end)
            tl.debug_barrier()

        # Potentials of what the search has passed.
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
        new_row += 1

    first = tl.zeros((), tl.int32)
    while first < columns:
        column = first + lane
        row = tl.load(row_of_column_ptr + column, mask=column < columns, other=-1)
        if TRANSPOSED:
            tl.store(query_ptr + column, row.to(tl.int64), mask=row >= 0)
        else:
            tl.store(query_ptr + row, column.to(tl.int64), mask=row >= 0)
        first += BLOCK


def linear_assignment(cost: Tensor, count: Tensor) -> Tensor:
    """[P, T] int64, the query of each target, -1 where it has none; cost [P, Q, T], count [P]."""
    problems, queries, targets = cost.shape
    query_index = torch.full((problems, targets), _FREE, dtype=torch.int64, device=cost.device)
    if not cost.numel():
        return query_index
    shapes = [(False, queries, min(targets, queries))]
    if targets > queries:
        shapes.append((True, targets, queries))
    for transposed, columns, rows in shapes:
        block = min(max(triton.next_power_of_2(columns), 32), _MAX_BLOCK)
        state = torch.empty((problems, 3, columns), dtype=torch.float64, device=cost.device)
        links = torch.empty((problems, 3, columns), dtype=torch.int32, device=cost.device)
        column_of_row = torch.empty((problems, rows), dtype=torch.int32, device=cost.device)
        linear_assignment_kernel[(problems,)](
            cost,
            count,
            query_index,
            state,
            links,
            column_of_row,
            queries,
            targets,
            columns,
            rows,
            *cost.stride(),
            TRANSPOSED=transposed,
            BLOCK=block,
            num_warps=max(1, min(block // 128, 8)),
            enable_fp_fusion=True,
        )
    return query_index
