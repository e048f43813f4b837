"""Prediction heads: how many, which are shared, how they start."""

from __future__ import annotations

import math

import pytest
import torch
from model.helpers import tiny_config

from msdetr.model.heads import DetectionHeads

LAYERS = 3


def heads_of(**changes) -> DetectionHeads:
    return DetectionHeads(tiny_config(num_decoder_layers=LAYERS, **changes), num_classes=5)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"box_refine": True, "two_stage": True}, LAYERS + 1),
        ({"box_refine": True, "two_stage": False}, LAYERS),
        ({"box_refine": False, "two_stage": True}, 1),
        ({"box_refine": False, "two_stage": False}, 1),
    ],
)
@pytest.mark.parametrize("one_to_many", ["none", "internal", "output"])
def test_number_of_heads(changes, number, one_to_many):
    heads = heads_of(**changes, one_to_many=one_to_many, one_to_many_ffn=False)
    assert len(heads.class_embed) == len(heads.bbox_embed) == number
    if one_to_many == "output":
        own = LAYERS if changes["box_refine"] else 1
        assert len(heads.one_to_many_class_embed) == own
    else:
        assert heads.one_to_many_class_embed is None


@pytest.mark.parametrize("refine", [True, False])
def test_layers_have_their_own_heads_only_with_refinement(refine):
    heads = heads_of(box_refine=refine)
    for index, embed in enumerate(heads.class_embed):
        torch.nn.init.constant_(embed.bias, float(index))
    x = torch.zeros(2, 32)
    modules = [heads.of_layer(layer).classes["one_to_one"] for layer in range(LAYERS)]
    values = [head(x)[0, 0].item() for head in (*modules, heads.of_encoder().classes)]
    assert values == ([0.0, 1.0, 2.0, 3.0] if refine else [0.0] * 4)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize(
    ("sharing", "of_layers", "of_encoder"),
    [("none", [0, 1, 2], 3), ("decoder", [0, 0, 0], 1), ("all", [0, 0, 0], 0)],
)
def test_sharing(sharing, of_layers, of_encoder, refine, two_stage):
    """It does not depend on refinement where it is stated."""
    heads = heads_of(
        head_sharing=sharing,
        box_refine=refine,
        two_stage=two_stage,
        one_to_many="output",
        one_to_many_ffn=False,
    )
    number = 1 + max(*of_layers, of_encoder if two_stage else 0)
    assert len(heads.class_embed) == len(heads.bbox_embed) == number
    assert len(heads.one_to_many_class_embed) == 1 + max(of_layers)
    for layer, index in enumerate(of_layers):
        classes, box = heads.of_layer(layer)
        assert classes["one_to_one"] is heads.class_embed[index]
        assert classes["one_to_many"] is heads.one_to_many_class_embed[index]
        assert box is heads.bbox_embed[index]
    if two_stage:
        encoder = heads.of_encoder()
        assert encoder.classes is heads.class_embed[of_encoder]
        assert encoder.box is heads.bbox_embed[of_encoder]


def test_one_to_many_shares_class_heads_unless_it_is_taken_at_the_output():
    classes, box = heads_of(one_to_many="internal").of_layer(1)
    assert classes["one_to_many"] is classes["one_to_one"] is not box
    classes, _ = heads_of(one_to_many="output", one_to_many_ffn=False).of_layer(1)
    assert classes["one_to_many"] is not classes["one_to_one"]
    assert torch.equal(classes["one_to_many"].weight, classes["one_to_one"].weight)  # at first


@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize("box_refine", [True, False])
def test_initial_values(two_stage, box_refine):
    heads = heads_of(
        two_stage=two_stage, box_refine=box_refine, one_to_many="output", one_to_many_ffn=False
    )
    prior = -math.log(99)
    for embed in (*heads.class_embed, *heads.one_to_many_class_embed):
        torch.testing.assert_close(embed.bias, torch.full((5,), prior))
        assert embed.bias.sigmoid()[0].item() == pytest.approx(0.01)
        assert embed.weight.any()
    for index, embed in enumerate(heads.bbox_embed):
        assert not embed.last.weight.any()
        size = -2.0 if index == 0 and not two_stage else 0.0
        assert embed.last.bias.tolist() == [0.0, 0.0, size, size]
        assert embed.layers[0].weight.any()


@pytest.mark.parametrize("head_sharing", ["decoder", "all"])
def test_a_head_that_refines_all_layers_keeps_the_size_at_first(head_sharing):
    heads = heads_of(two_stage=False, box_refine=True, head_sharing=head_sharing)
    assert not heads.bbox_embed[0].last.bias.any()


def test_heads_share_no_memory():
    heads = heads_of(one_to_many="output", one_to_many_ffn=False)
    pointers = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(set(pointers)) == len(pointers)
