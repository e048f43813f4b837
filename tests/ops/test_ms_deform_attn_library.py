"""The registered operators under opcheck, autograd, autocast, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from ops.test_ms_deform_attn import random_inputs
from ops.test_ms_deform_attn_kernel import random_call
from torch import Tensor, nn

from msdetr.model.attention import MSDeformAttn
from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

SHAPES = ((3, 4), (2, 2))
FLAT = [3, 4, 2, 2]
SIZES = {"shapes": SHAPES, "heads": 2, "head_dim": 4, "points": 2}


class TestOpcheck:
    @pytest.mark.parametrize("valid_sizes", [None, [[[2, 3], [1, 2]]]], ids=["whole", "padded"])
    def test_fused(self, kernel_device, valid_sizes):
        call = random_call(kernel_device, **SIZES, valid_sizes=valid_sizes)
        inputs = [x.requires_grad_() for x in (call.value, call.projection, call.reference)]
        op = torch.ops.msdetr.ms_deform_attn_fused.default
        torch.library.opcheck(op, (inputs[0], FLAT, *inputs[1:], call.valid_sizes))

    def test_fused_backward(self, kernel_device):
        call = random_call(kernel_device, **SIZES)
        op = torch.ops.msdetr.ms_deform_attn_fused_backward.default
        tensors = (call.grad_output, call.value, FLAT, call.projection, call.reference, None)
        # The order of sums in the gradient of `value` varies: its values are not compared.
        torch.library.opcheck(op, (*tensors, False, True, True, False))
        torch.library.opcheck(
            op,
            (*tensors, True, False, False, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )

    def test_standard(self, kernel_device):
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=SHAPES)]
        inputs = [x.requires_grad_() for x in inputs]
        torch.library.opcheck(
            torch.ops.msdetr.ms_deform_attn.default, (inputs[0], FLAT, *inputs[1:])
        )

    def test_standard_backward(self, kernel_device):
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=SHAPES)]
        grad_output = torch.randn(2, 3, 6, device=kernel_device)
        op = torch.ops.msdetr.ms_deform_attn_backward.default
        torch.library.opcheck(op, (grad_output, inputs[0], FLAT, *inputs[1:], False, True, False))


@pytest.mark.parametrize("op", ["fused", "standard"])
def test_second_derivatives_are_refused(kernel_device, op):
    """Otherwise they would be wrong silently."""
    if op == "fused":
        call = random_call(kernel_device, **SIZES)
        value = call.value.requires_grad_()
        output = ms_deform_attn_fused(value, SHAPES, call.projection, call.reference, impl="triton")
    else:
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=SHAPES)]
        value = inputs[0].requires_grad_()
        output = ms_deform_attn(value, SHAPES, *inputs[1:], impl="triton")
    grad_output = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, value, grad_output, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


class Layer(nn.Module):
    """Attention as the model calls it, with padding, on fixed levels."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = MSDeformAttn(8, num_levels=2, num_heads=2, num_points=2)
        self.attention.impl = impl
        nn.init.normal_(self.attention.sampling_offsets.weight)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        return self.attention(query, reference, tokens, SHAPES, valid)


def layer_inputs(device: torch.device) -> tuple[Tensor, ...]:
    return (
        torch.randn(1, 3, 8, device=device),
        torch.rand(1, 3, 2, 2, device=device),
        torch.randn(1, 16, 8, device=device),
        torch.tensor([[[2, 3], [1, 2]]], device=device),
    )


class TestCompile:
    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
    )
    def test_whole_layer_in_one_graph(self, kernel_device, backend):
        torch._dynamo.reset()
        layer = Layer("triton").to(kernel_device)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        inputs = layer_inputs(kernel_device)
        expected = layer(*inputs)
        expected.square().sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        result = compiled(*inputs)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)

    def test_dynamic_batch_and_queries(self, kernel_device):
        torch._dynamo.reset()
        compiled = torch.compile(
            ms_deform_attn_fused, backend="aot_eager", fullgraph=True, dynamic=True
        )
        for batch, queries in ((2, 3), (3, 5), (4, 2)):
            call = random_call(kernel_device, **SIZES, batch=batch, queries=queries)
            arguments = (call.value, SHAPES, call.projection, call.reference)
            torch.testing.assert_close(
                compiled(*arguments, impl="triton"), ms_deform_attn_fused(*arguments)
            )

    def test_the_reference_compiles_as_well(self):
        torch._dynamo.reset()
        layer, inputs = Layer("auto"), layer_inputs(torch.device("cpu"))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_export(kernel_device):
    layer, inputs = Layer("triton").to(kernel_device), layer_inputs(kernel_device)
    program = torch.export.export(layer, inputs)
    assert "msdetr.ms_deform_attn_fused" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


class TestAutocast:
    def test_value_and_projection_are_lowered_and_coordinates_are_not(self, kernel_device):
        call = random_call(kernel_device, **SIZES)
        inputs = [x.requires_grad_() for x in (call.value, call.projection, call.reference)]
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            output = ms_deform_attn_fused(inputs[0], SHAPES, *inputs[1:], impl="triton")
        assert output.dtype == torch.bfloat16
        lowered = [inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2]]
        expected = ms_deform_attn_fused(lowered[0], SHAPES, *lowered[1:], impl="triton")
        assert torch.equal(output, expected)
        gradients = torch.autograd.grad(output.float().sum(), inputs)
        assert [x.dtype for x in gradients] == [torch.float32] * 3

    def test_standard_locations_and_weights_keep_their_type(self, kernel_device):
        inputs = [x.float().to(kernel_device) for x in random_inputs(shapes=SHAPES)]
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:], impl="triton")
        lowered = ms_deform_attn(inputs[0].bfloat16(), SHAPES, *inputs[1:], impl="triton")
        assert torch.equal(output, lowered)

    def test_layer(self, kernel_device):
        inputs = layer_inputs(kernel_device)
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            result, expected = (
                Layer(impl).to(kernel_device)(*inputs) for impl in ("triton", "reference")
            )
        torch.testing.assert_close(result, expected, rtol=0.03, atol=0.03)


@pytest.mark.gpu
class TestGpu:
    def test_graph_capture(self, kernel_device):
        layer = Layer("triton").to(kernel_device)
        inputs = layer_inputs(kernel_device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer.zero_grad()
                layer(*inputs).sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        layer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(*inputs)
            output.sum().backward()
        changed = [torch.randn_like(inputs[0]), *inputs[1:]]
        inputs[0].copy_(changed[0])
        graph.replay()
        gradients = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        expected = layer(*changed)
        torch.testing.assert_close(output, expected)
        expected.sum().backward()
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)

    def test_the_host_does_not_wait_for_the_device(self, kernel_device):
        layer = Layer("triton").to(kernel_device)
        inputs = layer_inputs(kernel_device)
        layer(*inputs).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(*inputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_auto_takes_the_kernel(self, kernel_device):
        layer, inputs = Layer("auto").to(kernel_device), layer_inputs(kernel_device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(*inputs)
        assert any("forward_kernel" in event.key for event in profile.key_averages())
