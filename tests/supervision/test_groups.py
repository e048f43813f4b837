"""Groups of queries and hybrid queries under the criterion, alone and with one-to-many losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import pytest
import torch
from model.helpers import image_batch, randomize, tiny_config
from scenes import padded_targets, random_boxes, random_scene
from torch import Tensor

from msdetr.config import AssignmentConfig, LossConfig, ModelConfig
from msdetr.model.detector import Detector
from msdetr.structures import Branch, DetectorOutput, Predictions, TargetCount, Targets
from msdetr.supervision.criterion import Criterion, LossOutput

LAYERS, QUERIES, GROUPS, CLASSES = 2, 12, 3, 3
BRANCHES = ("one_to_one", "one_to_many", "encoder_selected")
COUNTS = [(3, 0, 5), (4,), (0, 0)]
KEEP_ALL = AssignmentConfig(positive_fraction=1.0)
DRAWING = AssignmentConfig(positive_fraction=0.25, one_to_many_threshold=0.0)
MERGING = replace(DRAWING, indices_merge=True)
WITHOUT_ONE_TO_MANY = {"one_to_many": "none", "one_to_many_ffn": False}
AVERAGE, SUM = (LossConfig(sum_group_losses=value) for value in (False, True))


def grouped_output(counts: tuple[int, ...], groups: int = GROUPS) -> tuple[DetectorOutput, Targets]:
    """Three branches with groups, of leaves that record gradients, and targets."""
    branches = {}
    for name in BRANCHES:
        layers = 1 if name == "encoder_selected" else LAYERS
        scene = random_scene(
            counts, layers=layers, queries=groups * QUERIES, classes=CLASSES, dtype=torch.float64
        )
        branches[name] = Branch(
            Predictions(scene.logits.requires_grad_(), scene.boxes.requires_grad_()),
            num_groups=groups,
        )
    return DetectorOutput(branches), near_queries(scene.targets, branches)


def near_queries(targets: Targets, branches: dict[str, Branch]) -> Targets:
    """The same targets, moved to boxes that queries of the first layer predict."""
    boxes = branches["one_to_one"].predictions.boxes.detach()[0, :, : targets.boxes.shape[1]]
    return targets._replace(boxes=torch.where(targets.mask[..., None], boxes, 0.0))


def of_group(x: Tensor, group: int) -> Tensor:
    """[N, B, QUERIES, ...] of one group."""
    return x[:, :, group * QUERIES : (group + 1) * QUERIES]


def group_alone(output: DetectorOutput, group: int) -> DetectorOutput:
    """The output as if there were one group."""
    return DetectorOutput(
        {
            name: Branch(Predictions(*(of_group(x, group) for x in branch.predictions)))
            for name, branch in output.branches.items()
        }
    )


def leaves(output: DetectorOutput) -> list[Tensor]:
    return [tensor for branch in output.branches.values() for tensor in branch.predictions]


def gradients(losses: Iterable[LossOutput], inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of the totals."""
    total = torch.stack([x.total for x in losses]).sum()
    found: tuple[Tensor, ...] = torch.autograd.grad(total, inputs, retain_graph=True)
    return list(found)


def random_priority() -> Tensor:
    return torch.rand(LAYERS, 3, GROUPS * QUERIES, dtype=torch.float64)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("loss", [AVERAGE, SUM], ids=["average", "sum"])
@pytest.mark.parametrize("assignment", [DRAWING, MERGING], ids=["draws", "merges"])
def test_losses_of_groups_are_those_of_each_group(assignment, loss, counts):
    output, targets = grouped_output(counts)
    criterion = Criterion(assignment, loss)
    priority = random_priority()[:, : len(counts)]
    together = criterion(output, targets, priority={"one_to_many": priority})
    each = [
        criterion(
            group_alone(output, group),
            targets,
            priority={"one_to_many": of_group(priority, group)},
        )
        for group in range(GROUPS)
    ]
    # At least one target is counted, however many groups there are.
    divisor = GROUPS if loss is AVERAGE and sum(counts) else 1
    assert together.terms.keys() == each[0].terms.keys()
    for name, values in together.terms.items():
        expected = torch.stack([losses.terms[name] for losses in each]).sum(0) / divisor
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0.0)
    inputs = leaves(output)
    for mine, truth in zip(gradients([together], inputs), gradients(each, inputs), strict=True):
        torch.testing.assert_close(mine, truth / divisor, rtol=1e-10, atol=1e-14)


def test_the_number_of_targets_of_all_ranks_counts_once_per_group():
    output, targets = grouped_output((3, 0, 5))
    criterion = Criterion(KEEP_ALL, AVERAGE)
    default = criterion(output, targets).total
    few, half = (
        criterion(output, targets, num_targets=TargetCount(*torch.full((2,), number))).total
        for number in (0.1, 4.0)
    )
    torch.testing.assert_close(half, 2 * default)
    torch.testing.assert_close(few, 3 * 8 * default)  # 3 * 0.1, and at least 1


def test_each_group_keeps_its_own_share_of_positives():
    output, targets = grouped_output((3, 0, 5))
    criterion = Criterion(DRAWING, AVERAGE)
    for priority in (random_priority(), random_priority()[0]):
        kept = criterion.assign(output, targets, priority={"one_to_many": priority})["one_to_many"]
        assert kept.mask.shape[:2] == (LAYERS, 3 * GROUPS), "images, and in each its groups"
        pairs = kept.mask.sum((2, 3)).unflatten(1, (3, GROUPS))
        assert (pairs[:, [0, 2]] == QUERIES // 4).all()
        assert not pairs[:, 1].any()


def test_each_group_is_matched_with_all_targets():
    output, targets = grouped_output((3, 0, 5))
    assignments = Criterion(KEEP_ALL, AVERAGE).assign(output, targets)
    for name in ("one_to_one", "encoder_selected"):
        mask = assignments[name].mask[..., 0].unflatten(1, (3, GROUPS))
        assert torch.equal(mask, targets.mask[:, None].expand_as(mask))


def test_selected_proposals_learn_the_labels_of_targets():
    output, targets = grouped_output((3, 0, 5))
    selected = Criterion(KEEP_ALL, AVERAGE).assign(output, targets)["encoder_selected"]
    labels = targets.labels[:, None].expand(-1, GROUPS, -1).flatten(0, 1)
    learned = selected.target_class[0].gather(1, selected.query_index[0, ..., 0])
    assert torch.equal(learned[selected.mask[0, ..., 0]], labels[selected.mask[0, ..., 0]])


def hybrid_output(
    counts: tuple[int, ...], queries: int, layers: int = LAYERS
) -> tuple[Branch, Targets]:
    """Hybrid queries and targets."""
    scene = random_scene(
        counts, layers=layers, queries=queries, classes=CLASSES, dtype=torch.float64
    )
    return Branch(
        Predictions(scene.logits.requires_grad_(), scene.boxes.requires_grad_())
    ), scene.targets


def losses_of(branches: dict[str, Branch], targets: Targets, k: int) -> LossOutput:
    loss = LossConfig(class_weight=2.0)  # the weights of hybrid queries
    return Criterion(replace(KEEP_ALL, hybrid_k=k), loss)(DetectorOutput(branches), targets)


def any_branch(counts: tuple[int, ...]) -> Branch:
    return hybrid_output(counts, 7)[0]


@pytest.mark.parametrize("queries", [40, 17], ids=["enough", "too few"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_hybrid_targets_are_repeated_targets(counts, queries):
    """17 queries are fewer than the 4 copies of 5 targets."""
    k = 4
    hybrid, targets = hybrid_output(counts, queries)
    repeated = padded_targets(
        [targets.labels[i, :n].repeat(k) for i, n in enumerate(counts)],
        [targets.boxes[i, :n].repeat(k, 1) for i, n in enumerate(counts)],
        slots=max(counts) * k + 1,
    )
    losses = losses_of({"one_to_one": any_branch(counts), "hybrid": hybrid}, targets, k)
    expected = losses_of({"one_to_one": hybrid}, repeated, 1)
    for term in ("class", "bbox", "giou"):
        torch.testing.assert_close(
            losses.terms[f"hybrid/{term}"], expected.terms[f"one_to_one/{term}"], rtol=1e-10, atol=0
        )
    inputs = list(hybrid.predictions)
    for mine, truth in zip(gradients([losses], inputs), gradients([expected], inputs), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-13)


def test_more_copies_than_queries_leave_none_free_and_the_divisor_as_it_is():
    hybrid, targets = hybrid_output((5, 1), 12)
    output = DetectorOutput({"one_to_one": any_branch((5, 1)), "hybrid": hybrid})
    criterion = Criterion(replace(KEEP_ALL, hybrid_k=6), LossConfig())
    query_index, mask, target_class = criterion.assign(output, targets)["hybrid"]
    assert mask.shape == (LAYERS, 2, targets.labels.shape[1], 6)
    assert (mask.sum((2, 3)) == torch.tensor([12, 6])).all()
    assert (target_class[:, 0] >= 0).all()
    distance = torch.zeros(LAYERS, dtype=torch.float64)
    for layer, image, target, place in mask.nonzero().tolist():
        box = hybrid.predictions.boxes[layer, image, query_index[layer, image, target, place]]
        distance[layer] += (box - targets.boxes[image, target]).abs().sum().detach()
    losses = criterion(output, targets)
    torch.testing.assert_close(losses.terms["hybrid/bbox"], distance / 36)


@pytest.mark.parametrize("counts", [(3, 0, 5), (4,)], ids=str)
def test_hybrid_queries_with_one_copy_are_twice_two_groups(counts):
    output, targets = grouped_output(counts, groups=2)
    branch = output.branches["one_to_one"]
    one, two = (
        Branch(Predictions(*(of_group(x, group) for x in branch.predictions))) for group in (0, 1)
    )
    groups = losses_of({"one_to_one": branch}, targets, 1)
    hybrid = losses_of({"one_to_one": one, "hybrid": two}, targets, 1)
    torch.testing.assert_close(hybrid.total, 2 * groups.total)
    inputs = list(branch.predictions)
    for mine, truth in zip(gradients([hybrid], inputs), gradients([groups], inputs), strict=True):
        torch.testing.assert_close(mine, 2 * truth)


class TestDetector:
    """Losses and gradients of whole detectors that share their weights."""

    CONFIG = tiny_config(
        num_queries=4,
        num_hybrid_queries=6,
        num_groups=3,
        mixed_selection=True,
        look_forward_twice=True,
    )
    ASSIGNMENT = replace(KEEP_ALL, hybrid_k=2, one_to_many_threshold=0.1)

    def detector(self, config: ModelConfig, state: dict[str, Tensor] | None = None) -> Detector:
        """A detector with random weights, or with those that `state` has for it."""
        torch.manual_seed(0)
        detector = Detector(config).double()
        if state is None:
            randomize(detector)
            return detector
        own = detector.state_dict()
        # Fewer sets have the first rows of learned queries.
        detector.load_state_dict({name: state[name][: len(x)] for name, x in own.items()})
        return detector

    def gradients(
        self, detector: Detector, loss: LossConfig, assignment: AssignmentConfig = ASSIGNMENT
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the gradients by parameter."""
        torch.manual_seed(1)
        images = image_batch()
        labels = [torch.tensor([0, 2]), torch.tensor([1])]
        targets = padded_targets(labels, [random_boxes(len(x)).double() for x in labels], slots=3)
        total = Criterion(assignment, loss)(detector(images), targets).total
        total.backward()
        named = detector.named_parameters()
        return total.detach(), {n: p.grad for n, p in named if p.grad is not None}

    def only(self, branch: str) -> LossConfig:
        """The default weights of one branch, and zero for the others."""
        weights = [field.name for field in fields(LossConfig) if field.name.endswith("_weight")]
        return LossConfig(**{name: 0.0 for name in weights if not name.startswith(f"{branch}_")})

    def assert_sum(self, whole: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> None:
        for name, gradient in whole.items():
            expected = torch.zeros_like(gradient)
            for part in parts:
                if name in part:
                    expected[: len(part[name])] += part[name]
            assert expected.any(), name
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11, msg=name)

    @pytest.mark.parametrize("supervision", ["internal", "output"])
    def test_ms_detr_with_hybrid_queries_is_the_sum_of_both(self, supervision):
        config = replace(
            self.CONFIG,
            extra_queries="hybrid",
            one_to_many=supervision,
            one_to_many_ffn=supervision == "internal",
        )
        combined = self.detector(config)
        state = combined.state_dict()
        ms_detr = self.detector(replace(config, extra_queries="none"), state)
        hybrid = self.detector(replace(config, **WITHOUT_ONE_TO_MANY), state)
        total, whole = self.gradients(combined, LossConfig())
        parts = [
            self.gradients(ms_detr, LossConfig()),
            self.gradients(hybrid, self.only("hybrid")),
        ]
        torch.testing.assert_close(total, sum(loss for loss, _ in parts))
        self.assert_sum(whole, [gradients for _, gradients in parts])

    @pytest.mark.parametrize("supervision", ["internal", "output"])
    def test_ms_detr_with_groups_is_the_sum_of_both(self, supervision):
        config = replace(
            self.CONFIG,
            extra_queries="group",
            proposal_score="best_class",
            one_to_many=supervision,
            one_to_many_ffn=supervision == "internal",
        )
        combined = self.detector(config)
        state = combined.state_dict()
        group = self.detector(replace(config, **WITHOUT_ONE_TO_MANY), state)
        total, whole = self.gradients(combined, LossConfig())
        parts = [
            self.gradients(group, LossConfig()),
            self.gradients(self.detector(config, state), self.only("one_to_many")),
        ]
        torch.testing.assert_close(total, sum(loss for loss, _ in parts))
        self.assert_sum(whole, [gradients for _, gradients in parts])

    def test_hybrid_queries_with_one_copy_are_twice_two_groups(self):
        """One stage: two sets of learned queries have the same parameters as two groups."""
        config = replace(
            self.CONFIG,
            two_stage=False,
            mixed_selection=False,
            num_hybrid_queries=4,
            num_groups=2,
            **WITHOUT_ONE_TO_MANY,
        )
        hybrid = self.detector(replace(config, extra_queries="hybrid"))
        group = self.detector(replace(config, extra_queries="group"), hybrid.state_dict())
        assert hybrid.state_dict().keys() == group.state_dict().keys()
        loss, assignment = LossConfig(class_weight=2.0), replace(KEEP_ALL, hybrid_k=1)
        (total, whole), (half, parts) = (
            self.gradients(detector, loss, assignment) for detector in (hybrid, group)
        )
        torch.testing.assert_close(total, 2 * half)
        self.assert_sum(whole, [parts, parts])
