"""Dropout on a CPU: the share and scale of elements that are kept, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msdetr.model.layers import Dropout, ReLUDropout
from msdetr.ops.dropout import dropout, relu_dropout

OPS = [dropout, relu_dropout]


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nothing that ReLU would change."""
    return torch.rand(*shape, dtype=dtype) + 0.5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.937])
def test_keeps_its_share_and_the_mean(op, p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1003)
    y = op(x.clone(), p)
    share = (y == 0).double().mean().item()
    # Five standard deviations of the share.
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=2e-4)
    assert y.double().mean().item() == pytest.approx(1.0, abs=5 * (p / (1 - p) / x.numel()) ** 0.5)


def test_neighbours_are_independent():
    """Four neighbours come from one random number, and every fourth from the same bits of it."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(1 << 20), 0.3) > 0).double() - 0.7
    for distance in (1, 2, 3, 4, 8):
        correlation = (kept[distance:] * kept[:-distance]).mean() / (0.3 * 0.7)
        assert abs(correlation) < 5 / (1 << 10)


def test_relu_comes_first():
    torch.manual_seed(2)
    x = torch.randn(64, 64)
    y = relu_dropout(x.clone(), 0.25)
    kept = y > 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert (y[~kept] == 0).all()
    assert 0.2 < (x[~kept] > 0).sum() / (x > 0).sum() < 0.3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_limits_are_those_of_pytorch(op, p):
    x = positive(5, 7)
    assert torch.equal(op(x.clone(), p), F.dropout(x, p))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_probabilities_that_round_to_a_limit(op, p):
    y = op(positive(300), p)
    assert y.isfinite().all()
    assert (y > 0).sum() in ((300,) if p < 0.5 else range(3))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5), (129,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_shape_and_dtype(op, shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    y = op(x.clone(), 0.5)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert ((y == 0) | (y == 2)).all()


@pytest.mark.parametrize("op", OPS)
def test_input_that_is_not_contiguous(op):
    x = positive(8, 6, 5).transpose(0, 2)[:, ::2]
    y = op(x.clone(memory_format=torch.preserve_format), 0.5)
    assert y.shape == x.shape
    torch.testing.assert_close(y[y > 0], 2 * x[y > 0])


@pytest.mark.parametrize("op", OPS)
def test_same_seed_same_elements(op):
    x = positive(257)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(op(x.clone(), 0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("op", OPS)
def test_gradient(op):
    x = torch.randn(6, 5, dtype=torch.float64).requires_grad_()

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return op(x * 1.0, 0.4)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


@pytest.mark.parametrize("op", OPS)
def test_compiled_draws_the_same_numbers(op):
    def loss(x: Tensor) -> Tensor:
        return (op(x * 2.0, 0.3) ** 2).sum()

    x = torch.randn(33, 7).requires_grad_()
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(6)
        value = function(x)
        results.append((value, *torch.autograd.grad(value, x)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("op", [torch.ops.msdetr.dropout, torch.ops.msdetr.relu_dropout])
def test_operator_is_registered_well(op):
    torch.library.opcheck(
        op,
        (torch.randn(4, 3).requires_grad_(), 0.5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_modules_act_in_training_only():
    x = torch.randn(64, 64)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(ReLUDropout(0.5).eval()(x.clone()), x.relu())
    assert (Dropout(0.5)(x) == 0).any()
    assert (ReLUDropout(0.5)(x.clone()) == 0).sum() > (x <= 0).sum()
