"""MLP and feed-forward network."""

from __future__ import annotations

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
