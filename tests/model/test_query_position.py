"""Position codes from the boxes where a layer starts, and the parts that come with them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from model.helpers import image_batch, random_pyramid, randomize, tiny_config
from torch import Tensor

from msdetr.config import ModelConfig
from msdetr.model.decoder import Decoder
from msdetr.model.detector import Detector
from msdetr.model.heads import DetectionHeads
from msdetr.model.query_position import BoxPosition
from msdetr.model.query_selection import Queries
from msdetr.model.query_sets import query_sets

SHAPES = ((4, 6), (2, 3))
VALID_SIZES = [[(3, 4), (2, 2)], [(4, 6), (2, 3)]]
QUERIES = 5


def coding(query_position: str) -> BoxPosition:
    config = tiny_config(query_position=query_position, mixed_selection=True)
    position = BoxPosition(config).double()
    randomize(position)
    return position


def published_code(boxes: Tensor, ratios: Tensor, channels: int) -> Tensor:
    """Sine code of (y, x, w, h), channel by channel."""
    columns = []
    x, y, width, height = (boxes * ratios[:, None, [0, 1, 0, 1]]).unbind(-1)
    for coordinate in (y, x, width, height):
        for channel in range(channels // 2):
            angle = 2 * math.pi * coordinate / 10000 ** (2 * (channel // 2) / (channels // 2))
            columns.append(angle.cos() if channel % 2 else angle.sin())
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("query_position", ["box", "box_content"])
@pytest.mark.parametrize("is_first", [True, False])
def test_codes(query_position, is_first):
    position = coding(query_position)
    content, boxes = torch.randn(2, 5, 32).double(), torch.rand(2, 5, 4).double()
    ratios = torch.rand(2, 2, 2).double()
    result = position(content, boxes, ratios, is_first=is_first)
    expected = position.ref_point_head(published_code(boxes, ratios[:, 0], 32))
    if query_position == "box":
        assert position.query_scale is None
    elif not is_first:
        expected = expected * position.query_scale(content)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_codes_have_the_precision_of_the_weights():
    position = coding("box").bfloat16()
    content = torch.randn(2, 5, 32).bfloat16()
    result = position(content, torch.rand(2, 5, 4), torch.ones(2, 2, 2), is_first=True)
    assert result.dtype == torch.bfloat16


def decoding(**changes: object) -> tuple[Decoder, DetectionHeads]:
    config = tiny_config(
        num_decoder_layers=3,
        one_to_many="none",
        one_to_many_ffn=False,
        **{"query_position": "box", "mixed_selection": True} | changes,
    )
    decoder, heads = Decoder(config).double(), DetectionHeads(config, 3).double()
    randomize(decoder)
    randomize(heads)
    return decoder, heads


def random_queries() -> Queries:
    content = torch.randn(2, QUERIES, 32, dtype=torch.float64)
    reference = 0.1 + 0.8 * torch.rand(2, QUERIES, 4, dtype=torch.float64)
    sets = query_sets(tiny_config(num_queries=QUERIES), training=True)
    return Queries(content, None, reference, sets, {})


@pytest.mark.parametrize("box_refine", [True, False])
def test_each_layer_codes_the_boxes_where_it_starts(box_refine):
    decoder, heads = decoding(box_refine=box_refine)
    calls: list[tuple[Tensor, bool]] = []
    codes: list[Tensor] = []
    given: list[Tensor] = []

    def record(module, inputs, kwargs, output) -> None:
        calls.append((inputs[1], kwargs["is_first"]))
        codes.append(output)

    decoder.query_position.register_forward_hook(record, with_kwargs=True)
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    queries = random_queries()
    branch = decoder(queries, random_pyramid(SHAPES, VALID_SIZES), heads)["one_to_one"]
    starts = [queries.reference, *branch.predictions.boxes[:2]]
    if not box_refine:
        starts = [queries.reference] * 3
    assert [is_first for _, is_first in calls] == [True, False, False]
    for (start, _), expected in zip(calls, starts, strict=True):
        torch.testing.assert_close(start, expected)
        assert not start.requires_grad, "without the gradients of earlier layers"
    assert all(code is query_pos for code, query_pos in zip(codes, given, strict=True))


def combinations() -> dict[str, ModelConfig]:
    """Of the options that DAB-DETR, DINO and LW-DETR brought. Numbers of stages take turns."""
    found = {}
    for i, (query_position, sharing, norm, refine) in enumerate(
        product(
            ("initial", "box", "box_content"),
            ("auto", "none", "decoder", "all"),
            (True, False),
            (True, False),
        )
    ):
        two_stage = i % 3 > 0
        name = f"{query_position}, {sharing}, norm {norm}, refine {refine}, two stages {two_stage}"
        found[name] = tiny_config(
            query_position=query_position,
            head_sharing=sharing,
            decoder_norm=norm,
            box_refine=refine,
            look_forward_twice=refine and i % 5 > 1,
            two_stage=two_stage,
            mixed_selection=two_stage,
        )
    return found


@pytest.mark.parametrize("config", combinations().values(), ids=combinations())
def test_every_parameter_gets_a_gradient(config):
    """DDP waits for all of them."""
    detector = Detector(config)
    randomize(detector)
    output = detector(image_batch())
    loss = sum(x.square().mean() for b in output.branches.values() for x in b.predictions)
    loss.backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    detector.eval()
    assert detector(image_batch()).one_to_one.boxes.isfinite().all()
