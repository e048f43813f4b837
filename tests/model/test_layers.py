"""Shared building blocks, above all the box refinement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msdetr.model.layers import MLP, FeedForward, inverse_sigmoid, refine_boxes


def test_inverse_sigmoid_is_inverse():
    x = torch.tensor([1e-4, 0.01, 0.3, 0.5, 0.99, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    torch.testing.assert_close(inverse_sigmoid(x), x.logit())


def test_inverse_sigmoid_is_bounded():
    x = torch.tensor([-3.0, 0.0, 1e-7, 1.0, 2.0, float("inf")]).requires_grad_()
    y = inverse_sigmoid(x)
    limit = torch.tensor(1e5).log()
    torch.testing.assert_close(y.abs(), limit.expand(6), rtol=1e-4, atol=0.0)
    assert y.sign().tolist() == [-1, -1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_refinement_by_nothing_keeps_boxes():
    boxes = 0.01 + 0.98 * torch.rand(5, 4)
    torch.testing.assert_close(refine_boxes(torch.zeros(5, 4), boxes), boxes)


def test_refinement_moves_in_logit_space():
    delta = torch.tensor([1.0, -1.0, 0.5, 2.0])
    box = torch.tensor([0.5, 0.5, 0.2, 0.1])
    torch.testing.assert_close(refine_boxes(delta, box), (box.logit() + delta).sigmoid())


def test_points_take_their_size_from_the_step_alone():
    delta, point = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.tensor([0.25, 0.75])
    boxes = refine_boxes(delta, point)
    torch.testing.assert_close(boxes[:2], (point.logit() + delta[:2]).sigmoid())
    torch.testing.assert_close(boxes[2:], delta[2:].sigmoid())


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_refinement_is_float32_at_least(reference_dim):
    delta, reference = torch.randn(3, 4).bfloat16(), torch.rand(3, reference_dim)
    assert refine_boxes(delta, reference).dtype == torch.float32
    assert refine_boxes(delta.double(), reference.double()).dtype == torch.float64
    torch.testing.assert_close(
        refine_boxes(delta, reference), refine_boxes(delta.float(), reference)
    )


def test_refinement_gradient_reaches_both():
    delta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(refine_boxes, (delta, boxes))


def test_extreme_steps_stay_in_the_image():
    delta = torch.tensor([[1e4, -1e4, 1e4, -1e4]]).requires_grad_()
    boxes = refine_boxes(delta, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    assert boxes.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    boxes.sum().backward()
    assert delta.grad.isfinite().all()


def test_mlp_has_no_activation_after_the_last_layer():
    mlp = MLP(4, 8, 2, 3)
    assert [layer.weight.shape for layer in mlp.layers] == [(8, 4), (8, 8), (2, 8)]
    x = torch.randn(5, 4)
    hidden = mlp.layers[1](mlp.layers[0](x).relu()).relu()
    torch.testing.assert_close(mlp(x), mlp.last(hidden))
    assert mlp.last is mlp.layers[2]


def test_feed_forward():
    ffn = FeedForward(8, 16, dropout=0.0)
    x = torch.randn(3, 8)
    update = ffn.linear2(ffn.linear1(x).relu())
    expected = F.layer_norm(x + update, (8,), ffn.norm.weight, ffn.norm.bias)
    torch.testing.assert_close(ffn(x), expected)
    dropping = FeedForward(8, 16, dropout=0.5)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


def test_dropout_after_the_activation_keeps_one_byte_per_element() -> None:
    torch.manual_seed(0)
    layer = FeedForward(8, 4096, dropout=0.25)
    saved: dict[torch.dtype, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == 4096 and tensor.shape[0] == 50:
            saved[tensor.dtype] = saved.get(tensor.dtype, 0) + 1
        return tensor

    x = torch.randn(50, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = layer.activation_dropout(layer.linear1(x)).relu_()
        layer.linear2(hidden).sum().backward()
    # The mask, and the activations, which are the same tensor for ReLU and `linear2`.
    assert saved == {torch.bool: 1, torch.float32: 2}
    plain = layer.linear1(x).relu()
    kept = hidden != 0
    assert kept[plain > 0].float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(hidden[kept], plain[kept] / 0.75)
    assert layer.eval().activation_dropout(x) is x
