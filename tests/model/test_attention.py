"""The attention modules: initial values, padding, and PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
from model.helpers import crop_tokens, cropped, random_pyramid, randomize
from torch import nn

from msdetr.model.attention import MSDeformAttn, SelfAttention
from msdetr.model.query_sets import QuerySet, QuerySets
from msdetr.ops.ms_deform_attn import padding_mask

SHAPES = ((4, 6), (2, 3))
VALID_SIZES = [[(3, 4), (2, 2)], [(4, 6), (2, 3)]]


def sets_of(*sets: int | tuple[int, int]) -> QuerySets:
    """Sets by the size and the number of their groups."""
    pairs = (pair if isinstance(pair, tuple) else (pair, 1) for pair in sets)
    return QuerySets(tuple(QuerySet(f"set{i}", *pair) for i, pair in enumerate(pairs)))


def test_initial_offsets_point_in_eight_directions():
    attention = MSDeformAttn(hidden_dim=32, num_levels=2, num_heads=8, num_points=3)
    assert not attention.sampling_offsets.weight.any()
    offsets = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(3):
            expected = (point + 1.0) * torch.tensor(direction).float()
            torch.testing.assert_close(offsets[head, :, point], expected.expand(2, -1))


@pytest.mark.parametrize("num_heads", [1, 3, 6])
def test_initial_offsets_lie_on_squares(num_heads):
    attention = MSDeformAttn(num_heads * 4, num_levels=1, num_heads=num_heads, num_points=4)
    offsets = attention.sampling_offsets.bias.view(num_heads, 4, 2)
    steps = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(num_heads, -1)
    torch.testing.assert_close(offsets.abs().amax(-1), steps)


def test_initial_weights_are_uniform_and_biases_zero():
    attention = MSDeformAttn(hidden_dim=32, num_levels=2, num_heads=8, num_points=3)
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any()
    assert not attention.output_proj.bias.any()
    assert attention.value_proj.weight.std() > 0.1


def test_initially_attends_to_the_mean_of_its_points():
    """One point per head, moved back onto the reference: the token there, projected."""
    attention = MSDeformAttn(hidden_dim=32, num_levels=2, num_heads=4, num_points=1).double()
    attention.sampling_offsets.bias.data.zero_()
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    reference = torch.tensor([[2.5 / 6, 1.5 / 4], [1.5 / 3, 0.5 / 2]]).expand(2, 1, 2, 2)
    query = torch.randn(2, 1, 32, dtype=torch.float64)
    output = attention(query, reference, pyramid.tokens, SHAPES, pyramid.valid_sizes)
    tokens = (pyramid.tokens[:, 6 + 2] + pyramid.tokens[:, 24 + 1])[:, None] / 2
    expected = attention.output_proj(attention.value_proj(tokens))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_padding_does_not_matter(reference_dim):
    """Neither what it holds, nor that it is there."""
    attention = MSDeformAttn(hidden_dim=32, num_levels=2, num_heads=2, num_points=3).double()
    randomize(attention)
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    query = torch.randn(2, 5, 32, dtype=torch.float64)
    boxes = torch.rand(2, 5, 1, reference_dim, dtype=torch.float64)  # of the valid image
    shapes = torch.tensor(SHAPES, dtype=torch.float64)
    ratios = (pyramid.valid_sizes / shapes).flip(-1).repeat(1, 1, reference_dim // 2)[:, None]
    output = attention(query, boxes * ratios, *pyramid)

    garbage = pyramid.tokens.clone()
    garbage[padding_mask(SHAPES, pyramid.valid_sizes)] = float("nan")
    again = attention(query, boxes * ratios, garbage, SHAPES, pyramid.valid_sizes)
    assert torch.equal(again, output)

    for image in range(2):
        alone = cropped(pyramid, image)
        one = slice(image, image + 1)
        reference = boxes[one].expand(-1, -1, 2, -1)
        result = attention(query[one], reference, alone.tokens, alone.spatial_shapes, None)
        torch.testing.assert_close(result, output[one])


def test_everything_gets_a_gradient():
    attention = MSDeformAttn(hidden_dim=32, num_levels=2, num_heads=2, num_points=3).double()
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    query = torch.randn(2, 5, 32, dtype=torch.float64)
    reference = torch.rand(2, 5, 2, 2, dtype=torch.float64)
    attention(query, reference, *pyramid).square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


def test_self_attention_is_pytorch_s():
    attention = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.0).double()
    expected = nn.MultiheadAttention(32, 4, batch_first=True).double()
    assert {n: p.shape for n, p in attention.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }
    randomize(expected)
    attention.load_state_dict(expected.state_dict())
    x, query_pos = (torch.randn(2, 5, 32, dtype=torch.float64) for _ in range(2))
    position = x + query_pos
    torch.testing.assert_close(
        attention(x, query_pos, sets_of(5)), expected(position, position, x)[0]
    )


@pytest.mark.parametrize("sets", [((5, 1),), ((5, 3),), ((4, 1), (7, 1)), ((3, 2), (5, 1), (2, 4))])
def test_groups_of_queries_do_not_see_each_other(sets):
    """As with the mask that a single attention would need: values and gradients."""
    sets = sets_of(*sets)
    attention = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.0).double()
    expected = nn.MultiheadAttention(32, 4, batch_first=True).double()
    randomize(attention)
    expected.load_state_dict(attention.state_dict())
    x, query_pos = torch.randn(2, 2, sets.num_queries, 32, dtype=torch.float64)
    x.requires_grad_()
    sizes = [part.group_size for part in sets.sets for _ in range(part.num_groups)]
    mask = ~torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    position = x + query_pos
    result = attention(x, query_pos, sets)
    masked = expected(position, position, x, attn_mask=mask)[0]
    torch.testing.assert_close(result, masked)
    weight = torch.randn_like(result)
    ours = torch.autograd.grad((result * weight).sum(), (x, *attention.parameters()))
    theirs = torch.autograd.grad((masked * weight).sum(), (x, *expected.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("others", [((5, 1),), ((3, 2),), ((3, 2), (4, 1))], ids=str)
@pytest.mark.parametrize("groups", [(1, 1), (2, 3), (4, 2)], ids=str)
def test_a_set_may_see_the_queries_that_infer(others, groups):
    """As with the mask that a single attention would need: values and gradients."""
    size, number = groups
    sets = sets_of(*others).preceded_by(QuerySet("denoising", size, number, sees_primary=True))
    assert sets.primary.branch == "set0"
    attention = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.0).double()
    expected = nn.MultiheadAttention(32, 4, batch_first=True).double()
    randomize(attention)
    expected.load_state_dict(attention.state_dict())
    x, query_pos = torch.randn(2, 2, sets.num_queries, 32, dtype=torch.float64)
    x.requires_grad_()
    sizes = [part.group_size for part in sets.sets for _ in range(part.num_groups)]
    mask = ~torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()
    denoising = size * number
    mask[:denoising, denoising : denoising + sets.primary.group_size] = False
    position = x + query_pos
    result = attention(x, query_pos, sets)
    masked = expected(position, position, x, attn_mask=mask)[0]
    torch.testing.assert_close(result, masked)
    weight = torch.randn_like(result)
    ours = torch.autograd.grad((result * weight).sum(), (x, *attention.parameters()))
    theirs = torch.autograd.grad((masked * weight).sum(), (x, *expected.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_self_attention_is_initialised_as_pytorch_s():
    attention, expected = SelfAttention(64, 4, 0.0), nn.MultiheadAttention(64, 4)
    for name, parameter in expected.named_parameters():
        mine = attention.get_parameter(name)
        if not parameter.any():
            assert not mine.any(), name
    bound = (6 / (64 + 3 * 64)) ** 0.5  # xavier_uniform
    assert bound * 0.95 < attention.in_proj_weight.abs().max() <= bound


def test_self_attention_drops_in_training_only():
    attention = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.5)
    x = torch.randn(2, 5, 32)
    attention.eval()
    assert torch.equal(attention(x, x, sets_of(5)), attention(x, x, sets_of(5)))
    attention.train()
    assert not torch.equal(attention(x, x, sets_of(5)), attention(x, x, sets_of(5)))


def test_crop_is_what_these_tests_think():
    tokens = torch.arange(30.0).view(1, 30, 1)
    kept = crop_tokens(tokens, SHAPES, ((2, 2), (1, 3))).flatten().tolist()
    assert kept == [0, 1, 6, 7, 24, 25, 26]
