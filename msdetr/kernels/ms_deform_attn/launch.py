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
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from msdetr.kernels.ms_deform_attn.forward import forward_kernel
from msdetr.kernels.ms_deform_attn.lists import link_kernel, walk_kernel
from msdetr.kernels.ms_deform_attn.plan import (
    ListPlan,
    WindowPlan,
    pack_levels,
    plan_direct,
    plan_value,
    sizes_of,
)
from msdetr.kernels.ms_deform_attn.points import points_kernel
from msdetr.kernels.ms_deform_attn.rest import rest_kernel
from msdetr.kernels.ms_deform_attn.sampling import Maps, Queries, Sizes, Value
from msdetr.kernels.ms_deform_attn.value import value_kernel
from msdetr.kernels.ms_deform_attn.windows import splat_kernel
from msdetr.structures import SpatialShapes

P = ParamSpec("P")
T = TypeVar("T")

_MAX_IMAGES = 65535  # per launch: the second dimension of a grid


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


def _split_images(launcher: Callable[P, T]) -> Callable[P, T]:
    """Calls a launcher several times if there are more images than one grid can hold."""

    def part(argument: Any, images: slice) -> Any:
        if isinstance(argument, Points):
            return Points(*(part(field, images) for field in argument))
        return argument[images] if isinstance(argument, Tensor) else argument

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        batch = len(args[0])  # type: ignore[arg-type]  # a tensor
        if batch <= _MAX_IMAGES:
            return launcher(*args, **kwargs)
        starts = range(0, batch, _MAX_IMAGES)
        parts: list[Any] = [
            launcher(*(part(x, slice(start, start + _MAX_IMAGES)) for x in args), **kwargs)
            for start in starts
        ]
        return cast(T, None if parts[0] is None else torch.cat(parts))

    return launch


@_split_images
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
    forward_kernel[(plan.programs, batch)](
        Value(value, *value.stride()[:2]),
        _queries(points.points, points.weights, points.reference),
        Maps(pack_levels(spatial_shapes), valid_sizes),
        output,
        queries,
        plan.sizes,
        plan.tile,
        **plan.options,
    )
    return output


@_split_images
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
        points_kernel[(plan.programs, batch)](
            grad_output,
            Value(value, *value.stride()[:2]),
            _queries(points.points, points.weights, points.reference),
            Maps(pack_levels(spatial_shapes), valid_sizes),
            _queries(grad_points, grad_weights, grad_reference),
            queries,
            plan.sizes,
            plan.tile,
            **plan.options,
        )
    return None if grad_reference is None else grad_reference.sum(1)


@_split_images
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
    batch, tokens = value.shape[:2]
    queries = points.points.shape[1]
    if not grad_output.numel():
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    sizes = _sizes(value, spatial_shapes, points)
    plan = plan_value(value.dtype, spatial_shapes, batch, queries, sizes, deterministic)
    inputs = (
        grad_output,
        _queries(points.points, points.weights, points.reference),
        Maps(pack_levels(spatial_shapes), valid_sizes),
    )
    if isinstance(plan, ListPlan):
        scale = _fixed_point_scale(grad_output, points, sizes) if deterministic else None
        return _sum_lists(plan, *inputs, value, scale)
    total = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    if isinstance(plan, WindowPlan):
        origins = total.new_empty(batch, plan.programs, sizes.L, 3)
        arguments = (*inputs, total, origins, queries, plan.cells_across)
        constants = (plan.sizes, plan.windows)
        grid = (plan.programs, batch)
        splat_kernel[grid](*arguments, *constants, **plan.splat_options)
        rest_kernel[grid](*arguments, *constants, plan.rest_tile, **plan.rest_options)
    else:
        value_kernel[(plan.programs, batch)](
            *inputs, total, queries, tokens, plan.sizes, plan.tile, **plan.options
        )
    return total.to(value.dtype)


def _sum_lists(
    plan: ListPlan,
    grad_output: Tensor,
    queries: Queries,
    maps: Maps,
    value: Tensor,
    fixed_point: Tensor | None,
) -> Tensor:
    batch, tokens = value.shape[:2]
    num_queries = grad_output.shape[1]
    first = torch.zeros(batch, plan.num_lists, dtype=plan.dtype, device=value.device)
    entries = first.new_empty(batch, plan.num_entries, 2)
    result = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    link_kernel[(plan.link_programs, batch, len(maps.levels))](
        queries,
        maps,
        first,
        entries,
        num_queries,
        tokens,
        plan.num_lists,
        plan.sizes,
        plan.lists,
        **plan.link_options,
    )
    walk_kernel[(plan.walk_programs, batch)](
        grad_output,
        maps,
        first,
        entries,
        result,
        fixed_point,
        num_queries,
        tokens,
        plan.sizes,
        plan.lists,
        **plan.walk_options,
    )
    return result


def _fixed_point_scale(grad_output: Tensor, points: Points, sizes: Sizes) -> Tensor:
    """[] float32, a power of two: units per 1, such that no int64 sum can overflow.

    The gradient of a pixel is at most (sum of weights of a query) x Q x max |g|. The weights of a
    softmax sum to 1. NaN if g or the weights are not finite: that makes the whole gradient NaN.
    """
    bound = grad_output.abs().amax().to(torch.float64)
    terms = points.points.shape[1]
    if points.reference is None:
        bound = bound * points.weights.abs().amax().to(torch.float64)
        terms *= points.weights.shape[2]
    else:
        # A softmax is finite if the highest logit is.
        highest = points.weights.unflatten(2, (sizes.M, -1)).amax(-1)
        bound = bound + (highest * 0.0).sum()
    exponent = torch.frexp(bound * terms).exponent
    # Within the range of float32; it could not hold results below 2^-126 anyway.
    scale = torch.exp2((62 - exponent).clamp(-120, 120).to(torch.float64))
    return (scale + bound * 0.0).to(torch.float32)


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


def _queries(points: Tensor, weights: Tensor, reference: Tensor | None) -> Queries:
    return Queries(points, weights, reference, *points.stride()[:2], *weights.stride()[:2])
