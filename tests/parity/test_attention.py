"""Deformable attention against the published op and module, in float64."""

from __future__ import annotations

import pytest
import torch

from msdetr.model.attention import MSDeformAttn
from msdetr.ops.ms_deform_attn import ms_deform_attn, padding_mask
from parity.golden import GoldenCase

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def _shapes(case: GoldenCase) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in case.arrays["shapes"])


@pytest.mark.golden("msda_op")
def test_msda_op(case: GoldenCase, impl: str) -> None:
    value, locations, weights = (
        case.tensor(name).requires_grad_() for name in ("value", "locations", "weights")
    )
    output = ms_deform_attn(value, _shapes(case), locations, weights, impl=impl)
    torch.testing.assert_close(output, case.tensor("output"), **CLOSE)
    output.backward(case.tensor("grad_output"))
    for name, tensor in (("value", value), ("locations", locations), ("weights", weights)):
        torch.testing.assert_close(tensor.grad, case.tensor(f"grad_{name}"), **CLOSE)


@pytest.mark.golden("msda_module")
def test_msda_module(case: GoldenCase, impl: str) -> None:
    if impl == "triton":
        pytest.skip("the module chooses its implementation by device; msda_op cases ask for one")
    shapes = _shapes(case)
    query, reference_points, memory = (
        case.tensor(name).requires_grad_() for name in ("query", "reference_points", "memory")
    )
    heads, points = int(case.arrays["heads"]), int(case.arrays["points"])
    module = MSDeformAttn(query.shape[-1], len(shapes), heads, points).double()
    module.load_state_dict(case.tensors("param."))

    valid_sizes = case.tensor("valid_sizes")
    assert torch.equal(padding_mask(shapes, valid_sizes), case.tensor("padding_mask"))
    output = module(query, reference_points, memory, shapes, valid_sizes)
    torch.testing.assert_close(output, case.tensor("output"), **CLOSE)

    output.backward(case.tensor("grad_output"))
    for name, tensor in (
        ("query", query),
        ("reference_points", reference_points),
        ("memory", memory),
    ):
        torch.testing.assert_close(tensor.grad, case.tensor(f"grad_{name}"), **CLOSE)
    for name, gradient in case.tensors("grad.param.").items():
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, **CLOSE)
