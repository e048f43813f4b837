"""The chunked operator for a CPU against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from msdetr.ops.ms_deform_attn_library import flatten_shapes

SHAPES = ((5, 4), (1, 3), (2, 1))
TOKENS = sum(height * width for height, width in SHAPES)


def arguments(
    batch: int = 2, queries: int = 6, heads: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations (some outside of the maps) and weights."""
    generator = torch.Generator().manual_seed(queries)
    value = torch.randn(batch, TOKENS, heads, 5, dtype=dtype, generator=generator)
    shape = (batch, queries, heads, len(SHAPES), 2)
    locations = torch.rand(*shape, 2, dtype=dtype, generator=generator) * 1.6 - 0.3
    weights = torch.rand(shape, dtype=dtype, generator=generator)
    return value, locations, weights


def run(arguments: tuple[Tensor, Tensor, Tensor], impl: str) -> tuple[Tensor, ...]:
    """Output and all gradients."""
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in arguments)
    output = ms_deform_attn(value, SHAPES, locations, weights, impl=impl)
    ramp = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), *torch.autograd.grad(output, (value, locations, weights), ramp)


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 6), (3, 0), (2, 17)])
@pytest.mark.parametrize("threads", [1, 2])
def test_output_and_gradients_are_those_of_the_reference(batch: int, queries: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = run(arguments(batch, queries), "auto")
    finally:
        torch.set_num_threads(before)
    for ours, reference in zip(result, run(arguments(batch, queries), "reference"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_bfloat16_adds_in_float32():
    low = arguments(dtype=torch.float32)
    value = low[0].bfloat16()
    result = run((value, *low[1:]), "auto")
    expected = run((value.float(), *low[1:]), "reference")
    assert result[0].dtype == result[1].dtype == torch.bfloat16
    assert result[2].dtype == result[3].dtype == torch.float32
    torch.testing.assert_close(result[0].float(), expected[0], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30, 3.0, -1.0, 2.0])
def test_locations_out_of_range_sample_zero_and_have_no_gradient(bad: float):
    value, locations, weights = arguments()
    locations[0, 1] = bad
    result = run((value, locations, weights), "auto")
    for ours, reference in zip(result, run((value, locations, weights), "reference"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert not result[0][0, 1].any()
    assert not result[2][0, 1].any()


def test_strided_arguments():
    value, locations, weights = arguments()
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        locations.flip(1)[:, ::2],
        weights.flip(1)[:, ::2],
    )
    assert not strided[0].is_contiguous()
    for ours, reference in zip(run(strided, "auto"), run(strided, "reference"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_gradients_by_differences():
    value, locations, weights = (tensor.requires_grad_() for tensor in arguments(1, 2, 1))
    # At random locations: there is no derivative where a sample crosses a pixel centre.
    assert torch.autograd.gradcheck(
        lambda *args: ms_deform_attn(args[0], SHAPES, *args[1:]), (value, locations, weights)
    )


def test_the_operator_is_registered_completely():
    value, locations, weights = (tensor.requires_grad_() for tensor in arguments())
    torch.library.opcheck(
        torch.ops.msdetr.ms_deform_attn_chunked,
        (value, flatten_shapes(SHAPES), locations, weights),
    )


def test_only_the_arguments_are_kept_for_the_backward_pass():
    kept: list[Tensor] = []
    inputs = [tensor.requires_grad_() for tensor in arguments(queries=50)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2])
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in inputs}


def test_second_derivatives_are_refused():
    value, locations, weights = (tensor.requires_grad_() for tensor in arguments())
    output = ms_deform_attn(value, SHAPES, locations, weights)
    (first,) = torch.autograd.grad(output.sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        first.sum().backward()


def test_compiles_in_one_graph():
    value = arguments(dtype=torch.float32)[0]
    projection = torch.randn(2, 6, 3 * len(SHAPES) * 2 * 3)
    reference = torch.rand(2, 6, len(SHAPES), 4)

    def attend(value: Tensor, projection: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, SHAPES, projection, reference)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, projection), attend(value, projection))
