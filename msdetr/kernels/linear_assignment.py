"""Batched rectangular linear assignment: shortest augmenting paths (Jonker and Volgenant, 1987; in
the rectangular form of Crouse, 2016, which SciPy uses), in two launches.

A target has `copies` places for queries. Rows are the smaller side of a problem: places, or queries
if there are more places than queries. The places of a target are rows (or columns) of equal costs,
which are stored once: row r has the costs of line r // row_copies.

1. `best_columns_kernel`: a program takes one line, with k rows, and finds its k cheapest columns.
   This uses the whole GPU.
2. `linear_assignment_kernel`: a program takes one problem. Among the lines that list a column, that
   with the lowest (place in its list, line) wins it. A line keeps the columns of its list before
   the first one that it did not win, and a row is matched to each. The potential u of these rows is
   the cost of the last column kept, and the potential v of a column kept is its cost minus u. Other
   columns have v = 0. These are optimal duals of the rows matched so far: pairs are tight, columns
   that a line does not keep cost it at least u, and no v is above 0, so that it violates nothing in
   other lines. With one row per line, v is 0 everywhere. (The initial column prices used for square
   problems would be wrong for columns that remain free.)

   The other rows are added one at a time. For each, a shortest path over the reduced costs
   c[i, j] - u[i] - v[j] is grown, column by column in order of distance, until it reaches a free
   column. Then potentials are updated and the path is flipped. A step of the search looks at all
   columns at once, shared by the threads of a program, in chunks of BLOCK.

   Rows of a line have the same potential: each row's pair is tight, and none may be cheaper for
   another row of the line. When the search scans a row at distance d, the columns of the other rows
   of its line are thus at distance d as well, and scanning those rows would give the same
   distances. These columns are marked as passed at once. So a row that is added needs between one
   step and as many steps as there are lines.

State is per column, in memory that the first-level cache holds: `v`, the potential of the matched
row (so that a scan of a row needs no look-up of its potential), distance, predecessor, and whether
the search has passed the column. Arithmetic is float64, as in SciPy: the optimum is the same
wherever it is unique. A cost that is not finite is replaced by 2^1000, as in
`msdetr.ops.linear_assignment`. Of equal distances, a free column goes first, then the lowest index.
At the end, the queries of a target are put in ascending order.

Problems are ragged: programs read `count`, and do not access columns and rows beyond it. Every
element of the results is written by the kernels, and the host reads nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048
_WORST = tl.constexpr(2.0**1000)
_MATCHED = tl.constexpr(1073741824)
"""Added to the index of a matched column, so that it comes after all free columns."""
_NONE = tl.constexpr(2147483647)
"""No row or no column; higher than every index."""


class _Problems(NamedTuple):
    """P = N * B problems; an argument of both kernels. Problem p has the targets of image p % B.

    There are C columns and R rows at most: the larger and the smaller of Q and T * copies.
    """

    cost: Any  # [P, Q, T]
    stride_p: Any
    stride_q: Any
    stride_t: Any
    count: Any  # [B], number of targets, at most T
    batch: Any
    num_queries: Any
    num_targets: Any
    state: Any  # [P, 3, C] float64, see `_State`
    links: Any  # [P, 3 C + R] int32


class _Problem(NamedTuple):
    """A problem, by rows and columns."""

    cost: Any
    stride_row: Any
    stride_column: Any
    rows: Any
    row_copies: Any  # consecutive rows with the same costs
    columns: Any
    column_copies: Any
    places: Any  # number of targets times copies


class _State(NamedTuple):
    """Pointers to the state of a problem with R rows and C columns at most."""

    v: Any  # [C] float64, potentials of columns
    potential: Any  # [C] float64, of the matched row
    distance: Any  # [C] float64
    row_of_column: Any  # [C] int32
    previous: Any  # [C] int32, the row before the column on the shortest path; before, claims
    passed: Any  # [C] int32, by the search
    column_of_row: Any  # [R] int32, initially the cheapest columns of its line, ascending


@triton.jit
def _problem(problems, index, COPIES: tl.constexpr, TALL: tl.constexpr):
    """Rows can be queries only in TALL launches: with more slots for places than queries."""
    count = tl.load(problems.count + index % problems.batch).to(tl.int32)
    places = tl.minimum(count, problems.num_targets) * COPIES
    swap = (places > problems.num_queries) & TALL
    return _Problem(
        problems.cost + index * problems.stride_p,
        tl.where(swap, problems.stride_q, problems.stride_t),
        tl.where(swap, problems.stride_t, problems.stride_q),
        tl.where(swap, problems.num_queries, places),
        tl.where(swap, 1, COPIES),
        tl.where(swap, places, problems.num_queries),
        tl.where(swap, COPIES, 1),
        places,
    )


@triton.jit
def _state(problems, index, COPIES: tl.constexpr, TALL: tl.constexpr):
    places = problems.num_targets * COPIES
    columns = places if TALL else problems.num_queries
    rows = problems.num_queries if TALL else places
    v = problems.state + index * 3 * columns
    row_of_column = problems.links + index * (3 * columns + rows)
    previous = row_of_column + columns
    passed = previous + columns
    return _State(
        v, v + columns, v + 2 * columns, row_of_column, previous, passed, passed + columns
    )


@triton.jit
def _load_cost(problem, line, column, mask):
    """Costs in float64, made finite: otherwise a search might never end."""
    column = column // problem.column_copies
    offset = line.to(tl.int64) * problem.stride_row + column.to(tl.int64) * problem.stride_column
    cost = tl.load(problem.cost + offset, mask=mask, other=0.0).to(tl.float64)
    return tl.where(tl.abs(cost) < _WORST, cost, _WORST)


@triton.jit
def _nearest(a_distance, a_key, b_distance, b_key):
    """The nearer of two columns; of equal distances, the lower key."""
    first = (a_distance < b_distance) | ((a_distance == b_distance) & (a_key <= b_key))
    return tl.where(first, a_distance, b_distance), tl.where(first, a_key, b_key)


@triton.jit
def _next_row_left(problem, state, after, BLOCK: tl.constexpr):
    """The first row after `after` without a column; if there is none, a number >= `rows`."""
    result = tl.full((), _NONE, tl.int32)
    first = tl.zeros((), tl.int32)
    while first < problem.rows:
        row = first + tl.arange(0, BLOCK)
        column = tl.load(state.column_of_row + row, mask=row < problem.rows, other=0)
        left = (column == _NONE) & (row > after)
        result = tl.minimum(result, tl.min(tl.where(left, row, _NONE)))
        first += BLOCK
    return result


@triton.jit
def _search(problem, state, new_row, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """The free column at the end of the shortest path from a row, and the length of the path."""
    lane = tl.arange(0, BLOCK)
    row = new_row
    row_potential = tl.zeros((), tl.float64)
    travelled = tl.zeros((), tl.float64)
    end = tl.full((), _NONE, tl.int32)
    searched = tl.zeros((), tl.int32)  # columns with distances of this search
    while end == _NONE:
        best_distance = tl.full((), float("inf"), tl.float64)
        best_key = tl.full((), _NONE, tl.int32)
        line = row // problem.row_copies
        first_copy = line * problem.row_copies
        first = tl.zeros((), tl.int32)
        while first < problem.columns:
            column = first + lane
            exists = column < problem.columns
            passed = tl.load(state.passed + column, mask=column < searched, other=0)
            open_ = exists & (passed == 0)
            cost = _load_cost(problem, line, column, open_)
            v = tl.load(state.v + column, mask=exists, other=0.0)
            distance = tl.load(state.distance + column, mask=column < searched, other=float("inf"))
            through_row = travelled + (cost - row_potential - v)
            nearer = open_ & (through_row < distance)
            distance = tl.where(nearer, through_row, distance)
            tl.store(state.distance + column, distance, mask=nearer)
            tl.store(state.previous + column, row, mask=nearer)
            owner = tl.load(state.row_of_column + column, mask=exists, other=_NONE)
            is_new = exists & (column >= searched)
            if COPIES > 1:
                same = open_ & (owner >= first_copy) & (owner < first_copy + problem.row_copies)
                tl.store(state.passed + column, same.to(tl.int32), mask=is_new | same)
                open_ = open_ & ~same
            else:
                tl.store(state.passed + column, 0, mask=is_new)
            key = column + (owner != _NONE).to(tl.int32) * _MATCHED  # free columns first
            chunk = tl.reduce((tl.where(open_, distance, float("inf")), key), 0, _nearest)
            best_distance, best_key = _nearest(best_distance, best_key, chunk[0], chunk[1])
            first += BLOCK
        searched = problem.columns
        best_column = best_key & (_MATCHED - 1)
        tl.debug_barrier()
        tl.store(state.passed + best_column, 1)
        travelled = best_distance
        row = tl.load(state.row_of_column + best_column)
        row_potential = tl.load(state.potential + best_column, mask=row != _NONE, other=0.0)
        end = tl.where(row == _NONE, best_column, end)
        tl.debug_barrier()
    return end, travelled


@triton.jit
def _add_row(problem, state, new_row, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Match one more row, by the shortest augmenting path."""
    end, travelled = _search(problem, state, new_row, COPIES, BLOCK)

    # Update the potentials of all columns that the search has passed.
    first = tl.zeros((), tl.int32)
    while first < problem.columns:
        column = first + tl.arange(0, BLOCK)
        passed = tl.load(state.passed + column, mask=column < problem.columns, other=0) != 0
        passed = passed & (column != end)
        change = travelled - tl.load(state.distance + column, mask=passed, other=0.0)
        v = tl.load(state.v + column, mask=passed, other=0.0)
        potential = tl.load(state.potential + column, mask=passed, other=0.0)
        tl.store(state.v + column, v - change, mask=passed)
        tl.store(state.potential + column, potential + change, mask=passed)
        first += BLOCK
    tl.debug_barrier()

    # Flip the path, from its free end back to the new row.
    flipping = new_row >= 0
    while flipping:
        row = tl.load(state.previous + end)
        is_last = row == new_row
        before = tl.load(state.column_of_row + row, mask=is_last == 0, other=0)
        moved = tl.load(state.potential + before, mask=is_last == 0, other=0.0)
        tl.debug_barrier()
        tl.store(state.row_of_column + end, row)
        tl.store(state.column_of_row + row, end)
        tl.store(state.potential + end, tl.where(is_last, travelled, moved))
        tl.debug_barrier()
        end = before
        flipping = is_last == 0


@triton.jit
def _match_cheapest(problem, state, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Match rows to the cheapest columns of their lines, as far as these are not contested."""
    lane = tl.arange(0, BLOCK)
    lines = problem.rows // problem.row_copies
    # With one row per line, the row that wins a column is matched to it.
    claims = state.previous if COPIES > 1 else state.row_of_column
    first = tl.zeros((), tl.int32)
    while first < problem.columns:
        column = first + lane
        tl.store(state.v + column, 0.0, mask=column < problem.columns)
        tl.store(state.row_of_column + column, _NONE, mask=column < problem.columns)
        if COPIES > 1:
            tl.store(claims + column, _NONE, mask=column < problem.columns)
        first += BLOCK
    tl.debug_barrier()
    first = tl.zeros((), tl.int32)
    while first < problem.rows:
        row = first + lane
        exists = row < problem.rows
        column = tl.load(state.column_of_row + row, mask=exists, other=0)
        rank = row % problem.row_copies * lines + row // problem.row_copies
        tl.atomic_min(claims + column, rank, mask=exists, sem="relaxed")
        first += BLOCK
    tl.debug_barrier()
    first = tl.zeros((), tl.int32)
    while first < lines:
        line = first + lane
        exists = line < lines
        keeps = exists
        potential = tl.zeros((BLOCK,), tl.float64)
        place = tl.zeros((), tl.int32)
        while place < problem.row_copies:
            row = line * problem.row_copies + place
            column = tl.load(state.column_of_row + row, mask=exists, other=0)
            rank = place * lines + line
            keeps = keeps & (tl.load(claims + column, mask=exists, other=_NONE) == rank)
            cost = _load_cost(problem, line, column, keeps)
            potential = tl.where(keeps, cost, potential)
            if COPIES > 1:
                tl.store(state.row_of_column + column, row, mask=keeps)
            else:
                tl.store(state.potential + column, cost, mask=keeps)
            tl.store(state.column_of_row + row, _NONE, mask=exists & ~keeps)
            place += 1
        if COPIES > 1:
            tl.debug_barrier()
            place = tl.zeros((), tl.int32)
            while place < problem.row_copies:
                row = line * problem.row_copies + place
                column = tl.load(state.column_of_row + row, mask=exists, other=_NONE)
                has = column != _NONE
                cost = _load_cost(problem, line, column, has)
                tl.store(state.potential + column, potential, mask=has)
                tl.store(state.v + column, cost - potential, mask=has)
                place += 1
        first += BLOCK
    tl.debug_barrier()


@triton.jit
def _best_column(problem, line, after_cost, after, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """The cheapest column of a line, the first of equal ones, and its cost.

    With copies, only columns count that come after the column `after`, in ascending order of cost.
    """
    cheapest = tl.full((BLOCK,), float("inf"), tl.float64)
    best = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((), tl.int32)
    while first < problem.columns:
        column = first + tl.arange(0, BLOCK)
        exists = column < problem.columns
        cost = _load_cost(problem, line, column, exists)
        better = exists & (cost < cheapest)
        if COPIES > 1:
            better = better & ((cost > after_cost) | ((cost == after_cost) & (column > after)))
        cheapest = tl.where(better, cost, cheapest)
        best = tl.where(better, column, best)
        first += BLOCK
    return tl.reduce((cheapest, best), 0, _nearest)


@triton.jit
def best_columns_kernel(problems, COPIES: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr):
    """The cheapest columns of a line in ascending order, one per row."""
    index = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1)
    problem = _problem(problems, index, COPIES, TALL)
    row = line * problem.row_copies
    if row < problem.rows:
        column_of_row = _state(problems, index, COPIES, TALL).column_of_row
        cost, column = _best_column(problem, line, float("-inf"), -1, COPIES, BLOCK)
        tl.store(column_of_row + row, column)
        if COPIES > 1:
            last = row + problem.row_copies - 1
            while row < last:
                cost, column = _best_column(problem, line, cost, column, COPIES, BLOCK)
                row += 1
                tl.store(column_of_row + row, column)


@triton.jit
def linear_assignment_kernel(
    problems,
    labels_ptr,  # [B, T], or None: all targets have class 0
    query_ptr,  # [P, T * copies] int64: query of each place, 0 if none
    mask_ptr,  # [P, T * copies] bool: whether it has one
    class_ptr,  # [P, Q] int64: class of each query's target, -1 if none
    COPIES: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve a problem."""
    index = tl.program_id(0).to(tl.int64)
    problem = _problem(problems, index, COPIES, TALL)
    state = _state(problems, index, COPIES, TALL)
    _match_cheapest(problem, state, COPIES, BLOCK)
    new_row = tl.full((), -1, tl.int32)
    while new_row < problem.rows:
        new_row = _next_row_left(problem, state, new_row, BLOCK)
        if new_row < problem.rows:
            _add_row(problem, state, new_row, COPIES, BLOCK)

    swap = problem.places > problem.rows  # rows are queries
    query_of_place = tl.where(swap, state.row_of_column, state.column_of_row)
    place_of_query = tl.where(swap, state.column_of_row, state.row_of_column)
    slots = problems.num_targets * COPIES
    first = tl.zeros((), tl.int32)
    while first < slots:
        place = first + tl.arange(0, BLOCK)
        exists = place < slots
        query = tl.load(query_of_place + place, mask=place < problem.places, other=_NONE)
        has = query != _NONE
        offset = index * slots + place
        if COPIES > 1:
            # In ascending order within a target.
            first_copy = place // COPIES * COPIES
            offset += first_copy - place
            copy = tl.zeros((), tl.int32)
            while copy < COPIES:
                other_place = first_copy + copy
                other = tl.load(
                    query_of_place + other_place, mask=place < problem.places, other=_NONE
                )
                before = (other < query) | ((other == query) & (other_place < place))
                offset += before.to(tl.int64)
                copy += 1
        tl.store(query_ptr + offset, tl.where(has, query, 0).to(tl.int64), mask=exists)
        tl.store(mask_ptr + offset, has, mask=exists)
        first += BLOCK
    first = tl.zeros((), tl.int32)
    while first < problems.num_queries:
        query = first + tl.arange(0, BLOCK)
        exists = query < problems.num_queries
        place = tl.load(place_of_query + query, mask=exists, other=_NONE)
        has = place != _NONE
        label = tl.zeros((BLOCK,), tl.int64)
        if labels_ptr is not None:
            slot = index % problems.batch * problems.num_targets + place // COPIES
            label = tl.load(labels_ptr + slot, mask=has, other=0)
        offset = index * problems.num_queries + query
        tl.store(class_ptr + offset, tl.where(has, label, -1), mask=exists)
        first += BLOCK


def linear_assignment(
    cost: Tensor, count: Tensor, labels: Tensor | None, copies: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query of each place of a target and whether it has one [N, B, T, copies], and class of each
    query [N, B, Q], -1 if none. Takes costs [N, B, Q, T], and contiguous `count` [B] and `labels`
    [B, T].

    Without labels, all targets have class 0.
    """
    layers, batch, queries, targets = cost.shape
    columns, rows = max(queries, targets * copies), min(queries, targets * copies)
    tall = columns > queries
    cost = cost.flatten(0, 1)
    query_index = cost.new_empty((layers, batch, targets, copies), dtype=torch.int64)
    mask = torch.empty_like(query_index, dtype=torch.bool)
    target_class = cost.new_empty((layers, batch, queries), dtype=torch.int64)
    state = cost.new_empty((len(cost), 3, columns), dtype=torch.float64)
    links = cost.new_empty((len(cost), 3 * columns + rows), dtype=torch.int32)
    problems = _Problems._make((cost, *cost.stride(), count, batch, queries, targets, state, links))
    block = min(max(triton.next_power_of_2(columns), 32), _MAX_BLOCK)
    launch = {
        "COPIES": copies,
        "TALL": tall,
        "BLOCK": block,
        # With copies, eight columns per thread would spill.
        "num_warps": max(1, min(block // 128, 8 if copies == 1 else 16)),
        "enable_fp_fusion": False,
    }
    best_columns_kernel[(len(cost), queries if tall else targets)](problems, **launch)
    # By default, ptxas may spill, so that more programs fit on a multiprocessor than there are.
    linear_assignment_kernel[(len(cost),)](
        problems, labels, query_index, mask, target_class, **launch, maxnreg=128
    )
    return query_index, mask, target_class
