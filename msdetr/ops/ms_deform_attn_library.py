"""`torch.ops.msdetr.ms_deform_attn*`: the kernels of deformable attention as operators.

Spatial shapes are passed as a flat list of integers. A backward operator returns an empty tensor
for each gradient that is not needed. With autocast, `value` and `projection` are converted, and
coordinates and weights keep their types: a coordinate needs float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdetr.ops.registration import no_second_derivative, register_op
from msdetr.structures import SpatialShapes

if TYPE_CHECKING:
    from msdetr.kernels.ms_deform_attn.launch import Points


def flatten_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    """Height and width of each level, in one list."""
    return [side for shape in spatial_shapes for side in shape]


def _shapes(flat: Sequence[int]) -> SpatialShapes:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _with_dense_channels(value: Tensor) -> Tensor:
    """`value`, copied unless its heads and channels are contiguous in memory."""
    is_dense = value.stride(3) == 1 and value.stride(2) == value.shape[3]
    return value if is_dense else value.contiguous()


def _standard_points(sampling_locations: Tensor, attention_weights: Tensor) -> Points:
    from msdetr.kernels.ms_deform_attn.launch import Points

    locations = sampling_locations.contiguous().flatten(2)
    weights = attention_weights.contiguous().flatten(2)
    return Points(locations, weights, None, attention_weights.shape[-1])


def _fused_points(
    value: Tensor, num_levels: int, projection: Tensor, reference_points: Tensor
) -> Points:
    from msdetr.kernels.ms_deform_attn.launch import Points

    if projection.stride(2) != 1:
        projection = projection.contiguous()
    samples = projection.shape[2] // 3
    offsets, logits = projection.split((2 * samples, samples), dim=2)
    points = samples // (value.shape[2] * num_levels)
    return Points(offsets, logits, reference_points.contiguous(), points)


def _forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    from msdetr.kernels.ms_deform_attn import launch as kernels

    points = _standard_points(sampling_locations, attention_weights)
    return kernels.forward(_with_dense_channels(value), _shapes(spatial_shapes), points, None)


def _fused_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    projection: Tensor,
    reference_points: Tensor,
    valid_sizes: Tensor | None,
) -> Tensor:
    from msdetr.kernels.ms_deform_attn import launch as kernels

    shapes = _shapes(spatial_shapes)
    points = _fused_points(value, len(shapes), projection, reference_points)
    if valid_sizes is not None:
        valid_sizes = valid_sizes.contiguous()
    return kernels.forward(_with_dense_channels(value), shapes, points, valid_sizes)


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_points: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from msdetr.kernels.ms_deform_attn import launch as kernels

    points = _standard_points(sampling_locations, attention_weights)
    arguments = (
        grad_output.contiguous(),
        _with_dense_channels(value),
        _shapes(spatial_shapes),
        points,
        None,
    )
    grad_value, grad_locations, grad_weights = (value.new_empty(0) for _ in range(3))
    if need_points:
        grad_locations = torch.empty_like(points.points)
        grad_weights = torch.empty_like(points.weights)
        kernels.backward_points(*arguments, grad_locations, grad_weights, need_reference=False)
        grad_locations = grad_locations.view(sampling_locations.shape)
        grad_weights = grad_weights.view(attention_weights.shape)
    if need_value:
        grad_value = kernels.backward_value(*arguments, deterministic=deterministic)
    return grad_value, grad_locations, grad_weights


def _fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    projection: Tensor,
    reference_points: Tensor,
    valid_sizes: Tensor | None,
    need_value: bool,
    need_projection: bool,
    need_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from msdetr.kernels.ms_deform_attn import launch as kernels

    shapes = _shapes(spatial_shapes)
    points = _fused_points(value, len(shapes), projection, reference_points)
    if valid_sizes is not None:
        valid_sizes = valid_sizes.contiguous()
    arguments = (grad_output.contiguous(), _with_dense_channels(value), shapes, points, valid_sizes)
    grad_value, grad_projection, grad_reference = (value.new_empty(0) for _ in range(3))
    if need_projection or need_reference:
        grad_projection = torch.empty(
            projection.shape, dtype=projection.dtype, device=projection.device
        )
        gradients = grad_projection.split((points.points.shape[2], points.weights.shape[2]), dim=2)
        reference = kernels.backward_points(*arguments, *gradients, need_reference=need_reference)
        if reference is not None:
            grad_reference = reference.to(reference_points.dtype)
    if need_value:
        grad_value = kernels.backward_value(*arguments, deterministic=deterministic)
    return grad_value, grad_projection, grad_reference


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], points: Tensor, *rest: Any
) -> Tensor:
    batch, _, heads, head_dim = value.shape
    return value.new_empty(batch, points.shape[1], heads * head_dim)


def _empty_gradients(
    value: Tensor, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if is_needed else value.new_empty(0)
        for tensor, is_needed in zip(tensors, needed, strict=True)
    )


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_points: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    tensors = (value, sampling_locations, attention_weights)
    return _empty_gradients(value, tensors, (need_value, need_points, need_points))


def _fused_backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    projection: Tensor,
    reference_points: Tensor,
    valid_sizes: Tensor | None,
    need_value: bool,
    need_projection: bool,
    need_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    needed = (need_value, need_projection or need_reference, need_reference)
    return _empty_gradients(value, (value, projection, reference_points), needed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_value, _, *need_points = ctx.needs_input_grad
    value, *points = ctx.saved_tensors
    grad_value, *grad_points = torch.ops.msdetr.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        *points,
        need_value,
        any(need_points),
        torch.are_deterministic_algorithms_enabled(),
    )
    return _needed_only((grad_value, None, *grad_points), ctx.needs_input_grad)


def _fused_backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_value, _, need_projection, need_reference, _ = ctx.needs_input_grad
    value, *points = ctx.saved_tensors
    grad_value, *grad_points = torch.ops.msdetr.ms_deform_attn_fused_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        *points,
        need_value,
        need_projection,
        need_reference,
        torch.are_deterministic_algorithms_enabled(),
    )
    return _needed_only((grad_value, None, *grad_points, None), ctx.needs_input_grad)


def _needed_only(
    gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return tuple(
        gradient if is_needed else None
        for gradient, is_needed in zip(gradients, needed, strict=True)
    )


register_op(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor",
    _forward,
    fake=_forward_fake,
    backward=_backward_formula,
    save=_save,
    autocast=(0,),
)
register_op(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights, bool need_value, bool need_points, "
    "bool deterministic) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
    backward=no_second_derivative("the deformable attention kernel"),
)
register_op(
    "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor projection, "
    "Tensor reference_points, Tensor? valid_sizes) -> Tensor",
    _fused_forward,
    fake=_forward_fake,
    backward=_fused_backward_formula,
    save=_save,
    autocast=(0, 2),
)
register_op(
    "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor projection, Tensor reference_points, Tensor? valid_sizes, bool need_value, "
    "bool need_projection, bool need_reference, bool deterministic) -> (Tensor, Tensor, Tensor)",
    _fused_backward,
    fake=_fused_backward_fake,
    backward=no_second_derivative("the deformable attention kernel"),
)
