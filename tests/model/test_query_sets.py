"""Extra sets of queries: each group runs as if it were alone, and inference has the primary one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from model.helpers import image_batch, random_pyramid, randomize, tiny_config

from msdetr.config import ModelConfig
from msdetr.model.detector import Detector
from msdetr.model.heads import DetectionHeads
from msdetr.model.proposal_queries import ProposalQueries
from msdetr.model.query_sets import QuerySet, QuerySets, visible_queries
from msdetr.structures import Branch, DetectorOutput, Predictions

QUERIES, HYBRID_QUERIES, GROUPS, LAYERS = 4, 6, 3, 2
ONE_STAGE = {"two_stage": False}
FIRST_CLASS = {"two_stage": True, "look_forward_twice": True}
BEST_CLASS = FIRST_CLASS | {"proposal_score": "best_class"}
MIXED = {"mixed_selection": True}
STAGES = {
    "one stage": ONE_STAGE,
    "first class": FIRST_CLASS,
    "first class, mixed": FIRST_CLASS | MIXED,
    "best class": BEST_CLASS,
    "best class, mixed": BEST_CLASS | MIXED,
}
SUPERVISION = {
    "none": {"one_to_many": "none", "one_to_many_ffn": False},
    "internal": {"one_to_many": "internal", "one_to_many_ffn": False},
    "internal, ffn": {"one_to_many": "internal", "one_to_many_ffn": True},
    "output": {"one_to_many": "output", "one_to_many_ffn": False},
}


def combinations() -> dict[str, ModelConfig]:
    """All combinations of extra queries, stages and one-to-many supervision. Orders take turns."""
    found = {}
    for kind, (i, stage), (j, supervision) in product(
        ("hybrid", "group"), enumerate(STAGES), enumerate(SUPERVISION)
    ):
        if kind == "hybrid" or not stage.startswith("first class"):
            found[f"{kind}, {stage}, {supervision}"] = tiny_config(
                extra_queries=kind,
                num_queries=QUERIES,
                num_hybrid_queries=HYBRID_QUERIES,
                num_groups=GROUPS,
                num_decoder_layers=LAYERS,
                decoder_order=("cross_self", "self_cross")[(i + j) % 2],
                **STAGES[stage],
                **SUPERVISION[supervision],
            )
    return found


ALL = combinations()


def every_config(prefix: str = "", suffix: str = "") -> pytest.MarkDecorator:
    chosen = {n: c for n, c in ALL.items() if n.startswith(prefix) and n.endswith(suffix)}
    return pytest.mark.parametrize("config", chosen.values(), ids=chosen)


def random_detector(config: ModelConfig) -> Detector:
    detector = Detector(config).double()
    randomize(detector)
    return detector


def of_group(detector: Detector, group: int) -> Detector:
    """A detector without extra queries that has the weights of one group of the primary set."""
    config = detector.config
    alone = Detector(replace(config, extra_queries="none")).double()
    state = detector.state_dict()
    own = dict(state)
    if "query_selection.query_embed.weight" in state:
        rows = state["query_selection.query_embed.weight"]
        own["query_selection.query_embed.weight"] = rows[group * QUERIES : (group + 1) * QUERIES]
    if group and config.two_stage:
        for name in ("enc_output", "enc_output_norm"):
            for kind in ("weight", "bias"):
                other = state[f"query_selection.group_{name}.{group - 1}.{kind}"]
                own[f"query_selection.{name}.{kind}"] = other
        for head in ("class_embed", "bbox_embed"):
            prefix = f"heads.group_{head}.{group - 1}."
            for name in [name for name in state if name.startswith(prefix)]:
                own[f"heads.{head}.{LAYERS}.{name.removeprefix(prefix)}"] = state[name]
    alone.load_state_dict({name: own[name] for name in alone.state_dict()})
    return alone


def of_branch(branch: Branch, group: int) -> Predictions:
    """Predictions of one group."""
    size = branch.predictions.logits.shape[2] // branch.num_groups
    return Predictions(*(x[:, :, group * size : (group + 1) * size] for x in branch.predictions))


def assert_equal_branches(
    output: DetectorOutput, alone: DetectorOutput, group: int, *, extra: set[str]
) -> None:
    """All branches of `alone` are in the output, which has the branches `extra` besides."""
    assert output.branches.keys() == alone.branches.keys() | extra
    for name, expected in alone.branches.items():
        assert expected.num_groups == 1
        result = of_branch(output.branches[name], group)
        for mine, truth in zip(result, expected.predictions, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)


@every_config("group")
def test_groups_in_one_pass_are_groups_in_separate_passes(config):
    detector, images = random_detector(config), image_batch()
    with torch.no_grad():
        output = detector(images)
        for group in range(GROUPS):
            alone = of_group(detector, group)(images)
            assert_equal_branches(output, alone, group, extra=set())
    assert {branch.num_groups for branch in output.branches.values()} == {GROUPS}
    first, second = (of_branch(output.branches["one_to_one"], group) for group in (0, 1))
    assert not torch.isclose(first.logits, second.logits).any(), "groups differ"


@every_config("hybrid")
def test_the_primary_set_does_not_see_the_hybrid_one(config):
    detector, images = random_detector(config), image_batch()
    with torch.no_grad():
        output = detector(images)
        alone = of_group(detector, 0)(images)
    assert_equal_branches(output, alone, 0, extra={"hybrid"})
    hybrid, num_groups = output.branches["hybrid"].predictions, output.branches["hybrid"].num_groups
    assert num_groups == 1
    assert hybrid.logits.shape == (LAYERS, 2, HYBRID_QUERIES, config.num_classes)


def test_hybrid_queries_run_as_a_primary_set_would():
    """One stage: learned embeddings in the other order exchange the two sets."""
    config = replace(ALL["hybrid, one stage, internal"], num_hybrid_queries=QUERIES)
    detector, images = random_detector(config), image_batch()
    with torch.no_grad():
        before = detector(images).branches
        weight = detector.query_selection.query_embed.weight
        weight.copy_(weight.roll(QUERIES, 0))
        after = detector(images).branches
    for names in (("one_to_one", "hybrid"), ("hybrid", "one_to_one")):
        first, second = (
            branches[name].predictions
            for branches, name in zip((before, after), names, strict=True)
        )
        for mine, truth in zip(first, second, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)


@every_config(suffix="internal, ffn")
def test_evaluation_is_that_of_a_model_without_extra_queries(config):
    detector, images = random_detector(config).eval(), image_batch()
    alone = of_group(detector, 0).eval()
    with torch.no_grad():
        output, expected = detector(images), alone(images)
    assert output.branches.keys() == {"one_to_one"}
    assert output.branches["one_to_one"].num_groups == 1
    assert all(map(torch.equal, output.one_to_one, expected.one_to_one))


@every_config()
def test_every_parameter_gets_a_gradient_under_autocast(config):
    """A weight is cast once: also where proposals are scored without gradients."""
    detector = Detector(config)
    randomize(detector)
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(image_batch())
    loss = sum(x.square().mean() for b in output.branches.values() for x in b.predictions)
    loss.backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in detector.parameters())


class TestSelection:
    SHAPES = ((4, 6), (2, 3))
    VALID_SIZES = ([[(4, 6), (2, 3)]]) * 2

    def selecting(self, **changes) -> tuple[ProposalQueries, DetectionHeads]:
        config = tiny_config(
            num_queries=QUERIES, num_hybrid_queries=HYBRID_QUERIES, num_groups=GROUPS, **changes
        )
        selection, heads = ProposalQueries(config).double(), DetectionHeads(config, 3).double()
        randomize(selection)
        randomize(heads)
        return selection, heads

    @pytest.mark.parametrize("mixed_selection", [True, False])
    def test_the_next_proposals_after_the_primary_ones_are_hybrid(self, mixed_selection):
        selection, heads = self.selecting(extra_queries="hybrid", mixed_selection=mixed_selection)
        queries = selection(random_pyramid(self.SHAPES, self.VALID_SIZES), heads)
        proposals = queries.proposals["encoder"].predictions
        ranks = proposals.logits[0, ..., 0].argsort(dim=1, descending=True)
        primary, hybrid = queries.sets.split(queries.reference)
        for image in range(2):
            boxes = proposals.boxes[0, image, ranks[image]]
            assert torch.equal(primary[image], boxes[:QUERIES])
            assert torch.equal(hybrid[image], boxes[QUERIES : QUERIES + HYBRID_QUERIES])
        assert not queries.reference.requires_grad
        if mixed_selection:
            learned = selection.query_embed.weight
            assert torch.equal(queries.content, learned.expand(2, -1, -1))

    @pytest.mark.parametrize("kind", ["none", "hybrid"])
    def test_the_best_classes_rank_proposals_and_the_primary_ones_are_supervised(self, kind):
        selection, heads = self.selecting(extra_queries=kind, proposal_score="best_class")
        pyramid = random_pyramid(self.SHAPES, self.VALID_SIZES)
        queries = selection(pyramid, heads)
        (logits, boxes), anchors, num_groups = queries.proposals["encoder_selected"]
        tokens = selection.enc_output_norm(selection.enc_output(pyramid.tokens))
        class_head, _ = heads.of_encoder()
        scores = class_head(tokens).amax(-1).sort(dim=1, descending=True).values
        assert torch.equal(logits[0].amax(-1), scores[:, :QUERIES])
        assert torch.equal(boxes[0].detach(), queries.reference[:, :QUERIES])
        assert queries.proposals.keys() == {"encoder_selected"}
        assert (anchors, num_groups) == (None, 1)
        assert boxes.requires_grad
        assert not queries.reference.requires_grad

    def test_too_few_tokens_for_training_are_enough_for_evaluation(self):
        config = tiny_config(extra_queries="hybrid", num_queries=QUERIES, num_hybrid_queries=17)
        detector, images = Detector(config), image_batch()
        message = "21 queries cannot be chosen from 20 tokens"
        with pytest.raises(
            ValueError, match=f"{message}.*fewer num_queries and num_hybrid_queries"
        ):
            detector(images)
        assert detector.eval()(images).one_to_one.boxes.shape == (2, 2, QUERIES, 4)

    def test_each_group_selects_from_all_tokens(self):
        config = tiny_config(extra_queries="group", proposal_score="best_class", num_queries=20)
        detector, images = Detector(config), image_batch()
        boxes = detector(images).branches["one_to_one"].predictions.boxes
        assert boxes.shape == (2, 2, 20 * config.num_groups, 4)
        one_more = Detector(replace(config, num_queries=21))
        with pytest.raises(ValueError, match=r"21 queries cannot be chosen .* fewer num_queries$"):
            one_more(images)


def extra_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a detector has for its extra queries only."""
    alone = Detector(replace(config, extra_queries="none")).state_dict()
    state = Detector(config).state_dict()
    assert alone.keys() <= state.keys()
    return {
        name: tuple(x.shape)
        for name, x in state.items()
        if name not in alone or alone[name].shape != x.shape
    }


@pytest.mark.parametrize(("kind", "rows"), [("hybrid", 10), ("group", 12)])
@pytest.mark.parametrize("stage", ["one stage", "best class", "best class, mixed"])
def test_names_of_parameters(kind, rows, stage):
    expected = {}
    if stage != "best class":
        width = 64 if stage == "one stage" else 32
        expected["query_selection.query_embed.weight"] = (rows, width)
    if kind == "group" and stage != "one stage":
        for group in range(GROUPS - 1):
            for name, shape in (
                ("query_selection.group_enc_output.{}.weight", (32, 32)),
                ("query_selection.group_enc_output.{}.bias", (32,)),
                ("query_selection.group_enc_output_norm.{}.weight", (32,)),
                ("query_selection.group_enc_output_norm.{}.bias", (32,)),
                ("heads.group_class_embed.{}.weight", (3, 32)),
                ("heads.group_class_embed.{}.bias", (3,)),
                *((f"heads.group_bbox_embed.{{}}.layers.{i}.weight", (32, 32)) for i in (0, 1)),
                *((f"heads.group_bbox_embed.{{}}.layers.{i}.bias", (32,)) for i in (0, 1)),
                ("heads.group_bbox_embed.{}.layers.2.weight", (4, 32)),
                ("heads.group_bbox_embed.{}.layers.2.bias", (4,)),
            ):
                expected[name.format(group)] = shape
    assert extra_names(ALL[f"{kind}, {stage}, output"]) == expected


def test_a_set_before_the_others():
    """The primary set keeps its place among the queries of the decoder."""
    sets = QuerySets((QuerySet("one_to_one", 4, 2), QuerySet("hybrid", 5)))
    more = sets.preceded_by(QuerySet("denoising", 3, 2, sees_primary=True))
    assert [part.branch for part in more.sets] == ["denoising", "one_to_one", "hybrid"]
    assert more.primary == sets.primary
    assert (sets.num_queries, more.num_queries) == (13, 19)
    x = torch.arange(19)[None, :, None]
    assert [part.flatten().tolist() for part in more.split(x)] == [
        list(range(6)),
        list(range(6, 14)),
        list(range(14, 19)),
    ]
    assert torch.equal(more.of_primary(x), more.split(x)[1])
    assert torch.equal(sets.of_primary(x[:, :13]), x[:, :8])


def test_what_a_set_sees():
    query_set = QuerySet("denoising", 2, 2, sees_primary=True)
    expected = [[1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    visible = visible_queries(query_set, 3, torch.device("cpu"))
    assert visible.tolist() == [[bool(x) for x in row] for row in (*expected, expected[-1])]


def test_initial_values_of_groups():
    detector = Detector(ALL["group, best class, mixed, none"])
    selection, heads = detector.query_selection, detector.heads
    projections = [selection.enc_output, *selection.group_enc_output]
    weights = [linear.weight.detach() for linear in projections]
    assert len({float(weight.sum()) for weight in weights}) == GROUPS, "each is drawn anew"
    bound = math.sqrt(6 / 64)  # Xavier's
    assert all(0.9 * bound < weight.abs().max() <= bound for weight in weights)
    for group in range(GROUPS):
        class_head, box_head = heads.of_encoder(group)
        torch.testing.assert_close(class_head.bias, torch.full((3,), -math.log(99)))
        assert not box_head.last.weight.any()
        assert not box_head.last.bias.any()
    parameters = [id(p) for _, p in detector.named_parameters(remove_duplicate=False)]
    assert len(set(parameters)) == len(parameters), "no group shares a parameter"
