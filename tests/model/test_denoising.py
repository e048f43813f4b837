"""Denoising queries: what they are made of, what they see, and that nothing sees them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from model.helpers import NUM_CLASSES, image_batch, randomize, tiny_config
from scenes import padded_targets, random_boxes
from torch import Tensor

from msdetr.boxes import box_iou, cxcywh_to_xyxy
from msdetr.config import AssignmentConfig, LossConfig, ModelConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.detector import Detector
from msdetr.structures import DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion, LossOutput

QUERIES, LAYERS, GROUPS, SLOTS = 4, 2, 3, 3
NONE = {"one_to_many": "none", "one_to_many_ffn": False}
INTERNAL = {"one_to_many": "internal", "one_to_many_ffn": True}
OUTPUT = {"one_to_many": "output", "one_to_many_ffn": False}
HYBRID = {"extra_queries": "hybrid", "num_hybrid_queries": 5}
GROUP = {"extra_queries": "group", "num_groups": 2, "proposal_score": "best_class"}
BOX = {"query_position": "box", "logit_eps": 1e-3}
DINO = {
    "decoder_order": "self_cross",
    "mixed_selection": True,
    "look_forward_twice": True,
    "proposal_score": "best_class",
    "head_sharing": "decoder",
    "decoder_norm": True,
    **BOX,
}
ONE_STAGE = {"two_stage": False, "decoder_order": "self_cross", **BOX}
MODELS = {
    "dino": DINO | NONE,
    "dino, internal": DINO | INTERNAL,
    "dino, group": DINO | NONE | GROUP,
    "dn-detr": ONE_STAGE | NONE | {"query_position": "box_content"},
    "one stage, output": ONE_STAGE | OUTPUT,
    "one stage, hybrid": ONE_STAGE | INTERNAL | HYBRID,
    "ms-detr": INTERNAL,
    "ms-detr, output": OUTPUT | {"decoder_order": "self_cross"},
    "ms-detr, mixed": INTERNAL | {"mixed_selection": True, "look_forward_twice": True},
    "ms-detr, hybrid": INTERNAL | HYBRID,
    "ms-detr, group": INTERNAL | GROUP,
    "ms-detr, group, mixed": INTERNAL | GROUP | {"mixed_selection": True},
}
KINDS = ("dn", "contrastive")
BRANCH = {"dn": "denoising", "contrastive": "contrastive"}


def model_config(model: str, kind: str, **changes: object) -> ModelConfig:
    return tiny_config(
        num_queries=QUERIES,
        num_decoder_layers=LAYERS,
        denoising=kind,
        **{"denoising_groups": GROUPS} | MODELS[model] | changes,
    )


def every_model(*models: str) -> pytest.MarkDecorator:
    names = list(product(models or MODELS, KINDS))
    configs = [model_config(*name) for name in names]
    return pytest.mark.parametrize("config", configs, ids=[", ".join(name) for name in names])


def random_detector(config: ModelConfig) -> Detector:
    detector = Detector(config).double()
    randomize(detector)
    return detector


def without_denoising(detector: Detector) -> Detector:
    """A detector with the same weights and no denoising queries."""
    alone = Detector(replace(detector.config, denoising="none")).double()
    state = {
        name: x for name, x in detector.state_dict().items() if not name.startswith("denoising.")
    }
    name = "query_selection.query_embed.weight"
    if getattr(detector.query_selection, "has_indicator", False):
        state[name] = torch.cat((state[name], state[name].new_zeros(len(state[name]), 1)), dim=1)
    alone.load_state_dict(state)
    alone.train(detector.training)
    return alone


def random_targets(*counts: int, slots: int = SLOTS, dtype: torch.dtype = torch.float64) -> Targets:
    counts = counts or (2, SLOTS)
    return padded_targets(
        [torch.randint(NUM_CLASSES, (count,)) for count in counts],
        [random_boxes(count, dtype=dtype) for count in counts],
        slots=slots,
    )


def drawn(detector: Detector, targets: Targets) -> Tensor:
    noise = detector.draw_noise(targets, None)
    assert noise is not None
    return noise.double()


def names_and_tensors(output: DetectorOutput) -> dict[str, Tensor]:
    return {
        f"{branch}.{field}": x
        for branch, value in output.branches.items()
        for field, x in value.predictions._asdict().items()
    }


def assert_same(output: DetectorOutput, expected: DetectorOutput) -> None:
    """Of all branches of `expected`."""
    found = names_and_tensors(output)
    for name, truth in names_and_tensors(expected).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-11)


class TestOtherQueries:
    @every_model()
    def test_get_the_predictions_and_gradients_of_a_model_without_denoising(self, config):
        detector, images, targets = random_detector(config), image_batch(), random_targets()
        output = detector(images, targets)
        alone = without_denoising(detector)
        expected = alone(images)
        assert output.branches.keys() == expected.branches.keys() | {BRANCH[config.denoising]}
        for name, branch in expected.branches.items():
            assert output.branches[name].num_groups == branch.num_groups
        assert_same(output, expected)

        def gradients(model: Detector, output: DetectorOutput) -> dict[str, Tensor | None]:
            tensors = names_and_tensors(output)
            loss = sum((weights[name] * tensors[name]).sum() for name in weights)
            parameters = dict(model.named_parameters())
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            return dict(zip(parameters, found, strict=True))

        weights = {name: torch.randn_like(x) for name, x in names_and_tensors(expected).items()}
        found, truth = gradients(detector, output), gradients(alone, expected)
        assert found.keys() == truth.keys() | {"denoising.label_embed.weight"}
        labels = found["denoising.label_embed.weight"]
        assert labels is None or not labels.any()
        for name, gradient in truth.items():
            result = found[name]
            assert (result is None) == (gradient is None), name
            if result is None:
                continue
            if result.shape != gradient.shape:  # the indicator is not learned
                gradient = gradient[:, :-1]
            torch.testing.assert_close(result, gradient, rtol=1e-8, atol=1e-9, msg=name)

    @every_model()
    def test_do_not_depend_on_noise_or_targets(self, config):
        detector, images = random_detector(config), image_batch()
        with torch.no_grad():
            first, second, third = (
                detector(images, random_targets(*counts, slots=slots))
                for counts, slots in (((2, 3), 3), ((0, 1), 3), ((0, 0), 5))
            )
        for output in (second, third):
            del output.branches[BRANCH[config.denoising]]
            assert_same(first, output)

    @every_model()
    def test_in_evaluation_denoising_leaves_no_trace(self, config):
        detector, images = random_detector(config).eval(), image_batch()
        with torch.no_grad():
            detector.denoising.label_embed.weight.fill_(float("nan"))
            output, expected = detector(images), without_denoising(detector)(images)
        assert output.branches.keys() == {"one_to_one"}
        for mine, truth in zip(output.one_to_one, expected.one_to_one, strict=True):
            assert torch.equal(mine, truth)


def of_copies(x: Tensor, kind: str) -> Tensor:
    """[..., G, S, T, ...] of the queries [N, B, Q, ...] of the denoising set."""
    return x.unflatten(2, (GROUPS, 2 if kind == "contrastive" else 1, SLOTS))


def changed(before: DetectorOutput, after: DetectorOutput, kind: str) -> Tensor:
    """[B, G, S, T] bool, whether the predictions of a copy differ after the first layer."""
    name = BRANCH[kind]
    logits = (of_copies(x.branches[name].predictions.logits[-1:], kind) for x in (before, after))
    one, other = logits
    difference = (one - other).abs().amax(-1)[0]
    assert ((difference > 1e-6) | (difference < 1e-11)).all()
    return difference > 1e-6


class TestAttention:
    @every_model("dino", "dn-detr", "ms-detr", "ms-detr, group")
    def test_a_group_sees_itself_and_no_other(self, config):
        """Each copy has one different number: only its group changes, and there all of it."""
        detector, images = random_detector(config), image_batch()
        targets = random_targets(SLOTS, SLOTS)
        noise, kind = drawn(detector, targets), config.denoising
        sides = 2 if kind == "contrastive" else 1
        with torch.no_grad():
            before = detector(images, targets, noise)
            for group, side in product(range(GROUPS), range(sides)):
                other = noise.clone()
                copy = other.unflatten(1, (GROUPS, sides, SLOTS))[:, group, side, 1, 2:6]
                copy.copy_(1.0 - copy)
                difference = changed(before, detector(images, targets, other), kind)
                assert difference[:, group].all()
                difference[:, group] = False
                assert not difference.any()

    @every_model("dino", "dino, group", "dn-detr", "one stage, hybrid", "ms-detr, group, mixed")
    def test_denoising_queries_see_those_that_infer_and_no_others(self, config):
        detector, images, targets = random_detector(config), image_batch(), random_targets()
        noise, embedding = drawn(detector, targets), detector.query_selection.query_embed.weight
        with torch.no_grad():
            before = detector(images, targets, noise)
            rows = {0: True, QUERIES - 1: True}
            if len(embedding) > QUERIES:
                rows |= {QUERIES: False, len(embedding) - 1: False}
            for row, visible in rows.items():
                embedding[row] += 1.0
                after = detector(images, targets, noise)
                embedding[row] -= 1.0
                assert (changed(before, after, config.denoising) == visible).all()

    @every_model("dino", "dn-detr", "ms-detr")
    def test_empty_slots_are_seen(self, config):
        """Attention does not know them: the published code has no mask for them, either."""
        detector, images = random_detector(config), image_batch()
        targets = random_targets(SLOTS, SLOTS)
        noise = drawn(detector, targets)
        fewer = targets._replace(count=targets.count - 1)
        with torch.no_grad():
            before, after = (detector(images, x, noise) for x in (targets, fewer))
            assert changed(before, after, config.denoising).all()
            # What they hold does not matter.
            garbage = fewer._replace(
                labels=torch.where(fewer.mask, fewer.labels, 7),
                boxes=torch.where(fewer.mask[..., None], fewer.boxes, float("nan")),
            )
            again = detector(images, garbage, noise)
        assert_same(again, after)


def module(kind: str, **changes: object) -> DenoisingQueries:
    return DenoisingQueries(model_config("dino", kind, **changes), NUM_CLASSES)


@pytest.mark.parametrize("kind", KINDS)
class TestSet:
    def test_groups_follow_from_the_number_of_slots(self, kind):
        queries = module(kind, denoising_groups=None, denoising_queries=100)
        sides = 2 if kind == "contrastive" else 1
        for slots, groups in ((1, 100), (3, 33), (50, 2), (51, 1), (100, 1), (101, 1), (1024, 1)):
            query_set = queries.query_set(slots)
            assert (query_set.num_groups, query_set.group_size) == (groups, sides * slots)
            assert query_set.branch == BRANCH[kind]
            assert query_set.sees_primary
        fixed = module(kind, denoising_groups=7).query_set(51)
        assert (fixed.num_groups, fixed.num_queries) == (7, 7 * sides * 51)

    def test_there_must_be_a_slot(self, kind):
        with pytest.raises(ValueError, match="at least one slot"):
            module(kind).query_set(0)

    def test_empty_slots_hold_nothing_and_have_no_gradient(self, kind):
        queries = module(kind, denoising_label_noise=1.0)
        targets = random_targets(2, 0, dtype=torch.float32)
        content, reference, query_set = queries(targets, queries.draw(targets))
        assert content.shape == (2, query_set.num_queries, 32)
        empty = ~targets.mask[:, None].expand(-1, query_set.num_queries // SLOTS, -1).flatten(1)
        assert not content[empty].any()
        assert (reference[empty] == 0.5).all()
        assert (reference[~empty] != 0.5).any()
        (gradient,) = torch.autograd.grad(content[empty].sum(), queries.label_embed.weight)
        assert not gradient.any()

    def test_content_is_the_embedding_of_the_label(self, kind):
        """With `dn`, and a last channel of 1."""
        queries = module(kind, denoising_label_noise=0.0)
        targets = random_targets(SLOTS, SLOTS, dtype=torch.float32)
        content, _, query_set = queries(targets, queries.draw(targets))
        expected = queries.label_embed(targets.labels)
        if kind == "dn":
            expected = torch.cat((expected, torch.ones(2, SLOTS, 1)), dim=-1)
        assert expected.shape[-1] == 32
        copies = query_set.num_queries // SLOTS
        assert torch.equal(content, expected.repeat(1, copies, 1))

    @pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
    def test_labels_are_replaced_as_often_as_stated(self, kind, noise):
        queries = module(kind, denoising_label_noise=noise, denoising_groups=500)
        targets = padded_targets([torch.ones(10).long()] * 2, [torch.rand(10, 4)] * 2, slots=10)
        draws = queries.noise(queries.draw(targets, torch.Generator().manual_seed(0)), 10)
        labels = queries.noised_labels(targets.labels, draws)
        # The new label is the old one in a third of the cases.
        share = labels.flatten().bincount(minlength=NUM_CLASSES) / labels.numel()
        expected = torch.tensor([noise / 3, 1.0 - 2 * noise / 3, noise / 3])
        torch.testing.assert_close(share, expected, rtol=0.0, atol=0.02)

    def test_draws_are_a_function_of_the_generator(self, kind):
        queries, targets = module(kind), random_targets()
        first, again, other = (
            queries.draw(targets, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        assert torch.equal(first, again)
        assert not torch.isclose(first, other).all()
        assert (first >= 0).all()
        assert (first < 1).all()
        fields = queries.noise(first, SLOTS)
        sides = 2 if kind == "contrastive" else 1
        assert fields.label.shape == fields.label_uniform.shape == (2, GROUPS, sides, SLOTS)
        assert fields.box.shape == fields.sign.shape == (2, GROUPS, sides, SLOTS, 4)
        for copies in (fields.label_uniform, fields.box[..., 0], fields.box[..., 3]):
            assert len(copies.unique()) == copies.numel(), "each copy has its own numbers"

    def test_targets_out_of_range_do_not_raise(self, kind):
        """An index beyond an embedding would end the process on a GPU."""
        queries, targets = module(kind), random_targets(SLOTS, SLOTS, dtype=torch.float32)
        labels = torch.tensor([[99, NUM_CLASSES, -1]]).expand(2, -1)
        boxes = targets.boxes * 3.0 - 1.0
        for uniform in (queries.draw(targets), torch.ones_like(queries.draw(targets))):
            result = queries(targets._replace(labels=labels, boxes=boxes), uniform)
            assert result.content.isfinite().all()
            assert ((result.reference > 0.0) & (result.reference < 1.0)).all()
            assert (queries.noise(uniform, SLOTS).label < NUM_CLASSES).all()

    def test_rows_of_the_label_embedding(self, kind):
        assert module(kind).label_embed.num_embeddings == NUM_CLASSES + 1
        assert module(kind, denoising_label_rows=NUM_CLASSES).label_embed.num_embeddings == 3
        with pytest.raises(ValueError, match=r"denoising_label_rows \(2\) is below .* \(3\)"):
            module(kind, denoising_label_rows=2)

    def test_logits_of_boxes_are_bounded(self, kind):
        queries = module(kind, denoising_box_noise=0.0, logit_eps=0.01)
        box = torch.tensor([[0.5, 0.5, 1.0, 0.0]])
        targets = padded_targets([torch.zeros(1).long()], [box], slots=1)
        reference = queries(targets, queries.draw(targets)).reference
        expected = torch.tensor([0.5, 0.5, 1 / 1.01, 0.01 / 1.01])
        torch.testing.assert_close(reference, expected.expand_as(reference))


def noised_boxes(kind: str, boxes: Tensor, noise: float) -> Tensor:
    """[G, S, 4], many noised copies of one box, without bounds at those of the image."""
    queries = module(kind, denoising_box_noise=noise, denoising_groups=4000)
    targets = padded_targets([torch.zeros(1).long()], [boxes[None]], slots=1)
    draws = queries.noise(queries.draw(targets, torch.Generator().manual_seed(0)), 1)
    return queries.noised_boxes(targets.boxes, draws)[0, :, :, 0]


class TestBoxes:
    BOX = torch.tensor([0.5, 0.5, 0.2, 0.3])

    @pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
    def test_dn_moves_the_centre_by_half_the_size_and_changes_the_size_by_all(self, noise):
        boxes = noised_boxes("dn", self.BOX, noise)[:, 0]
        reach = noise * torch.tensor([0.1, 0.15, 0.2, 0.3])
        shift = boxes - self.BOX
        assert (shift.abs() <= reach + 1e-6).all()
        if noise:
            for extreme in (shift.amax(0), -shift.amin(0)):
                assert (extreme > 0.99 * reach).all()
            assert (shift.mean(0).abs() < 0.05 * reach).all()

    @pytest.mark.parametrize("noise", [0.4, 1.0])
    def test_contrastive_moves_the_sides_and_those_of_negatives_further(self, noise):
        boxes = cxcywh_to_xyxy(noised_boxes("contrastive", self.BOX, noise))
        half = noise * torch.tensor([0.1, 0.15, 0.1, 0.15])
        shift = (boxes - cxcywh_to_xyxy(self.BOX)) / half
        positive, negative = shift.abs().unbind(1)
        assert (positive <= 1.0 + 1e-5).all()
        assert ((negative >= 1.0 - 1e-5) & (negative <= 2.0 + 1e-5)).all()
        for sizes, low in ((positive, 0.0), (negative, 1.0)):
            assert (sizes.amin(0) < low + 0.01).all()
            assert (sizes.amax(0) > low + 0.99).all()
        # Both directions, equally often, and each side by itself.
        share = (shift > 0).double().mean((0, 1))
        assert ((share > 0.47) & (share < 0.53)).all()
        assert (shift[:, 0].T.corrcoef() - torch.eye(4)).abs().max() < 0.06

    def test_negatives_overlap_the_target_less(self):
        boxes = noised_boxes("contrastive", self.BOX, 0.4)
        iou = box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(self.BOX))
        assert iou[:, 0].mean() > iou[:, 1].mean() + 0.2

    @pytest.mark.parametrize("kind", KINDS)
    def test_boxes_stay_on_the_image(self, kind):
        boxes = noised_boxes(kind, torch.tensor([0.05, 0.95, 0.1, 0.1]), 1.0)
        corners = boxes if kind == "dn" else cxcywh_to_xyxy(boxes)
        assert corners.min() >= -1e-6
        assert corners.max() <= 1.0 + 1e-6


class TestTraining:
    """The detector under the criterion."""

    def step(self, config: ModelConfig, targets: Targets) -> tuple[Detector, LossOutput]:
        detector = random_detector(config)
        output = detector(image_batch(), targets)
        losses = Criterion(AssignmentConfig(), LossConfig())(output, targets)
        losses.total.backward()
        return detector, losses

    @every_model()
    @pytest.mark.parametrize("counts", [(2, 3), (0, 3), (0, 0)])
    def test_every_parameter_has_a_gradient_in_every_step(self, config, counts):
        """DDP waits for all of them, also where a batch has no target."""
        detector, losses = self.step(config, random_targets(*counts))
        assert losses.total.isfinite()
        for name, parameter in detector.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        gradient = detector.denoising.label_embed.weight.grad
        kind = BRANCH[config.denoising]
        if sum(counts):
            assert gradient.any()
            assert all(losses.terms[f"{kind}/{term}"].all() for term in ("class", "bbox", "giou"))
        else:
            assert not gradient.any()
            assert not any(losses.terms[f"{kind}/{term}"].any() for term in ("class", "bbox"))

    @every_model("dino", "dn-detr")
    @pytest.mark.parametrize(("count", "slots"), [(1, 1), (5, 6)])
    def test_target_slots_of_the_loader(self, config, count, slots):
        """One slot, and more targets than the largest bucket: a multiple of it."""
        samples = [
            Sample(
                pixels=torch.zeros(3, 64, 64, dtype=torch.uint8),
                labels=torch.randint(NUM_CLASSES, (number,)),
                boxes=random_boxes(number),
                image_id=0,
                original_size=(64, 64),
            )
            for number in (count, 1)
        ]
        targets = Collate(1, (1, 2))(samples).targets
        assert targets.labels.shape[1] == slots
        detector, losses = self.step(config, targets)
        assert losses.total.isfinite()
        query_set = detector.denoising.query_set(slots)
        assert query_set.num_groups == GROUPS
        assert detector.denoising.label_embed.weight.grad.any()

    @every_model("dino", "dn-detr")
    def test_targets_are_needed_in_training_only(self, config):
        detector, images = random_detector(config), image_batch()
        with pytest.raises(ValueError, match="needs the targets in training"):
            detector(images)
        detector.eval()
        assert detector(images).one_to_one.boxes.shape == (LAYERS, 2, QUERIES, 4)

    def test_without_denoising_targets_and_noise_do_not_matter(self):
        detector = Detector(tiny_config())
        assert detector.draw_noise(random_targets(), None) is None
        images = image_batch()
        expected = detector(images).one_to_one
        assert all(map(torch.equal, detector(images, random_targets()).one_to_one, expected))

    @every_model("dino", "dn-detr")
    def test_by_default_noise_is_drawn_anew(self, config):
        detector, images, targets = random_detector(config), image_batch(), random_targets()
        branch = BRANCH[config.denoising]

        def run(noise: Tensor | None) -> Predictions:
            return detector(images, targets, noise).branches[branch].predictions

        with torch.no_grad():
            noise = drawn(detector, targets)
            assert torch.equal(run(noise).boxes, run(noise).boxes)
            assert not torch.isclose(run(None).boxes, run(None).boxes).all()
