"""Launchers of the multi-scale deformable attention kernels.

Both public ops use the same kernels. They differ in the points and weights of a query (R):

    R = 0     sampling locations [B, Q, M, L, P, 2] and attention weights [B, Q, M, L, P]
    R = 2, 4  offsets and logits, both slices of one projection, with reference points [B, Q, L, R]

Forward is one kernel. Backward is one kernel for points, weights and reference points, and one for
`value`: window sums if the queries are the pixels of the levels, otherwise a plain reduction. Two
kernels by lists if queries are few, or results must repeat. Every kernel recomputes locations and
weights, so only the inputs are kept.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.kernels.ms_deform_attn.cells import CELL, WindowSizes
from msdetr.kernels.ms_deform_attn.configs import (
    DirectConfig,
    Kernel,
    ListConfig,
    WindowConfig,
    default_lists,
    tile_config,
    value_config,
)
from msdetr.kernels.ms_deform_attn.forward import forward_kernel
from msdetr.kernels.ms_deform_attn.lists import COARSE_LISTS, Lists, link_kernel, walk_kernel
from msdetr.kernels.ms_deform_attn.points import points_kernel
from msdetr.kernels.ms_deform_attn.rest import rest_kernel
from msdetr.kernels.ms_deform_attn.sampling import Maps, Queries, Sizes, Tile, Value
from msdetr.kernels.ms_deform_attn.value import value_kernel
from msdetr.kernels.ms_deform_attn.windows import splat_kernel
from msdetr.structures import SpatialShapes

_LINK_QUERIES = 32  # queries of a program of `link_kernel`, a warp

Bundle = TypeVar("Bundle", Sizes, Tile, WindowSizes, Lists)


class Points(NamedTuple):
    """Points and weights of queries: the arguments of an op in the layout of the kernels.

    `points` is [B, Q, M * L * P * 2] and `weights` [B, Q, M * L * P], each contiguous in its last
    dimension. `reference` is [B, Q, L, R] and contiguous; if it is None, points are locations.
    """

    points: Tensor
    weights: Tensor
    reference: Tensor | None
    num_points: int

    @property
    def reference_dim(self) -> int:
        """R of the module's docstring."""
        return 0 if self.reference is None else self.reference.shape[-1]


@functools.lru_cache(maxsize=1024)
def pack_levels(spatial_shapes: SpatialShapes) -> tuple[int, ...]:
    """height << 32 | width of each level."""
    return tuple(height << 32 | width for height, width in spatial_shapes)


@functools.lru_cache(maxsize=1024)
def count_tiles(spatial_shapes: SpatialShapes, num_queries: int, block_q: int, tile_x: int) -> int:
    """Programs per head and image: rows of queries, or rectangles of pixels if tile_x > 0."""
    if tile_x == 0:
        return int(triton.cdiv(num_queries, block_q))
    tile_y = block_q // tile_x
    return sum(triton.cdiv(h, tile_y) * triton.cdiv(w, tile_x) for h, w in spatial_shapes)


@functools.lru_cache(maxsize=1024)
def count_cells(spatial_shapes: SpatialShapes) -> tuple[int, int]:
    """(down, across): number of cells that cover every pixel of every level."""
    sides = [max(CELL >> level, 1) for level in range(len(spatial_shapes))]
    return (
        max(triton.cdiv(h, side) for (h, _), side in zip(spatial_shapes, sides, strict=True)),
        max(triton.cdiv(w, side) for (_, w), side in zip(spatial_shapes, sides, strict=True)),
    )


@functools.lru_cache(maxsize=1024)
def count_list_programs(spatial_shapes: SpatialShapes, heads: int, rows: int) -> int:
    """Programs of `walk_kernel` per image, each of which serves `rows` lists of one level."""
    pixels = [height * width for height, width in spatial_shapes]
    lists = [COARSE_LISTS if n * COARSE_LISTS <= sum(pixels) else 1 for n in pixels]
    return sum(triton.cdiv(n * k * heads, rows) for n, k in zip(pixels, lists, strict=True))


def needs_wide_offsets(spatial_shapes: SpatialShapes, num_queries: int, *strides: int) -> bool:
    """Whether an offset within one level, or within the queries of an image, can exceed 2^31 - 1.

    Offsets of images and levels are always 64-bit. `strides` are elements per token or query.
    Includes corners outside of the map, whose offsets are computed but not used.
    """
    rows = max((height + 3) * (width + 3) for height, width in spatial_shapes)
    return max(rows, num_queries) * max(strides) >= 2**31


class Plan(NamedTuple):
    """Launch of a direct kernel. Depends only on sizes, and is cached."""

    programs: int
    """Per image."""
    sizes: Sizes
    tile: Tile
    options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def plan_direct(
    kernel: Kernel,
    dtype: torch.dtype,
    spatial_shapes: SpatialShapes,
    batch: int,
    queries: int,
    sizes: Sizes,
    need_reference: bool = False,
) -> Plan:
    """Number of programs and compile-time constants of a direct kernel."""
    is_grid = queries == sum(height * width for height, width in spatial_shapes)
    config = tile_config(
        kernel,
        dtype,
        sizes.D,
        batch * sizes.M * queries,
        is_grid=is_grid,
        need_reference=need_reference,
    )
    programs = sizes.M * count_tiles(spatial_shapes, queries, config.block_q, config.tile_x)
    tile = tile_of(config, sizes)
    return Plan(programs, as_constants(sizes), as_constants(tile), launch_options(config.num_warps))


def forward(
    value: Tensor, spatial_shapes: SpatialShapes, points: Points, valid_sizes: Tensor | None
) -> Tensor:
    """[B, Q, M * D] from value [B, S, M, D], whose heads and channels are contiguous."""
    batch, _, heads, head_dim = value.shape
    queries = points.points.shape[1]
    output = value.new_empty(batch, queries, heads * head_dim)
    if not output.numel():
        return output
    sizes = _sizes(value, spatial_shapes, points)
    plan = plan_direct("forward", value.dtype, spatial_shapes, batch, queries, sizes)
    forward_kernel[(plan.programs * batch,)](
        Value(value, *value.stride()[:2]),
        _queries(points.points, points.weights, points.reference),
        Maps(pack_levels(spatial_shapes), valid_sizes),
        output,
        queries,
        plan.programs,
        plan.sizes,
        plan.tile,
        **plan.options,
    )
    return output


def backward_points(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    points: Points,
    valid_sizes: Tensor | None,
    grad_points: Tensor,
    grad_weights: Tensor,
    *,
    need_reference: bool,
) -> Tensor | None:
    """Write the gradients of points and weights; return that of reference points if needed.

    `grad_points` and `grad_weights` have the shapes of `points`; `grad_output` is contiguous.
    """
    batch, _, heads, _ = value.shape
    queries = points.points.shape[1]
    sizes = _sizes(value, spatial_shapes, points)
    grad_reference = None
    if need_reference:
        shape = (batch, heads, queries, sizes.L, sizes.R)  # a term per head
        grad_reference = value.new_empty(shape, dtype=torch.float32)
    if grad_points.numel():
        plan = plan_direct(
            "points", value.dtype, spatial_shapes, batch, queries, sizes, need_reference
        )
        points_kernel[(plan.programs * batch,)](
            grad_output,
            Value(value, *value.stride()[:2]),
            _queries(points.points, points.weights, points.reference),
            Maps(pack_levels(spatial_shapes), valid_sizes),
            _queries(grad_points, grad_weights, grad_reference),
            queries,
            plan.programs,
            plan.sizes,
            plan.tile,
            **plan.options,
        )
    return None if grad_reference is None else grad_reference.sum(1)


def backward_value(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    points: Points,
    valid_sizes: Tensor | None,
    *,
    deterministic: bool,
) -> Tensor:
    """The gradient of `value`, contiguous and in its type; `grad_output` is contiguous."""
    batch, tokens, heads, head_dim = value.shape
    queries = points.points.shape[1]
    if not grad_output.numel():
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    sizes = _sizes(value, spatial_shapes, points)
    inputs = (
        grad_output,
        _queries(points.points, points.weights, points.reference),
        Maps(pack_levels(spatial_shapes), valid_sizes),
    )
    config: DirectConfig | WindowConfig | ListConfig = default_lists(head_dim)
    if not deterministic:
        config = value_config(
            value.dtype,
            head_dim,
            batch * heads * queries,
            num_points=sizes.P,
            is_grid=queries == tokens,
            can_window=sizes.R > 0 and not sizes.WIDE,
            # Four entries of 8 bytes per sample, against 4 bytes per element.
            can_list=queries == tokens or 8 * queries * sizes.L * sizes.P <= tokens * head_dim,
        )
    if isinstance(config, ListConfig):
        scale = _fixed_point_scale(grad_output, points) if deterministic else None
        return _sum_lists(config, inputs, value, spatial_shapes, sizes, scale)
    total = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    if isinstance(config, WindowConfig):
        _add_windows(config, inputs, total, spatial_shapes, sizes)
    else:
        plan = plan_direct("value", value.dtype, spatial_shapes, batch, queries, sizes)
        value_kernel[(plan.programs * batch,)](
            *inputs, total, queries, tokens, plan.programs, plan.sizes, plan.tile, **plan.options
        )
    return total.to(value.dtype)


def _sum_lists(
    config: ListConfig,
    inputs: tuple[Tensor, Queries, Maps],
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sizes: Sizes,
    fixed_point: Tensor | None,
) -> Tensor:
    grad_output, queries, maps = inputs
    batch, tokens = value.shape[:2]
    num_queries = grad_output.shape[1]
    num_entries = 4 * num_queries * sizes.M * sizes.L * sizes.P
    wide = sizes.WIDE or 2 * num_entries >= 2**31
    dtype = torch.int64 if wide else torch.int32
    programs = count_list_programs(spatial_shapes, sizes.M, config.rows)
    first = torch.zeros(batch, programs * config.rows, dtype=dtype, device=value.device)
    entries = torch.empty(batch, num_entries, 2, dtype=dtype, device=value.device)
    result = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    padded_d = int(triton.next_power_of_2(sizes.D))
    constants = (
        as_constants(sizes._replace(WIDE=wide)),
        as_constants(Lists(_LINK_QUERIES, 0, config.rows, padded_d)),
    )
    link_programs = triton.cdiv(num_queries, _LINK_QUERIES) * sizes.M
    link_kernel[(link_programs * batch, sizes.L)](
        queries,
        maps,
        first,
        entries,
        num_queries,
        tokens,
        link_programs,
        first.shape[1],
        *constants,
        **launch_options(1),
    )
    walk_kernel[(programs * batch,)](
        grad_output,
        maps,
        first,
        entries,
        result,
        fixed_point,
        num_queries,
        tokens,
        programs,
        *constants,
        **launch_options(config.num_warps),
    )
    return result


def _add_windows(
    config: WindowConfig,
    inputs: tuple[Tensor, Queries, Maps],
    total: Tensor,
    spatial_shapes: SpatialShapes,
    sizes: Sizes,
) -> None:
    down, across = count_cells(spatial_shapes)
    programs = down * across * sizes.M
    grid = (programs * len(total),)
    origins = total.new_empty(*grid, sizes.L, 3)
    windows = WindowSizes(
        SIDE=config.side,
        COARSE_SIDE=config.coarse_side,
        BLOCK_Y=config.block_y,
        PADDED_D=max(triton.next_power_of_2(sizes.D), 16),
        INTERPRET=is_interpreted(),
    )
    arguments = (*inputs, total, origins, total.shape[1], programs, across)
    constants = (as_constants(sizes), as_constants(windows))
    splat_kernel[grid](*arguments, *constants, **launch_options(config.num_warps))
    tile = as_constants(tile_of(config.rest, sizes))
    rest_kernel[grid](*arguments, *constants, tile, **launch_options(config.rest.num_warps))


def _fixed_point_scale(grad_output: Tensor, points: Points) -> Tensor:
    """[] float32, a power of two: units per 1, such that no int64 sum can overflow.

    The gradient of a pixel is at most (sum of weights of a query) x Q x max |g|. The weights of a
    softmax sum to 1.
    """
    bound = grad_output.abs().amax().to(torch.float64)
    terms = points.points.shape[1]
    if points.reference is None:
        bound = bound * points.weights.abs().amax().to(torch.float64)
        terms *= points.weights.shape[2]
    exponent = torch.frexp(bound * terms).exponent
    # Within the range of float32; it could not hold results below 2^-126 anyway.
    scale = torch.exp2((62 - exponent).clamp(-120, 120).to(torch.float64))
    return (scale + bound * 0.0).to(torch.float32)  # NaN if g is not finite


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=1024, typed=True)  # bundles of equal numbers are equal
def as_constants(bundle: Bundle) -> Bundle:
    """The bundle as a constant of a kernel. (Triton 3.6 wants its fields to be constants, too; the
    interpreter of every version wants plain numbers.)"""
    return bundle if is_interpreted() else type(bundle)(*map(tl.constexpr, bundle))


def tile_of(config: DirectConfig, sizes: Sizes) -> Tile:
    """The tile of a configuration."""
    splits = triton.cdiv(triton.next_power_of_2(sizes.D), config.split_d)
    return Tile(config.block_q, config.tile_x, config.split_d, splits)


def launch_options(num_warps: int) -> dict[str, Any]:
    """Options of the compiler; Triton's default of the fusion of multiply and add varies."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def _sizes(value: Tensor, spatial_shapes: SpatialShapes, points: Points) -> Sizes:
    return sizes_of(
        spatial_shapes,
        points.points.shape[1],
        value.shape[2],
        value.shape[3],
        points.num_points,
        points.reference_dim,
        (value.stride(1), points.points.stride(1), points.weights.stride(1)),
    )


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
    strides = (*strides, heads * head_dim, levels * reference_dim)
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


def _queries(points: Tensor, weights: Tensor, reference: Tensor | None) -> Queries:
    return Queries(points, weights, reference, *points.stride()[:2], *weights.stride()[:2])
