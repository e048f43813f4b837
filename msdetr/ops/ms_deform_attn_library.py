"""`torch.ops.msdetr.ms_deform_attn*`: the kernels as operators that autograd, autocast,
torch.compile and torch.export know.

The operators are opaque: compiled code calls them as they are. Spatial shapes travel as a flat list
of integers. A backward operator returns an empty tensor for each gradient that is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdetr.ops.dispatch import register_kernel
from msdetr.structures import SpatialShapes

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")
_LIBRARY.define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights, bool need_value, bool need_points, "
    "bool deterministic) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor projection, "
    "Tensor reference_points, Tensor? valid_sizes) -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor projection, Tensor reference_points, Tensor? valid_sizes, bool need_value, "
    "bool need_projection, bool need_reference, bool deterministic) -> (Tensor, Tensor, Tensor)"
)


def flatten_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    """Height and width of each level, in one list."""
    return [side for shape in spatial_shapes for side in shape]


def _shapes(flat: Sequence[int]) -> SpatialShapes:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _with_dense_channels(value: Tensor) -> Tensor:
    """`value`, copied if its heads and channels do not follow one another in memory."""
    is_dense = value.stride(3) == 1 and value.stride(2) == value.shape[3]
    return value if is_dense else value.contiguous()


def _standard_points(sampling_locations: Tensor, attention_weights: Tensor) -> Any:
    from msdetr.kernels.ms_deform_attn import Points

    locations = sampling_locations.contiguous().flatten(2)
    weights = attention_weights.contiguous().flatten(2)
    return Points(locations, weights, None, attention_weights.shape[-1])


def _fused_points(
    value: Tensor, num_levels: int, projection: Tensor, reference_points: Tensor
) -> Any:
    from msdetr.kernels.ms_deform_attn import Points

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
    from msdetr.kernels import ms_deform_attn as kernels

    points = _standard_points(sampling_locations, attention_weights)
    return kernels.forward(_with_dense_channels(value), _shapes(spatial_shapes), points, None)


def _fused_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    projection: Tensor,
    reference_points: Tensor,
    valid_sizes: Tensor | None,
) -> Tensor:
    from msdetr.kernels import ms_deform_attn as kernels

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
    from msdetr.kernels import ms_deform_attn as kernels

    value, shapes = _with_dense_channels(value), _shapes(spatial_shapes)
    grad_output = grad_output.contiguous()
    points = _standard_points(sampling_locations, attention_weights)
    grad_value, grad_locations, grad_weights = (value.new_empty(0) for _ in range(3))
    if need_points:
        grad_locations = torch.empty_like(points.points)
        grad_weights = torch.empty_like(points.weights)
        kernels.backward_points(
            grad_output,
            value,
            shapes,
            points,
            None,
            grad_locations,
            grad_weights,
            need_reference=False,
        )
        grad_locations = grad_locations.view(sampling_locations.shape)
        grad_weights = grad_weights.view(attention_weights.shape)
    if need_value:
        grad_value = kernels.backward_value(
            grad_output, value, shapes, points, None, deterministic=deterministic
        )
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
    from msdetr.kernels import ms_deform_attn as kernels

    value, shapes = _with_dense_channels(value), _shapes(spatial_shapes)
    grad_output = grad_output.contiguous()
    points = _fused_points(value, len(shapes), projection, reference_points)
    if valid_sizes is not None:
        valid_sizes = valid_sizes.contiguous()
    grad_value, grad_projection, grad_reference = (value.new_empty(0) for _ in range(3))
    if need_projection or need_reference:
        grad_projection = torch.empty(
            projection.shape, dtype=projection.dtype, device=projection.device
        )
        num_offsets = points.points.shape[2]
        found = kernels.backward_points(
            grad_output,
            value,
            shapes,
            points,
            valid_sizes,
            grad_projection[..., :num_offsets],
            grad_projection[..., num_offsets:],
            need_reference=need_reference,
        )
        if found is not None:
            grad_reference = found.to(reference_points.dtype)
    if need_value:
        grad_value = kernels.backward_value(
            grad_output, value, shapes, points, valid_sizes, deterministic=deterministic
        )
    return grad_value, grad_projection, grad_reference


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], points: Tensor, *rest: Any
) -> Tensor:
    batch, _, heads, head_dim = value.shape
    return value.new_empty(batch, points.shape[1], heads * head_dim)


def _contiguous_like(tensor: Tensor, value: Tensor, needed: bool) -> Tensor:
    if not needed:
        return value.new_empty(0)
    return tensor.new_empty(tensor.shape)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_points: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _contiguous_like(value, value, need_value),
        _contiguous_like(sampling_locations, value, need_points),
        _contiguous_like(attention_weights, value, need_points),
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _contiguous_like(value, value, need_value),
        _contiguous_like(projection, value, need_projection or need_reference),
        _contiguous_like(reference_points, value, need_reference),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, *rest = inputs
    ctx.spatial_shapes = spatial_shapes
    ctx.save_for_backward(value, *rest)


def _backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_value, _, need_locations, need_weights = ctx.needs_input_grad
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.msdetr.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        locations,
        weights,
        need_value,
        need_locations or need_weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if need_value else None,
        None,
        grad_locations if need_locations else None,
        grad_weights if need_weights else None,
    )


def _fused_backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_value, _, need_projection, need_reference, _ = ctx.needs_input_grad
    value, projection, reference_points, valid_sizes = ctx.saved_tensors
    grad_value, grad_projection, grad_reference = torch.ops.msdetr.ms_deform_attn_fused_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        projection,
        reference_points,
        valid_sizes,
        need_value,
        need_projection,
        need_reference,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if need_value else None,
        None,
        grad_projection if need_projection else None,
        grad_reference if need_reference else None,
        None,
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "the kernels of deformable attention have no second derivative: use impl='reference'"
    )


def _autocast_forward(device_type: str) -> Any:
    """`value` in autocast's type; locations and weights keep theirs: coordinates need float32."""

    def forward(
        value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
    ) -> Tensor:
        value = _lower(value, device_type)
        with torch.autocast(device_type, enabled=False):
            output: Tensor = torch.ops.msdetr.ms_deform_attn(
                value, spatial_shapes, locations, weights
            )
        return output

    return forward


def _autocast_fused_forward(device_type: str) -> Any:
    """`value` and `projection` in autocast's type; reference points keep theirs."""

    def forward(
        value: Tensor,
        spatial_shapes: Sequence[int],
        projection: Tensor,
        reference_points: Tensor,
        valid_sizes: Tensor | None,
    ) -> Tensor:
        value, projection = _lower(value, device_type), _lower(projection, device_type)
        with torch.autocast(device_type, enabled=False):
            output: Tensor = torch.ops.msdetr.ms_deform_attn_fused(
                value, spatial_shapes, projection, reference_points, valid_sizes
            )
        return output

    return forward


def _lower(tensor: Tensor, device_type: str) -> Tensor:
    if tensor.device.type != device_type or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


register_kernel(_LIBRARY, "ms_deform_attn", _forward)
register_kernel(_LIBRARY, "ms_deform_attn_fused", _fused_forward)
register_kernel(_LIBRARY, "ms_deform_attn_backward", _backward)
register_kernel(_LIBRARY, "ms_deform_attn_fused_backward", _fused_backward)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("ms_deform_attn", _autocast_forward(_key.lower()), f"Autocast{_key}")
    _LIBRARY.impl("ms_deform_attn_fused", _autocast_fused_forward(_key.lower()), f"Autocast{_key}")

for _name, _fake in (
    ("ms_deform_attn", _forward_fake),
    ("ms_deform_attn_fused", _forward_fake),
    ("ms_deform_attn_backward", _backward_fake),
    ("ms_deform_attn_fused_backward", _fused_backward_fake),
):
    torch.library.register_fake(f"msdetr::{_name}", _fake, lib=_LIBRARY)

torch.library.register_autograd(
    "msdetr::ms_deform_attn", _backward_formula, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "msdetr::ms_deform_attn_fused", _fused_backward_formula, setup_context=_save, lib=_LIBRARY
)
for _name in ("ms_deform_attn_backward", "ms_deform_attn_fused_backward"):
    torch.library.register_autograd(f"msdetr::{_name}", _no_second_derivative, lib=_LIBRARY)
