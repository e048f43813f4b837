"""The criterion: which losses there are, how they are weighed, and what reaches the predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from scenes import padded_targets, random_boxes, random_scene
from torch import Tensor

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.structures import Branch, DetectorOutput, Predictions, TargetCount, Targets
from msdetr.supervision.criterion import Criterion, LossOutput
from msdetr.supervision.objectives import build_objectives

LAYERS, QUERIES, HYBRID_QUERIES, TOKENS, CLASSES = 3, 12, 34, 20, 3
KEEP_ALL = AssignmentConfig(positive_fraction=1.0)  # nothing is drawn
BRANCHES = ("one_to_one", "one_to_many", "hybrid", "encoder")


def random_output(
    counts: tuple[int, ...] = (3, 0, 5), dtype: torch.dtype = torch.float32
) -> tuple[DetectorOutput, Targets]:
    """Four branches of leaves that record gradients, and targets."""
    batch = len(counts)
    scene = random_scene(counts, layers=LAYERS, queries=QUERIES, classes=CLASSES, dtype=dtype)
    many = random_scene(counts, layers=LAYERS, queries=QUERIES, classes=CLASSES, dtype=dtype)
    hybrid = Predictions(
        torch.randn(LAYERS, batch, HYBRID_QUERIES, CLASSES, dtype=dtype),
        random_boxes(LAYERS, batch, HYBRID_QUERIES, dtype=dtype),
    )
    anchors = random_boxes(batch, TOKENS, dtype=dtype)
    proposals = Predictions(
        torch.randn(1, batch, TOKENS, CLASSES, dtype=dtype),
        random_boxes(1, batch, TOKENS, dtype=dtype),
    )
    output = DetectorOutput(
        {
            "one_to_one": Branch(Predictions(scene.logits, scene.boxes)),
            "one_to_many": Branch(Predictions(many.logits, many.boxes)),
            "hybrid": Branch(hybrid),
            "encoder": Branch(proposals, anchors),
        }
    )
    for leaf in leaves(output):
        leaf.requires_grad_()
    return output, scene.targets


def with_denoising(output: DetectorOutput, targets: Targets) -> DetectorOutput:
    """The output with a branch of two groups of denoising queries, one per target slot."""
    batch, slots = targets.labels.shape
    predictions = Predictions(
        torch.randn(LAYERS, batch, 2 * slots, CLASSES, requires_grad=True),
        random_boxes(LAYERS, batch, 2 * slots).requires_grad_(),
    )
    return DetectorOutput(output.branches | {"denoising": Branch(predictions, num_groups=2)})


def leaves(output: DetectorOutput) -> list[Tensor]:
    """All logits and boxes."""
    return [tensor for branch in output.branches.values() for tensor in branch.predictions]


def mapped(output: DetectorOutput, change: Callable[[Tensor], Tensor]) -> DetectorOutput:
    """The output with `change` applied to all logits and boxes."""
    return DetectorOutput(
        {
            name: branch._replace(predictions=Predictions(*map(change, branch.predictions)))
            for name, branch in output.branches.items()
        }
    )


def copied(output: DetectorOutput) -> DetectorOutput:
    """The same predictions as new leaves."""
    return mapped(output, lambda x: x.detach().clone().requires_grad_())


def with_encoder(output: DetectorOutput, **changes: object) -> DetectorOutput:
    """The output with other fields of the encoder's branch."""
    encoder = output.branches["encoder"]._replace(**changes)
    return DetectorOutput({**output.branches, "encoder": encoder})


def without(output: DetectorOutput, *names: str) -> DetectorOutput:
    """The output without some branches."""
    return DetectorOutput({n: b for n, b in output.branches.items() if n not in names})


def losses_of(
    output: DetectorOutput,
    targets: Targets,
    assignment: AssignmentConfig = KEEP_ALL,
    loss: LossConfig | None = None,
    **options,
) -> LossOutput:
    return Criterion(assignment, loss or LossConfig())(output, targets, **options)


def test_terms_are_detached_and_per_layer():
    output, targets = random_output()
    losses = losses_of(output, targets)
    shapes = {name: tuple(values.shape) for name, values in losses.terms.items()}
    assert shapes == {
        f"{branch}/{term}": (1,) if branch == "encoder" else (LAYERS,)
        for branch in BRANCHES
        for term in ("class", "bbox", "giou")
    }
    assert not any(values.requires_grad for values in losses.terms.values())
    assert losses.total.shape == ()
    assert losses.total.requires_grad
    assert all((values > 0).all() for values in losses.terms.values())


def test_missing_branches_have_no_terms():
    output, targets = random_output()
    terms = losses_of(output, targets).terms
    some = without(output, "encoder")
    assert losses_of(some, targets).terms.keys() == terms.keys() - {
        name for name in terms if name.startswith("encoder")
    }
    one = without(some, "one_to_many", "hybrid")
    actual = losses_of(one, targets).terms
    assert list(actual) == ["one_to_one/class", "one_to_one/bbox", "one_to_one/giou"]
    assert all(torch.equal(actual[name], terms[name]) for name in actual)


def weight_name(branch: str, term: str) -> str:
    return f"{term}_weight" if branch == "one_to_one" else f"{branch}_{term}_weight"


def test_total_is_the_weighted_sum():
    weights = {
        weight_name(branch, term): torch.rand(()).item()
        for branch in (*BRANCHES, "denoising")
        for term in ("class", "bbox", "giou")
    }
    assert weights.keys() == {f.name for f in fields(LossConfig) if f.name.endswith("_weight")}
    output, targets = random_output(dtype=torch.float64)
    output = with_denoising(output, targets)
    losses = losses_of(output, targets, loss=LossConfig(**weights))
    expected = sum(
        weights[weight_name(*name.split("/"))] * values.sum().item()
        for name, values in losses.terms.items()
    )
    assert losses.total.item() == pytest.approx(expected)


@pytest.mark.parametrize("branch", [*BRANCHES, "denoising"])
@pytest.mark.parametrize("term", ["class", "bbox", "giou"])
def test_a_weight_belongs_to_one_branch_and_one_kind_of_prediction(branch, term):
    names = [field.name for field in fields(LossConfig) if field.name.endswith("_weight")]
    weights = dict.fromkeys(names, 0.0) | {weight_name(branch, term): 1.0}
    output, targets = random_output()
    output = with_denoising(output, targets)
    losses = losses_of(output, targets, loss=LossConfig(**weights))
    assert torch.equal(losses.total, losses.terms[f"{branch}/{term}"].sum())
    losses.total.backward()
    for name in output.branches:
        predictions = output.branches[name].predictions
        assert predictions.logits.grad.any() == (name == branch and term == "class")
        assert predictions.boxes.grad.any() == (name == branch and term != "class")


def test_focal_options_are_used():
    output, targets = random_output()
    terms = losses_of(output, targets).terms
    for change in ({"focal_alpha": 0.5}, {"focal_gamma": 1.0}):
        changed = losses_of(output, targets, loss=LossConfig(**change)).terms
        differing = {name for name in terms if not torch.equal(terms[name], changed[name])}
        assert differing == {f"{branch}/class" for branch in BRANCHES}


@pytest.mark.parametrize("counts", [(0, 0, 0), (0,)])
def test_without_targets_the_graph_is_the_same(counts):
    output, targets = random_output(counts)
    losses = losses_of(output, targets)
    assert losses.total.isfinite()
    losses.total.backward()
    for predictions, *_ in output.branches.values():
        assert predictions.logits.grad.any()  # background
        assert predictions.boxes.grad is not None
        assert not predictions.boxes.grad.any()
    for name, values in losses.terms.items():
        assert values.any() == name.endswith("class")


def test_every_prediction_gets_a_gradient():
    output, targets = random_output()
    losses_of(output, targets).total.backward()
    for leaf in leaves(output):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.flatten(1).any(-1).all(), "in every layer"
    assert not output.branches["encoder"].anchors.requires_grad


def test_without_auxiliary_losses_only_the_last_layer_counts():
    output, targets = random_output()
    every = losses_of(copied(output), targets).terms
    last = losses_of(output, targets, loss=LossConfig(auxiliary=False))
    for name, values in last.terms.items():
        torch.testing.assert_close(values, every[name][-1:])
    last.total.backward()
    for name in ("one_to_one", "one_to_many", "hybrid"):
        for leaf in output.branches[name].predictions:
            assert not leaf.grad[:-1].any()
            assert leaf.grad[-1].any()
    assert output.branches["encoder"].predictions.logits.grad.any()


def test_losses_are_divided_by_the_number_of_targets():
    output, targets = random_output(dtype=torch.float64)
    default = losses_of(output, targets)
    assert targets.count.sum() == 8
    for number in (8, 2.5, 100):
        losses = losses_of(
            output, targets, num_targets=TargetCount(*torch.full((2,), float(number)))
        )
        torch.testing.assert_close(losses.total, default.total * 8 / number)
        for name, values in losses.terms.items():
            torch.testing.assert_close(values, default.terms[name] * 8 / number)
    few = losses_of(output, targets, num_targets=TargetCount(*torch.full((2,), 0.25)))
    for name, values in few.terms.items():
        divisor = 1.5 if name.startswith("hybrid") else 1.0  # 6 * 0.25, and at least 1
        total = default.terms[name] * 8 * (6 if name.startswith("hybrid") else 1)
        torch.testing.assert_close(values, total / divisor)


def test_perfect_boxes_cost_nothing():
    boxes = random_boxes(2, 4)
    targets = padded_targets([torch.tensor([0, 1, 2, 1])] * 2, list(boxes), slots=6)
    predicted = boxes[None].requires_grad_()
    logits = torch.full((1, 2, 4, CLASSES), -20.0)
    for image in range(2):
        logits[0, image, range(4), targets.labels[image, :4]] = 20.0
    output = DetectorOutput({"one_to_one": Branch(Predictions(logits, predicted))})
    losses = losses_of(output, targets)
    assert losses.total.item() == pytest.approx(0.0, abs=1e-5)


def test_the_generator_decides_the_draw():
    assignment = AssignmentConfig(positive_fraction=0.25, one_to_many_threshold=0.0)
    output, targets = random_output((5, 4, 6))

    def total(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return losses_of(output, targets, assignment, generator=generator).total.item()

    assert total(1) == total(1)
    assert len({total(seed) for seed in range(5)}) > 1


def test_every_layer_and_image_draws_priorities_of_its_own():
    output, _ = random_output((5, 4, 6))
    criterion = Criterion(KEEP_ALL, LossConfig())
    before = torch.get_rng_state()
    drawn, again = (
        criterion.draw_priority(output, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert drawn.keys() == {"one_to_many"}
    assert torch.equal(drawn["one_to_many"], again["one_to_many"])
    rows = drawn["one_to_many"].flatten(0, 1)
    assert rows.shape == (LAYERS * 3, QUERIES)
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_priority_decides_the_draw():
    assignment = AssignmentConfig(positive_fraction=0.25, one_to_many_threshold=0.0)
    output, targets = random_output((5, 4, 6))
    priorities = torch.rand(2, 3, QUERIES)
    for auxiliary in (True, False):
        totals = [
            losses_of(
                output,
                targets,
                assignment,
                LossConfig(auxiliary=auxiliary),
                priority={"one_to_many": priority},
            ).total.item()
            for priority in (priorities[0], priorities[0].expand(LAYERS, -1, -1), priorities[1])
        ]
        assert totals[0] == totals[1] != totals[2]


def test_half_precision_predictions_give_float32_losses():
    output, targets = random_output()
    half = mapped(output, lambda x: x.detach().bfloat16())
    rounded = mapped(half, Tensor.float)
    losses, expected = losses_of(half, targets), losses_of(rounded, targets)
    assert losses.total.dtype == torch.float32
    assert all(values.dtype == torch.float32 for values in losses.terms.values())
    assert torch.equal(losses.total, expected.total)


def test_half_precision_logits_with_float32_boxes_train():
    """What autocast gives."""
    output, targets = random_output()
    half = mapped(output, lambda x: x if x.shape[-1] == 4 else x.bfloat16())
    losses = losses_of(half, targets)
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(output))


class TestEncoder:
    def terms(self, output: DetectorOutput, targets: Targets, **assignment) -> dict[str, Tensor]:
        losses = losses_of(output, targets, replace(KEEP_ALL, **assignment))
        return {name: values for name, values in losses.terms.items() if name.startswith("encoder")}

    def test_targets_have_one_class(self):
        output, targets = random_output()
        other = targets._replace(labels=(targets.labels + 1) % CLASSES)
        actual, expected = self.terms(output, other), self.terms(output, targets)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    def test_anchors_decide_the_match_by_default(self):
        output, targets = random_output()
        moved = with_encoder(output, anchors=output.branches["encoder"].anchors.flip(1))
        by_anchor = [self.terms(x, targets)["encoder/bbox"] for x in (output, moved)]
        assert not torch.equal(*by_anchor)
        by_box = [
            self.terms(x, targets, encoder_match="predictions")["encoder/bbox"]
            for x in (output, moved)
        ]
        assert torch.equal(*by_box)
        assert by_box[0] < min(by_anchor)  # the match of least cost for these boxes

    def test_class_cost_is_zero_by_default(self):
        output, targets = random_output()
        proposals = output.branches["encoder"].predictions
        logits = 100 * torch.randn(1, 3, TOKENS, CLASSES)
        confident = with_encoder(output, predictions=proposals._replace(logits=logits))
        boxes = [self.terms(x, targets)["encoder/bbox"] for x in (output, confident)]
        assert torch.equal(*boxes)
        boxes = [
            self.terms(x, targets, encoder_cost_class=100.0)["encoder/bbox"]
            for x in (output, confident)
        ]
        assert not torch.equal(*boxes)

    def test_the_default_match_needs_anchors(self):
        output, targets = random_output()
        with pytest.raises(ValueError, match="the matcher reads anchors, and the branch has none"):
            losses_of(with_encoder(output, anchors=None), targets)


def test_no_objectives_are_not_the_default_ones():
    output, targets = random_output()
    with pytest.raises(
        ValueError, match="no objective supervises encoder, hybrid, one_to_many, one_to_one"
    ):
        Criterion(KEEP_ALL, LossConfig(), objectives=[])(output, targets)


def test_every_branch_needs_an_objective():
    output, targets = random_output()
    extra = DetectorOutput({**output.branches, "reversed": output.branches["one_to_one"]})
    with pytest.raises(ValueError, match="no objective supervises reversed"):
        losses_of(extra, targets)


def test_the_order_of_branches_and_terms_does_not_matter():
    """Weights are found by name: an output in another order gives each loss the same weight."""
    output, targets = random_output(dtype=torch.float64)
    loss = LossConfig(class_weight=3.0, bbox_weight=0.5, encoder_giou_weight=7.0)
    objectives = [
        replace(objective, weights=dict(reversed(objective.weights.items())))
        for objective in build_objectives(KEEP_ALL, loss)
    ]
    turned = DetectorOutput(dict(reversed(output.branches.items())))
    expected = losses_of(output, targets, loss=loss)
    result = Criterion(KEEP_ALL, loss, objectives=objectives[::-1])(turned, targets)
    torch.testing.assert_close(result.total, expected.total)
    assert result.terms.keys() == expected.terms.keys()
    for name, values in expected.terms.items():
        torch.testing.assert_close(result.terms[name], values)


def test_no_gradient_is_recorded_by_the_assignment():
    output, targets = random_output()
    criterion = Criterion(KEEP_ALL, LossConfig())
    for assignment in criterion.assign(output, targets).values():
        assert not any(tensor.requires_grad for tensor in assignment)


def test_costs_reach_the_one_to_one_match():
    output, targets = random_output((5, 4, 6))
    boxes = losses_of(output, targets).terms["one_to_one/bbox"]
    for change in ({"cost_class": 100.0}, {"cost_bbox": 0.0}, {"cost_giou": 0.0}):
        changed = losses_of(output, targets, replace(KEEP_ALL, **change)).terms
        assert not torch.equal(changed["one_to_one/bbox"], boxes), change


def test_merged_indices_add_the_one_to_one_pairs():
    output, targets = random_output((5, 4, 6))
    plain = losses_of(output, targets).terms
    merged = losses_of(output, targets, replace(KEEP_ALL, indices_merge=True)).terms
    for name in plain:
        assert torch.equal(plain[name], merged[name]) != name.startswith("one_to_many"), name


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_show_in_the_loss_and_raise_nothing(branch, bad):
    output, targets = random_output()
    with torch.no_grad():
        for leaf in output.branches[branch].predictions:
            leaf[:, 0] = bad
    losses = losses_of(output, targets)
    assert not losses.total.isfinite()
    for name, values in losses.terms.items():
        assert values.isfinite().all() == (not name.startswith(branch)), name


def test_results_do_not_depend_on_the_number_of_slots():
    output, targets = random_output(dtype=torch.float64)
    more = Targets(
        torch.cat((targets.labels, torch.zeros(3, 9, dtype=torch.int64)), dim=1),
        torch.cat((targets.boxes, torch.zeros(3, 9, 4, dtype=torch.float64)), dim=1),
        targets.count,
    )
    for config in (KEEP_ALL, replace(KEEP_ALL, indices_merge=True)):
        few, many = losses_of(output, targets, config), losses_of(output, more, config)
        torch.testing.assert_close(few.total, many.total)


@pytest.mark.parametrize(
    ("impl", "indices_merge", "counts", "groups"),
    [
        ("reference", True, (3, 0, 5), 1),
        ("reference", False, (3, 0, 5), 2),
        ("triton", True, (3, 0, 5), 1),
        ("triton", False, (0, 0, 0), 2),
    ],
)
def test_compiles_in_one_graph(request, impl, indices_merge, counts, groups):
    if impl == "triton":
        request.getfixturevalue("kernel_device")
    torch._dynamo.reset()
    output, targets = random_output(counts)
    for name in ("one_to_one", "one_to_many"):
        output.branches[name] = output.branches[name]._replace(num_groups=groups)
    criterion = Criterion(AssignmentConfig(indices_merge=indices_merge), LossConfig(), impl=impl)
    if torch.cuda.is_available() and impl == "triton":
        pytest.skip("this file's scenes are on the CPU")
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    priority = criterion.draw_priority(output)
    assert {name: x.shape for name, x in priority.items()} == {
        "one_to_many": (LAYERS, len(counts), QUERIES)
    }
    expected, other = criterion(output, targets, priority=priority), copied(output)
    actual = compiled(other, targets, priority=priority)
    torch.testing.assert_close(actual.total, expected.total)
    expected.total.backward()
    actual.total.backward()
    for mine, truth in zip(leaves(other), leaves(output), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad)
