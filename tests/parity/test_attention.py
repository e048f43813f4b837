"""Deformable attention against the published op and module, which ran in float64.

The reference is held to float64; kernels compute in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msdetr.model.attention import MSDeformAttn
from msdetr.ops.ms_deform_attn import ms_deform_attn, padding_mask
from parity.golden import GoldenCase

TOLERANCE = {"reference": 1e-9, "triton": 1e-5}
"""Of an element, relative to itself or to 1; kernels: relative to the tensor's largest element."""


def _shapes(case: GoldenCase) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in case.arrays["shapes"])


def _assert_close(result: torch.Tensor, expected: torch.Tensor, impl: str) -> None:
    scale = 1.0 if impl == "reference" else expected.abs().max().item()
    tolerance = TOLERANCE[impl]
    torch.testing.assert_close(
        result.double().cpu(), expected, rtol=tolerance, atol=tolerance * scale
    )


def _device_and_dtype(impl: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    if impl == "reference":
        return {"dtype": torch.float64}
    return {"device": request.getfixturevalue("kernel_device"), "dtype": torch.float32}


@pytest.mark.golden("msda_op")
def test_msda_op(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    place = _device_and_dtype(impl, request)
    names = ("value", "locations", "weights")
    inputs = [case.tensor(name).to(**place).requires_grad_() for name in names]
    value, locations, weights = inputs
    output = ms_deform_attn(value, _shapes(case), locations, weights, impl=impl)
    _assert_close(output, case.tensor("output"), impl)
    output.backward(case.tensor("grad_output").to(**place))
    for name, tensor in zip(names, inputs, strict=True):
        _assert_close(tensor.grad, case.tensor(f"grad_{name}"), impl)


@pytest.mark.golden("msda_module")
def test_msda_module(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    place = _device_and_dtype(impl, request)
    shapes = _shapes(case)
    names = ("query", "reference_points", "memory")
    inputs = [case.tensor(name).to(**place).requires_grad_() for name in names]
    query, reference_points, memory = inputs
    heads, points = int(case.arrays["heads"]), int(case.arrays["points"])
    module = MSDeformAttn(query.shape[-1], len(shapes), heads, points).to(**place)
    module.load_state_dict(case.tensors("param."))
    module.impl = impl

    valid_sizes = case.tensor("valid_sizes")
    assert torch.equal(padding_mask(shapes, valid_sizes), case.tensor("padding_mask"))
    output = module(query, reference_points, memory, shapes, valid_sizes.to(query.device))
    _assert_close(output, case.tensor("output"), impl)

    output.backward(case.tensor("grad_output").to(**place))
    for name, tensor in zip(names, inputs, strict=True):
        _assert_close(tensor.grad, case.tensor(f"grad_{name}"), impl)
    for name, gradient in case.tensors("grad.param.").items():
        _assert_close(module.get_parameter(name).grad, gradient, impl)
