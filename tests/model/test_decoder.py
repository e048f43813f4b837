"""The decoder: its two orders, where one-to-many is read, and which losses train which head."""

from __future__ import annotations

import pytest
import torch
from model.helpers import cropped, random_pyramid, randomize, tiny_config
from torch import Tensor, nn

from msdetr.model.decoder import Decoder, DecoderLayer, LayerOutput
from msdetr.model.geometry import level_valid_ratios
from msdetr.model.heads import DetectionHeads
from msdetr.model.query_selection import Queries
from msdetr.model.query_sets import query_sets
from msdetr.structures import FeaturePyramid, Predictions

SHAPES = ((4, 6), (2, 3))
VALID_SIZES = [[(3, 4), (2, 2)], [(4, 6), (2, 3)]]
QUERIES = 5
ONE_SET = query_sets(tiny_config(num_queries=QUERIES), training=True)


def random_queries(reference_dim: int = 4) -> Queries:
    content, query_pos = (torch.randn(2, QUERIES, 32, dtype=torch.float64) for _ in range(2))
    reference = 0.1 + 0.8 * torch.rand(2, QUERIES, reference_dim, dtype=torch.float64)
    return Queries(content, query_pos, reference, ONE_SET, {})


def decode(decoder: Decoder, *inputs) -> dict[str, Predictions]:
    """Predictions by branch."""
    return {name: branch.predictions for name, branch in decoder(*inputs).items()}


def decoding(**changes) -> tuple[Decoder, DetectionHeads]:
    config = tiny_config(num_decoder_layers=3, **changes)
    decoder, heads = Decoder(config).double(), DetectionHeads(config, 3).double()
    randomize(decoder)
    randomize(heads)
    return decoder, heads


class TestLayer:
    def run(self, layer: DecoderLayer) -> tuple[LayerOutput, list[str]]:
        """Hidden states, and the order in which the modules ran."""
        order: list[str] = []
        for name in ("cross_attn", "self_attn", "ffn", "one_to_many_ffn"):
            module = getattr(layer, name)
            if module is not None:
                module.register_forward_hook(lambda *_, name=name: order.append(name))
        pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries()
        ratios = level_valid_ratios(pyramid.spatial_shapes, pyramid.valid_sizes)
        output = layer(*queries[:3], ratios, pyramid, ONE_SET)
        return output, order

    def layer(self, **changes) -> DecoderLayer:
        layer = DecoderLayer(tiny_config(**changes)).double()
        randomize(layer)
        return layer

    @pytest.mark.parametrize(
        ("decoder_order", "attentions"),
        [("cross_self", ["cross_attn", "self_attn"]), ("self_cross", ["self_attn", "cross_attn"])],
    )
    def test_order(self, decoder_order, attentions):
        _, order = self.run(self.layer(decoder_order=decoder_order))
        assert order == [*attentions, "ffn", "one_to_many_ffn"]

    @pytest.mark.parametrize("decoder_order", ["cross_self", "self_cross"])
    @pytest.mark.parametrize("one_to_many_ffn", [True, False])
    def test_internal_one_to_many_reads_the_state_after_the_first_attention(
        self, decoder_order, one_to_many_ffn
    ):
        layer = self.layer(decoder_order=decoder_order, one_to_many_ffn=one_to_many_ffn)
        states = []
        first = layer.cross_attn_norm if decoder_order == "cross_self" else layer.self_attn_norm
        first.register_forward_hook(lambda module, inputs, output: states.append(output))
        result, _ = self.run(layer)
        expected = layer.one_to_many_ffn(states[0]) if one_to_many_ffn else states[0]
        assert torch.equal(result.one_to_many, expected)
        assert not torch.equal(result.one_to_many, result.x)

    @pytest.mark.parametrize("one_to_many", ["none", "output"])
    def test_otherwise_there_is_one_state(self, one_to_many):
        result, order = self.run(self.layer(one_to_many=one_to_many, one_to_many_ffn=False))
        assert result.one_to_many is None
        assert order == ["cross_attn", "self_attn", "ffn"]

    def test_evaluation_skips_it(self):
        layer = self.layer().eval()
        result, order = self.run(layer)
        assert result.one_to_many is None
        assert order == ["cross_attn", "self_attn", "ffn"]


@pytest.mark.parametrize("reference_dim", [2, 4])
@pytest.mark.parametrize("box_refine", [True, False])
def test_an_image_gets_the_same_predictions_without_its_padding(reference_dim, box_refine):
    decoder, heads = decoding(box_refine=box_refine)
    pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries(reference_dim)
    padded = decode(decoder, queries, pyramid, heads)
    for image in range(2):
        one = slice(image, image + 1)
        own = Queries(*(field[one] for field in queries[:3]), ONE_SET, {})
        alone = decode(decoder, own, cropped(pyramid, image), heads)
        assert alone.keys() == padded.keys() == {"one_to_one", "one_to_many"}
        for name, expected in padded.items():
            for field, mine in zip(expected, alone[name], strict=True):
                torch.testing.assert_close(mine, field[:, one], rtol=1e-5, atol=1e-6)


def test_images_are_independent():
    decoder, heads = decoding()
    pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries()
    expected = decode(decoder, queries, pyramid, heads)["one_to_one"]
    tokens = pyramid.tokens.clone()
    tokens[1] += 1.0
    moved = pyramid._replace(tokens=tokens)
    result = decode(decoder, queries, moved, heads)["one_to_one"]
    assert torch.equal(result.logits[:, 0], expected.logits[:, 0])
    assert not torch.equal(result.logits[:, 1], expected.logits[:, 1])


def test_without_refinement_every_layer_starts_from_the_same_reference():
    """Heads that move nothing predict the reference in every layer."""
    decoder, heads = decoding(box_refine=False)
    nn.init.zeros_(heads.bbox_embed[0].last.weight)
    heads.bbox_embed[0].last.bias.data = torch.tensor([0.5] * 4, dtype=torch.float64)
    queries = random_queries()
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    boxes = decode(decoder, queries, pyramid, heads)["one_to_one"].boxes
    expected = (queries.reference.logit() + 0.5).sigmoid()
    torch.testing.assert_close(boxes, expected.expand(3, -1, -1, -1))


@pytest.mark.parametrize("look_forward_twice", [True, False])
def test_with_refinement_every_layer_starts_from_the_one_before(look_forward_twice):
    decoder, heads = decoding(look_forward_twice=look_forward_twice)
    for embed in heads.bbox_embed:
        nn.init.zeros_(embed.last.weight)
        nn.init.constant_(embed.last.bias, 0.5)
    queries = random_queries()
    pyramid = random_pyramid(SHAPES, VALID_SIZES)
    boxes = decode(decoder, queries, pyramid, heads)["one_to_one"].boxes
    for layer in range(3):
        expected = (queries.reference.logit() + 0.5 * (layer + 1)).sigmoid()
        torch.testing.assert_close(boxes[layer], expected)


def heads_reached(heads: DetectionHeads, predictions: Predictions, kind: str) -> list[list[int]]:
    """For the boxes of each layer: the layers whose head (`kind`) their loss trains."""
    embeds = getattr(heads, kind)
    reached = []
    for boxes in predictions.boxes:
        parameters = [next(embed.parameters()) for embed in embeds]
        gradients = torch.autograd.grad(
            boxes.square().sum(), parameters, retain_graph=True, allow_unused=True
        )
        reached.append([i for i, grad in enumerate(gradients) if grad is not None and grad.any()])
    return reached


class TestLookForwardTwice:
    @pytest.mark.parametrize("decoder_order", ["cross_self", "self_cross"])
    def test_a_layer_s_boxes_train_the_head_before(self, decoder_order):
        decoder, heads = decoding(look_forward_twice=True, decoder_order=decoder_order)
        output = decode(decoder, random_queries(), random_pyramid(SHAPES, VALID_SIZES), heads)
        for branch in output.values():
            assert heads_reached(heads, branch, "bbox_embed") == [[0], [0, 1], [1, 2]]

    def test_once_is_not_twice(self):
        decoder, heads = decoding(look_forward_twice=False)
        output = decode(decoder, random_queries(), random_pyramid(SHAPES, VALID_SIZES), heads)
        for branch in output.values():
            assert heads_reached(heads, branch, "bbox_embed") == [[0], [1], [2]]

    def test_values_do_not_change(self):
        once, heads = decoding(look_forward_twice=False)
        twice, _ = decoding(look_forward_twice=True)
        twice.load_state_dict(once.state_dict())
        pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries()
        expected, result = (decode(x, queries, pyramid, heads) for x in (once, twice))
        for name, predictions in expected.items():
            assert all(map(torch.equal, predictions, result[name]))


@pytest.mark.parametrize("logit_eps", [1e-5, 1e-3])
@pytest.mark.parametrize("decoder_norm", [True, False])
@pytest.mark.parametrize("one_to_many", ["internal", "output"])
def test_coordinates_at_the_border_count_as_an_epsilon_away(logit_eps, decoder_norm, one_to_many):
    """In predictions of all branches, and where the next layer starts. Heads move nothing."""
    decoder, heads = decoding(
        logit_eps=logit_eps,
        decoder_norm=decoder_norm,
        one_to_many=one_to_many,
        one_to_many_ffn=False,
    )
    for embed in heads.bbox_embed:
        nn.init.zeros_(embed.last.weight)
        nn.init.zeros_(embed.last.bias)
    starts: list[Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[2]))
    queries = random_queries()
    border = torch.tensor([0.0, 1.0]).expand(2, QUERIES, 2).repeat(1, 1, 2).double()
    output = decode(
        decoder,
        queries._replace(reference=border),
        random_pyramid(SHAPES, VALID_SIZES),
        heads,
    )
    for index, start in enumerate(starts):
        torch.testing.assert_close(start, border, rtol=1e-9, atol=1e-12)
        low, high = border.clamp(min=logit_eps), (1.0 - border).clamp(min=logit_eps)
        border = low / (low + high)
        for branch in output.values():
            torch.testing.assert_close(branch.boxes[index], border, rtol=1e-9, atol=1e-12)


class TestNorm:
    """Predictions are made of the normalised state; the next layer starts from the other one."""

    def decode(self, **changes) -> tuple[dict[str, Predictions], list[Tensor], DetectionHeads]:
        """Predictions, and the boxes where the layers started."""
        decoder, heads = decoding(decoder_norm=True, **changes)
        states: list[LayerOutput] = []
        starts: list[Tensor] = []
        for layer in decoder.layers:
            layer.register_forward_hook(lambda module, inputs, output: states.append(output))
            layer.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[2]))
        output = decode(decoder, random_queries(), random_pyramid(SHAPES, VALID_SIZES), heads)
        for index, (state, start) in enumerate(zip(states, starts, strict=True)):
            classes, box = heads.of_layer(index)
            many = state.x if state.one_to_many is None else state.one_to_many
            sources = {"one_to_one": decoder.norm(state.x), "one_to_many": decoder.norm(many)}
            for name in output:
                source = sources[name]
                torch.testing.assert_close(output[name].logits[index], classes[name](source))
                boxes = (box(source) + start.logit()).sigmoid()
                torch.testing.assert_close(output[name].boxes[index], boxes)
            if index + 1 < len(starts):
                step = box(state.x) if decoder.box_refine else 0.0
                torch.testing.assert_close(starts[index + 1], (step + start.logit()).sigmoid())
        return output, starts, heads

    @pytest.mark.parametrize("head_sharing", ["none", "decoder"])
    @pytest.mark.parametrize("box_refine", [True, False])
    @pytest.mark.parametrize("one_to_many", ["none", "internal", "output"])
    def test_values(self, head_sharing, box_refine, one_to_many):
        output, _, _ = self.decode(
            head_sharing=head_sharing,
            box_refine=box_refine,
            one_to_many=one_to_many,
            one_to_many_ffn=one_to_many == "internal",
        )
        assert ("one_to_many" in output) == (one_to_many != "none")

    @pytest.mark.parametrize("twice", [True, False])
    def test_gradients_reach_the_head_before_only_looking_twice(self, twice):
        output, starts, heads = self.decode(look_forward_twice=twice)
        assert not any(start.requires_grad for start in starts)
        for branch in output.values():
            reached = heads_reached(heads, branch, "bbox_embed")
            assert reached == ([[0], [0, 1], [1, 2]] if twice else [[0], [1], [2]])


def test_box_losses_never_train_class_heads():
    decoder, heads = decoding(look_forward_twice=True)
    output = decode(decoder, random_queries(), random_pyramid(SHAPES, VALID_SIZES), heads)
    assert heads_reached(heads, output["one_to_one"], "class_embed") == [[], [], []]


class TestOneToMany:
    def decode(self, *, training: bool = True, **changes) -> dict[str, Predictions]:
        decoder, heads = decoding(**changes)
        decoder.train(training)
        return decode(decoder, random_queries(), random_pyramid(SHAPES, VALID_SIZES), heads)

    def test_none(self):
        assert self.decode(one_to_many="none", one_to_many_ffn=False).keys() == {"one_to_one"}

    @pytest.mark.parametrize("one_to_many", ["internal", "output"])
    def test_evaluation_has_none(self, one_to_many):
        options = {"one_to_many": one_to_many, "one_to_many_ffn": False}
        assert self.decode(training=False, **options).keys() == {"one_to_one"}

    def test_at_the_output_it_shares_boxes_and_has_classes_of_its_own(self):
        one, many = self.decode(one_to_many="output", one_to_many_ffn=False).values()
        assert torch.equal(one.boxes, many.boxes)
        assert not (one.logits == many.logits).any()

    @pytest.mark.parametrize("one_to_many_ffn", [True, False])
    def test_inside_it_shares_heads_and_has_states_of_its_own(self, one_to_many_ffn):
        one, many = self.decode(one_to_many="internal", one_to_many_ffn=one_to_many_ffn).values()
        assert one.logits.shape == many.logits.shape == (3, 2, QUERIES, 3)
        assert one.boxes.shape == many.boxes.shape == (3, 2, QUERIES, 4)
        assert not (one.logits == many.logits).any()
        assert not (one.boxes == many.boxes).any()

    def test_it_does_not_disturb_one_to_one(self):
        """Same weights, with and without the branch: the same answer."""
        config = {"one_to_many_ffn": False}
        with_branch, heads = decoding(one_to_many="internal", **config)
        without, _ = decoding(one_to_many="none", **config)
        without.load_state_dict(with_branch.state_dict())
        pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries()
        result, expected = (
            decode(x, queries, pyramid, heads)["one_to_one"] for x in (with_branch, without)
        )
        assert all(map(torch.equal, result, expected))


def test_half_precision_tokens_give_float32_boxes():
    config = tiny_config()
    decoder, heads = Decoder(config).bfloat16(), DetectionHeads(config, 3).bfloat16()
    pyramid, queries = random_pyramid(SHAPES, VALID_SIZES), random_queries()
    half = FeaturePyramid(pyramid.tokens.bfloat16(), SHAPES, pyramid.valid_sizes)
    queries = queries._replace(
        content=queries.content.bfloat16(),
        query_pos=queries.query_pos.bfloat16(),
        reference=queries.reference.float(),
    )
    for branch in decode(decoder, queries, half, heads).values():
        assert branch.boxes.dtype == torch.float32
        assert branch.logits.dtype == torch.bfloat16
        assert branch.boxes.isfinite().all()
