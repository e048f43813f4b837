"""Position codes: their formula, padding, and maps larger than the learned table."""

from __future__ import annotations

import math

import pytest
import torch
from model.helpers import crop_tokens

from msdetr.model.position_embedding import (
    LearnedPositionEmbedding,
    SinePositionEmbedding,
    box_position_code,
    sine_code,
)

SHAPES = ((4, 6), (2, 3))


def test_sine_code_alternates_sines_and_cosines():
    code = sine_code(torch.tensor([0.0, 1.5]), 6)
    for index, position in enumerate((0.0, 1.5)):
        expected = []
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            expected += [math.sin(angle), math.cos(angle)]
        torch.testing.assert_close(code[index], torch.tensor(expected))


def test_sine_embedding_holds_the_vertical_code_first():
    embedding = SinePositionEmbedding(hidden_dim=16)
    code = embedding(SHAPES, torch.tensor([[[4, 6], [2, 3]]]))[0].view(4, 6, 16)
    y = sine_code(torch.tensor(2.5 / 4 * 2 * math.pi), 8)
    x = sine_code(torch.tensor(3.5 / 6 * 2 * math.pi), 8)
    torch.testing.assert_close(code[2, 3], torch.cat((y, x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embedding", [SinePositionEmbedding, LearnedPositionEmbedding])
def test_codes_do_not_see_padding(embedding):
    embedding = embedding(hidden_dim=16)
    valid_sizes = torch.tensor([[[3, 4], [2, 2]], [[4, 6], [2, 3]]])
    padded = embedding(SHAPES, valid_sizes)
    for image in range(2):
        shapes = tuple(map(tuple, valid_sizes[image].tolist()))
        alone = embedding(shapes, valid_sizes[image : image + 1])
        for level in range(2):
            own = padded[level][image : image + 1]
            cropped = crop_tokens(own, SHAPES[level : level + 1], shapes[level : level + 1])
            assert torch.equal(cropped, alone[level])


def test_learned_embedding_holds_the_horizontal_code_first():
    embedding = LearnedPositionEmbedding(hidden_dim=16)
    valid_sizes = torch.tensor([[[4, 6], [2, 3]]])
    fine, coarse = embedding(SHAPES, valid_sizes)
    code = torch.cat((embedding.col_embed.weight[3], embedding.row_embed.weight[2]))
    assert torch.equal(fine.view(4, 6, 16)[2, 3], code)
    assert torch.equal(coarse.view(2, 3, 16), fine.view(4, 6, 16)[:2, :3]), "levels share codes"
    assert embedding.col_embed.weight.min() >= 0
    assert embedding.col_embed.weight.max() <= 1


@pytest.mark.parametrize("shape", [(50, 50), (51, 3), (2, 120)])
def test_learned_embedding_stretches_to_maps_beyond_its_table(shape):
    embedding = LearnedPositionEmbedding(hidden_dim=16)
    height, width = shape
    (code,) = embedding((shape,), torch.tensor([[shape], [shape]]))
    assert code.shape == (2, height * width, 16)
    code = code[0].view(height, width, 16)
    first = torch.cat((embedding.col_embed.weight[0], embedding.row_embed.weight[0]))
    torch.testing.assert_close(code[0, 0], first)
    if width >= 50:
        torch.testing.assert_close(code[0, -1, :8], embedding.col_embed.weight[49])
    if height >= 50:
        torch.testing.assert_close(code[-1, 0, 8:], embedding.row_embed.weight[49])
    code.sum().backward()
    grad = embedding.col_embed.weight.grad
    assert grad[: min(width, 50)].any(-1).all()


def test_stretching_is_linear():
    embedding = LearnedPositionEmbedding(hidden_dim=4)
    embedding.col_embed.weight.data = torch.arange(50.0)[:, None].expand(-1, 2).contiguous()
    (code,) = embedding(((1, 99),), torch.tensor([[[1, 99]]]))
    torch.testing.assert_close(code[0, :, 0], torch.linspace(0, 49, 99))


def test_proposal_code():
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    code = box_position_code(boxes, 6)
    expected = [sine_code(side * 2 * math.pi, 6) for side in boxes[0]]
    torch.testing.assert_close(code[0], torch.cat(expected))


def test_codes_are_float32_in_any_model():
    valid_sizes = torch.tensor([[[4, 6], [2, 3]]])
    code = SinePositionEmbedding(16).bfloat16()(SHAPES, valid_sizes)[0]
    assert code.dtype == torch.float32
