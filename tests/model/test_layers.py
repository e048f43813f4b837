"""MLP and feed-forward network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msdetr.model.layers import MLP, FeedForward


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
