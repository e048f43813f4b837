"""Plans of launches: numbers of programs and compile-time constants. They depend only on sizes, and
are cached."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.cells import CELL, WindowSizes
from msdetr.kernels.ms_deform_attn.configs import (
    DirectConfig,
    Kernel,
    ListConfig,
    WindowConfig,
    cached,
    default_lists,
    tile_config,
    value_config,
)
from msdetr.kernels.ms_deform_attn.lists import COARSE_LISTS, Lists
from msdetr.kernels.ms_deform_attn.sampling import Sizes, Tile
from msdetr.structures import SpatialShapes

_LINK_QUERIES = 32  # queries of a program of `link_kernel`, a warp

Bundle = TypeVar("Bundle", Sizes, Tile, WindowSizes, Lists)


class DirectPlan(NamedTuple):
    """Launch of a direct kernel."""

    programs: int  # per image, here and below
    sizes: Sizes
    tile: Tile
    options: dict[str, Any]


class WindowPlan(NamedTuple):
    """Launches of `splat_kernel` and `rest_kernel`."""

    programs: int
    cells_across: int
    sizes: Sizes
    windows: WindowSizes
    splat_options: dict[str, Any]
    rest_tile: Tile
    rest_options: dict[str, Any]


class ListPlan(NamedTuple):
    """Launches of `link_kernel` and `walk_kernel`."""

    num_entries: int  # per image
    num_lists: int
    dtype: torch.dtype  # of entries and lists
    link_programs: int  # per image and level
    walk_programs: int
    sizes: Sizes
    lists: Lists
    link_options: dict[str, Any]
    walk_options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def pack_levels(spatial_shapes: SpatialShapes) -> tuple[int, ...]:
    """height << 32 | width of each level."""
    return tuple(height << 32 | width for height, width in spatial_shapes)


@functools.lru_cache(maxsize=1024)
def sizes_of(
    spatial_shapes: SpatialShapes,
    num_queries: int,
    heads: int,
    head_dim: int,
    num_points: int,
    reference_dim: int,
    strides: tuple[int, ...],
) -> Sizes:
    """Sizes of a call; `strides` are those of tokens and queries."""
    levels = len(spatial_shapes)
    group = int(min(triton.next_power_of_2(num_points), 4))
    padded_points = triton.cdiv(num_points, group) * group
    # Outputs and gradients are contiguous.
    strides = (*strides, heads * head_dim, 3 * heads * levels * num_points, levels * reference_dim)
    return Sizes(
        M=heads,
        D=head_dim,
        L=levels,
        P=num_points,
        R=reference_dim,
        WIDE=needs_wide_offsets(spatial_shapes, num_queries, *strides),
        GROUP=group,
        PADDED_LP=int(triton.next_power_of_2(levels * padded_points)),
    )


def needs_wide_offsets(spatial_shapes: SpatialShapes, num_queries: int, *strides: int) -> bool:
    """Whether an offset within one level, or within the queries of an image, can exceed 2^31 - 1.

    Offsets of images and levels are always 64-bit. `strides` are elements per token or query.
    Includes corners outside of the map, whose offsets are computed but not used.
    """
    rows = max((height + 3) * (width + 3) for height, width in spatial_shapes)
    return max(rows, num_queries) * max(strides) >= 2**31


@cached
def plan_direct(
    kernel: Kernel,
    dtype: torch.dtype,
    spatial_shapes: SpatialShapes,
    batch: int,
    queries: int,
    sizes: Sizes,
    need_reference: bool = False,
) -> DirectPlan:
    """A direct kernel, for `value` of a type."""
    config = tile_config(
        kernel,
        dtype,
        sizes.D,
        batch * sizes.M * queries,
        is_grid=queries == count_pixels(spatial_shapes),
        need_reference=need_reference,
    )
    programs = sizes.M * count_tiles(spatial_shapes, queries, config.block_q, config.tile_x)
    tile = _tile_of(config, sizes)
    return DirectPlan(programs, as_constants(sizes), tile, _options(config.num_warps))


@cached
def plan_value(
    dtype: torch.dtype,
    spatial_shapes: SpatialShapes,
    batch: int,
    queries: int,
    sizes: Sizes,
    deterministic: bool,
) -> DirectPlan | WindowPlan | ListPlan:
    """The gradient of `value`."""
    tokens = count_pixels(spatial_shapes)
    if deterministic:
        return _plan_lists(default_lists(sizes.D), spatial_shapes, queries, sizes)
    config = value_config(
        dtype,
        sizes.D,
        batch * sizes.M * queries,
        num_points=sizes.P,
        is_grid=queries == tokens,
        can_window=sizes.R > 0 and not sizes.WIDE,
        # Four entries of 8 bytes per sample, against 4 bytes per element.
        can_list=queries == tokens or 8 * queries * sizes.L * sizes.P <= tokens * sizes.D,
    )
    if isinstance(config, ListConfig):
        return _plan_lists(config, spatial_shapes, queries, sizes)
    if isinstance(config, WindowConfig):
        return _plan_windows(config, spatial_shapes, sizes)
    return plan_direct("value", dtype, spatial_shapes, batch, queries, sizes)


def _plan_windows(config: WindowConfig, spatial_shapes: SpatialShapes, sizes: Sizes) -> WindowPlan:
    down, across = count_cells(spatial_shapes)
    windows = WindowSizes(
        SIDE=config.side,
        COARSE_SIDE=config.coarse_side,
        BLOCK_Y=config.block_y,
        PADDED_D=max(triton.next_power_of_2(sizes.D), 16),
        INTERPRET=is_interpreted(),
    )
    return WindowPlan(
        programs=down * across * sizes.M,
        cells_across=across,
        sizes=as_constants(sizes),
        windows=as_constants(windows),
        splat_options=_options(config.num_warps),
        rest_tile=_tile_of(config.rest, sizes),
        rest_options=_options(config.rest.num_warps),
    )


def _plan_lists(
    config: ListConfig, spatial_shapes: SpatialShapes, queries: int, sizes: Sizes
) -> ListPlan:
    num_entries = 4 * queries * sizes.M * sizes.L * sizes.P
    wide = sizes.WIDE or 2 * num_entries >= 2**31
    programs = count_list_programs(spatial_shapes, sizes.M, config.rows)
    padded_d = int(triton.next_power_of_2(sizes.D))
    return ListPlan(
        num_entries=num_entries,
        num_lists=programs * config.rows,
        dtype=torch.int64 if wide else torch.int32,
        link_programs=int(triton.cdiv(queries, _LINK_QUERIES)) * sizes.M,
        walk_programs=programs,
        sizes=as_constants(sizes._replace(WIDE=wide)),
        lists=as_constants(Lists(_LINK_QUERIES, 0, config.rows, padded_d)),
        link_options=_options(1),
        walk_options=_options(config.num_warps),
    )


def count_pixels(spatial_shapes: SpatialShapes) -> int:
    """Pixels of all levels."""
    return sum(height * width for height, width in spatial_shapes)


def count_tiles(spatial_shapes: SpatialShapes, num_queries: int, block_q: int, tile_x: int) -> int:
    """Programs per head and image: rows of queries, or rectangles of pixels if tile_x > 0."""
    if tile_x == 0:
        return int(triton.cdiv(num_queries, block_q))
    tile_y = block_q // tile_x
    return sum(triton.cdiv(h, tile_y) * triton.cdiv(w, tile_x) for h, w in spatial_shapes)


def count_cells(spatial_shapes: SpatialShapes) -> tuple[int, int]:
    """(down, across): number of cells that cover every pixel of every level."""
    sides = [max(CELL >> level, 1) for level in range(len(spatial_shapes))]
    return (
        max(triton.cdiv(h, side) for (h, _), side in zip(spatial_shapes, sides, strict=True)),
        max(triton.cdiv(w, side) for (_, w), side in zip(spatial_shapes, sides, strict=True)),
    )


def count_list_programs(spatial_shapes: SpatialShapes, heads: int, rows: int) -> int:
    """Programs of `walk_kernel` per image, each of which serves `rows` lists of one level."""
    pixels = [height * width for height, width in spatial_shapes]
    lists = [COARSE_LISTS if n * COARSE_LISTS <= sum(pixels) else 1 for n in pixels]
    return sum(triton.cdiv(n * k * heads, rows) for n, k in zip(pixels, lists, strict=True))


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=1024, typed=True)  # bundles of equal numbers are equal
def as_constants(bundle: Bundle) -> Bundle:
    """The bundle as a constant of a kernel. (Triton 3.6 wants its fields to be constants, too; the
    interpreter of every version wants plain numbers.)"""
    return bundle if is_interpreted() else type(bundle)(*map(tl.constexpr, bundle))


def _tile_of(config: DirectConfig, sizes: Sizes) -> Tile:
    splits = triton.cdiv(triton.next_power_of_2(sizes.D), config.split_d)
    tile: Tile = as_constants(Tile(config.block_q, config.tile_x, config.split_d, splits))
    return tile


def _options(num_warps: int) -> dict[str, Any]:
    """Options of the compiler; Triton's default of the fusion of multiply and add varies."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}
