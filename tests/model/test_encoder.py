"""The encoder: an image's tokens are the same whatever it is padded to."""

from __future__ import annotations

import pytest
import torch
from model.helpers import crop_tokens, cropped, random_pyramid, randomize, tiny_config

from msdetr.model.encoder import Encoder
from msdetr.ops.ms_deform_attn import padding_mask

SHAPES = ((4, 6), (2, 3))
VALID_SIZES = [[(3, 4), (2, 2)], [(4, 6), (2, 3)]]


@pytest.fixture
def encoder() -> Encoder:
    encoder = Encoder(tiny_config(num_encoder_layers=2)).double()
    randomize(encoder)
    return encoder


def test_padding_does_not_matter(encoder):
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    pos = torch.randn_like(pyramid.tokens)
    output = encoder(pyramid, pos)
    assert output.spatial_shapes == SHAPES
    assert output.valid_sizes is pyramid.valid_sizes

    padding = padding_mask(SHAPES, pyramid.valid_sizes)
    garbage = pyramid.tokens.masked_fill(padding[..., None], 1e3)
    again = encoder(pyramid._replace(tokens=garbage), pos)
    assert torch.equal(again.tokens[~padding], output.tokens[~padding])

    for image in range(2):
        one = slice(image, image + 1)
        alone = cropped(pyramid, image)
        own_pos = crop_tokens(pos[one], SHAPES, alone.spatial_shapes)
        torch.testing.assert_close(
            encoder(alone, own_pos).tokens,
            crop_tokens(output.tokens[one], SHAPES, alone.spatial_shapes),
            rtol=1e-5,  # reference points are float32
            atol=1e-5,
        )


def test_tokens_attend_around_themselves():
    """With offsets of zero, a token's output depends on the token alone."""
    encoder = Encoder(tiny_config(num_levels=1)).double()
    encoder.layers[0].self_attn.sampling_offsets.bias.data.zero_()
    pyramid = random_pyramid(((4, 4),), [[(4, 4)]])
    changed = pyramid.tokens.clone()
    changed[0, 5] += 1.0
    pos = torch.zeros_like(changed)
    outputs = [encoder(pyramid._replace(tokens=x), pos).tokens for x in (pyramid.tokens, changed)]
    moved = (outputs[0] - outputs[1]).abs().sum(-1)[0] > 1e-5
    assert moved.nonzero().flatten().tolist() == [5]


def test_position_codes_enter_the_query_and_not_the_value(encoder):
    """With no weight on the query, positions change nothing."""
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    pos = torch.randn_like(pyramid.tokens)
    nowhere = torch.zeros_like(pos)
    assert not torch.equal(encoder(pyramid, pos).tokens, encoder(pyramid, nowhere).tokens)
    for layer in encoder.layers:
        layer.self_attn.sampling_offsets.weight.data.zero_()
        layer.self_attn.attention_weights.weight.data.zero_()
    assert torch.equal(encoder(pyramid, pos).tokens, encoder(pyramid, nowhere).tokens)
