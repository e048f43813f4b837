"""Gradient of `value` from the samples that the windows left out.

Mapping. A program serves the cell and head of a program of `splat_kernel`, and reads the windows
that it has placed. In levels with samples left, it adds those one by one, as `value_kernel` does.

Traffic. Inputs are read only where samples were left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.cells import (
    Window,
    coarse_queries,
    fine_queries,
    is_left_out,
    program_cell,
)
from msdetr.kernels.ms_deform_attn.sampling import (
    level_size,
    load_gradient,
    load_level,
    load_reference,
    load_rows,
    load_samples,
    split_channels,
)
from msdetr.kernels.ms_deform_attn.value import scatter_sample


@triton.jit(do_not_specialize=["maps", "num_queries", "cells_across"])
def rest_kernel(
    grad_output_ptr,  # arguments as those of `splat_kernel`, but for the last
    queries,
    maps,
    grad_value_ptr,
    windows_ptr,
    num_queries,
    cells_across,
    sizes: tl.constexpr,
    windows: tl.constexpr,
    tile: tl.constexpr,  # Tile
):
    """Add the samples that `splat_kernel` left out."""
    cell = program_cell(num_queries, cells_across, sizes)
    pointers = grad_value_ptr + cell.batch * num_queries * (sizes.M * sizes.D)
    pointers += split_channels(cell.head, sizes, tile)
    windows_ptr += (cell.batch * tl.num_programs(0) + tl.program_id(0)) * (sizes.L * 3)
    for index in range(sizes.L):
        height, width = level_size(index, maps, sizes)
        window_ptr = windows_ptr + index * 3
        if tl.load(window_ptr + 2) > 0.0:
            level = load_level(index, maps, cell.batch, sizes)
            side = tl.where(index < 2, windows.SIDE, windows.COARSE_SIDE)
            window = Window(tl.load(window_ptr), tl.load(window_ptr + 1))
            for i in tl.static_range(2 if sizes.L > 1 else 1):
                if i == 0:
                    group = fine_queries(cell, maps)
                else:
                    group = coarse_queries(cell, maps, sizes)
                rows = load_rows(queries, group, sizes)
                reference = load_reference(rows, index, level, sizes)
                samples = load_samples(rows, reference, index, level, 0, sizes, True)
                grad = load_gradient(grad_output_ptr, group, sizes, tile)
                for point in tl.static_range(sizes.P):
                    x, y = samples.x[point], samples.y[point]
                    left = is_left_out(x, y, group.inside, window, side, level)
                    scatter_sample(grad, pointers, samples, point, left, level, sizes, tile)
        pointers += (height * width).to(tl.int64) * (sizes.M * sizes.D)
