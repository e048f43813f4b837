"""Gradient of `value` by lists of samples, for few queries, and in fixed point.

Maths. As `value_kernel`: the sum over the samples that touch a pixel of their share of it times g.

Mapping. `link_kernel` enters each corner of a sample in a list of its pixel and head, by one
exchange of the list's first entry. A thread serves a query, a program a level and head. Then
`walk_kernel` sums the lists: a program serves ROWS lists and takes an entry of each at a time. The
few pixels of coarse levels have many samples, and COARSE_LISTS lists each: the longest list limits
how soon the kernel can end.

Order. An exchange puts the new entry first, so the order in a list varies between runs. In fixed
point (64-bit integers) the result does not depend on it.

Traffic. No buffer of sums: the gradient is written once, in its own type. Besides, an entry is 8
bytes, written and read once, and each list has 4 bytes, read once and filled with zeros before.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.sampling import (
    find_corners,
    level_size,
    load_level,
    load_reference,
    load_rows,
    load_samples,
    program_queries,
)

COARSE_LISTS = 8
"""Lists per pixel and head of a level with at most one in COARSE_LISTS of all pixels."""
_COARSE_LISTS = tl.constexpr(COARSE_LISTS)


class Lists(NamedTuple):
    """What the programs take; compile-time constants."""

    BLOCK_Q: int  # queries of a program of `link_kernel`
    TILE_X: int  # 0, for `program_queries`
    ROWS: int  # lists of a program of `walk_kernel`, a multiple of COARSE_LISTS
    PADDED_D: int  # power of two


@triton.jit
def _level_lists(index, num_tokens, maps, sizes, lists):
    """Pixels of a level, lists per pixel and head, and programs of `walk_kernel`."""
    height, width = level_size(index, maps, sizes)
    pixels = height * width
    count = tl.where(pixels * _COARSE_LISTS <= num_tokens, _COARSE_LISTS, 1)
    return pixels, count, tl.cdiv(pixels * count * sizes.M, lists.ROWS)


@triton.jit
def _link(first, entries_ptr, entry, share, inside):
    """Put an entry at the front of the list at `first`, where `inside`."""
    following = tl.atomic_xchg(first, entry + 1, mask=inside, sem="relaxed")
    bits = share.to(tl.int32, bitcast=True).to(following.dtype)
    tl.store(entries_ptr + entry * 2, following, mask=inside)
    tl.store(entries_ptr + entry * 2 + 1, bits, mask=inside)


@triton.jit(do_not_specialize=["maps", "num_queries", "num_tokens", "num_lists"])
def link_kernel(
    queries,  # Queries
    maps,  # Maps
    first_ptr,  # [B, num_lists] int32, int64 if WIDE: 1 + first entry of a list; holds zeros
    entries_ptr,  # [B, Q, M, L, P, 4, 2] as `first_ptr`: 1 + next entry, bits of the share
    num_queries,
    num_tokens,
    num_lists,
    sizes: tl.constexpr,  # Sizes
    lists: tl.constexpr,  # Lists
):
    """Enter the corners of all samples that are within the map in lists."""
    index = tl.program_id(2)
    group = program_queries(num_queries, maps, sizes, lists)
    rows = load_rows(queries, group, sizes)
    level = load_level(index, maps, group.batch, sizes)
    reference = load_reference(rows, index, level, sizes)
    first_ptr += group.batch * num_lists
    for i in tl.static_range(sizes.L - 1):
        _pixels, _count, walks = _level_lists(i, num_tokens, maps, sizes, lists)
        first_ptr += tl.where(index > i, walks * lists.ROWS, 0)
    _pixels, count, _walks = _level_lists(index, num_tokens, maps, sizes, lists)
    stride = count * sizes.M
    first_ptr += group.head * count
    entries_ptr += group.batch * num_queries * (sizes.M * sizes.L * sizes.P * 8)
    sample = ((group.query * sizes.M + group.head) * sizes.L + index) * sizes.P
    for point in tl.static_range(0, sizes.P, sizes.GROUP):
        samples = load_samples(rows, reference, index, level, point, sizes, True)
        for i in tl.static_range(sizes.GROUP):
            if point + i < sizes.P:
                at = find_corners(samples.x[i], samples.y[i], level, stride, sizes)
                for corner in tl.static_range(4):
                    if corner < 2:
                        first = first_ptr + at.upper
                        mask = group.inside & at.in_y0
                        share = samples.weight[i] - samples.weight[i] * at.down
                    else:
                        first = first_ptr + at.lower
                        mask = group.inside & at.in_y1
                        share = samples.weight[i] * at.down
                    if corner % 2 == 0:
                        mask = mask & at.in_x0
                        share = share - share * at.right
                    else:
                        first += stride
                        mask = mask & at.in_x1
                        share = share * at.right
                    entry = (sample + point + i) * 4 + corner
                    _link(first + (entry & (count - 1)), entries_ptr, entry, share, mask)


@triton.jit
def _channel_mask(rows, sizes, lists):
    """[ROWS, PADDED_D or 1] mask of rows [ROWS] and of the valid channels."""
    mask = rows[:, None]
    if lists.PADDED_D > sizes.D:
        mask = mask & (tl.arange(0, lists.PADDED_D) < sizes.D)[None, :]
    return mask


@triton.jit
def _store(pointer, sums, row, num_rows, fixed_point, sizes, lists):
    """Store sums [ROWS, PADDED_D] of the rows of a level."""
    if fixed_point is not None:
        sums = (sums.to(tl.float64) / fixed_point).to(tl.float32)
    pointers = pointer + (row * sizes.D)[:, None] + tl.arange(0, lists.PADDED_D)[None, :]
    mask = _channel_mask(row < num_rows, sizes, lists)
    tl.store(pointers, sums.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["maps", "num_queries", "num_tokens"])
def walk_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    maps,  # Maps
    first_ptr,  # as for `link_kernel`
    entries_ptr,
    grad_value_ptr,  # [B, S, M, D]
    fixed_point_ptr,  # [] float32, units per 1; None: add in float32
    num_queries,
    num_tokens,
    sizes: tl.constexpr,  # Sizes
    lists: tl.constexpr,  # Lists
):
    """Gradient of `value`: the sums of all lists."""
    # The last levels first: they are the coarse ones, with the longest lists.
    batch = tl.program_id(1).to(tl.int64)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_ptr += (batch * tl.num_programs(0) + program) * lists.ROWS
    token = batch * num_tokens
    pixels, count, walks = _level_lists(0, num_tokens, maps, sizes, lists)
    for i in tl.static_range(1, sizes.L):
        next_pixels, next_count, next_walks = _level_lists(i, num_tokens, maps, sizes, lists)
        reached = program >= walks
        program -= tl.where(reached, walks, 0)
        token += tl.where(reached, pixels, 0)
        pixels = tl.where(reached, next_pixels, pixels)
        count = tl.where(reached, next_count, count)
        walks = tl.where(reached, next_walks, walks)

    grad_output_ptr += batch * num_queries * (sizes.M * sizes.D)
    entries_ptr += batch * num_queries * (sizes.M * sizes.L * sizes.P * 8)
    channel = tl.arange(0, lists.PADDED_D)[None, :]
    fixed_point = None
    sums = tl.zeros((lists.ROWS, lists.PADDED_D), tl.float32)
    if fixed_point_ptr is not None:
        fixed_point = tl.load(fixed_point_ptr)
        sums = tl.zeros((lists.ROWS, lists.PADDED_D), tl.int64)
    entry = tl.load(first_ptr + tl.arange(0, lists.ROWS))
    while tl.max(entry, 0) > 0:
        exists = entry > 0
        row = (entry - 1) // (sizes.L * sizes.P * 4)
        grad = tl.load(
            grad_output_ptr + (row * sizes.D)[:, None] + channel,
            mask=_channel_mask(exists, sizes, lists),
            other=0.0,
        )
        pointers = entries_ptr + (entry - 1) * 2
        bits = tl.load(pointers + 1, mask=exists, other=0).to(tl.int32)
        entry = tl.load(pointers, mask=exists, other=0)
        product = grad.to(tl.float32) * bits.to(tl.float32, bitcast=True)[:, None]
        if fixed_point is None:
            sums += product
        else:
            sums += (product * fixed_point).to(tl.int64)

    grad_value_ptr += token * (sizes.M * sizes.D)
    if sizes.WIDE:
        program = program.to(tl.int64)
    row = program * lists.ROWS + tl.arange(0, lists.ROWS)
    if count == 1:
        _store(grad_value_ptr, sums, row, pixels * sizes.M, fixed_point, sizes, lists)
    else:
        ROWS: tl.constexpr = lists.ROWS // _COARSE_LISTS
        grouped = tl.sum(tl.reshape(sums, (ROWS, _COARSE_LISTS, lists.PADDED_D)), 1)
        group = program * ROWS + tl.arange(0, ROWS)
        _store(grad_value_ptr, grouped, group, pixels * sizes.M, fixed_point, sizes, lists)
