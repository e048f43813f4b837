"""Whole models against the published code, in float64: outputs, losses, gradients, one step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from msdetr.config import RunConfig
from msdetr.engine.optimizer.groups import build_optimizer
from msdetr.evaluation.postprocess import postprocess
from msdetr.model.checkpoint_adapter import load_state, published_name, published_to_ours
from msdetr.model.detector import Detector
from msdetr.published import config_from_published_args
from msdetr.structures import DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion, LossOutput
from parity.golden import (
    MODEL_TOLERANCE,
    GoldenCase,
    assert_relative,
    published_pairs,
    published_values,
)

ONE_TO_MANY = ("one_to_many", "hybrid")
"""Branches that the cases store as `o2m.`; a model has one of them at most."""
MODELS = pytest.mark.golden(
    "ms_detr", "ddetr", "impl_a", "h_detr", "dn_model", "cdn_model", "deta_model"
)
LOGGED = ("class_error", "tgt_class_error", "cardinality_error", "loss_xy", "loss_hw")
"""Names that begin like this are no losses."""


class Step(NamedTuple):
    """A training step of one case, before the optimizer."""

    config: RunConfig
    model: Detector
    targets: Targets
    priority: dict[str, Tensor]
    """Of the cases whose matchers draw. The others keep all positives."""
    output: DetectorOutput
    losses: LossOutput
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """Steps by case name, each computed once for all tests of the module."""
    return {}


@pytest.fixture
def step(case: GoldenCase, steps: dict[str, Step], impl: str) -> Step:
    if impl == "triton":
        pytest.skip("the model chooses its implementation by device")
    if case.name not in steps:
        steps.clear()  # A model in float64 is large: keep one.
        steps[case.name] = _run(case)
    return steps[case.name]


def _run(case: GoldenCase) -> Step:
    config = config_from_published_args(
        case.info["flags"],
        implementation=case.info["implementation"],
        overrides=case.info["overrides"],
    )
    config = replace(config, model=replace(config.model, dropout=0.0))
    model = Detector(config.model).double()
    load_state(model, published_to_ours(case.published_state_dict(), config.model))
    model.train()
    # The number of denoising queries follows from that of the slots.
    targets = case.targets(empty_slots=0 if model.denoising else 2)
    output = model(case.images(), targets, _noise(case, model, targets))
    names = {"one_to_one": "priority", "encoder": "enc.priority"}
    priority = {branch: case.tensor(name) for branch, name in names.items() if name in case.arrays}
    criterion = Criterion(config.assignment, config.loss)
    losses = criterion(output, targets, priority=priority or None)
    losses.total.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Step(config, model, targets, priority, output, losses, gradients)


def _noise(case: GoldenCase, model: Detector, targets: Targets) -> Tensor | None:
    if model.denoising is None:
        return None
    query_set = model.denoising.query_set(targets.labels.shape[1])
    return case.noise(targets, query_set, model.denoising.num_classes)


@MODELS
def test_outputs(case: GoldenCase, step: Step) -> None:
    output = step.output.branches
    branches = [("", output["one_to_one"].predictions)]
    branches += [("o2m.", output[name].predictions) for name in ONE_TO_MANY if name in output]
    assert ("o2m.pred_logits" in case.arrays) == (len(branches) == 2)
    for prefix, predictions in branches:
        layers = len(predictions.logits)
        for layer in range(layers):
            name = prefix if layer == layers - 1 else f"{prefix}aux{layer}."
            for field in Predictions._fields:
                result = getattr(predictions, field)[layer]
                assert_relative(result, case.tensor(f"{name}pred_{field}"), f"{name}{field}")
    assert ("enc.pred_boxes" in case.arrays) == ("encoder" in output)
    if "encoder" in output:
        (logits, boxes), anchors, _ = output["encoder"]
        assert_relative(boxes[0], case.tensor("enc.pred_boxes"), "encoder boxes")
        if "enc.pred_logits" in case.arrays:
            assert_relative(logits[0], case.tensor("enc.pred_logits"), "encoder logits")
        else:
            scores = case.tensor("enc.proposal_logit")
            assert_relative(logits[0, ..., 0], scores, "encoder scores")
        if "enc.anchors" in case.arrays:
            assert_relative(anchors.double(), case.tensor("enc.anchors").double(), "anchors")


@pytest.mark.golden("dn_model", "cdn_model")
def test_denoising_set(case: GoldenCase, step: Step) -> None:
    """DN-DETR's cases hold all layers in one array, DINO's one array per layer."""
    branches = step.output.branches
    branch = branches["denoising" if "denoising" in branches else "contrastive"]
    for field, result in branch.predictions._asdict().items():
        layers = [f"dn.aux{layer}." for layer in range(len(result) - 1)] + ["dn."]
        names = [f"{layer}pred_{field}" for layer in layers]
        if names[0] in case.arrays:
            expected = torch.stack([case.tensor(name) for name in names])
        else:
            expected = case.tensor(names[-1])
        assert_relative(result, expected, f"denoising {field}")


@pytest.mark.golden("cdn_model")
def test_selected_proposals(case: GoldenCase, step: Step) -> None:
    selected = step.output.branches["encoder_selected"].predictions
    for field, result in selected._asdict().items():
        assert_relative(result[0], case.tensor(f"interm.pred_{field}"), f"selected {field}")


@pytest.mark.golden("deta_model")
def test_initial_boxes(case: GoldenCase, step: Step) -> None:
    boxes = step.output.branches["one_to_one"].anchors
    assert_relative(boxes, case.tensor("init_reference"), "selected boxes")


@pytest.mark.golden("dn_model", "cdn_model")
@pytest.mark.parametrize("empty_slots", [0, 2])
def test_primary_predictions_do_not_see_denoising(
    case: GoldenCase, step: Step, empty_slots: int
) -> None:
    """Neither other noise nor more target slots change them."""
    with torch.no_grad():
        output = step.model(case.images(), case.targets(empty_slots=empty_slots))
    for field in Predictions._fields:
        result = getattr(output.one_to_one, field)[-1]
        assert_relative(result, case.tensor(f"pred_{field}"), field)


@MODELS
def test_evaluation_mode(case: GoldenCase, step: Step) -> None:
    step.model.eval()
    with torch.no_grad():
        output = step.model(case.images())
    step.model.train()
    assert output.branches.keys() == {"one_to_one"}
    assert_relative(output.one_to_one.logits[-1], case.tensor("pred_logits"), "logits")
    assert_relative(output.one_to_one.boxes[-1], case.tensor("pred_boxes"), "boxes")

    detections = postprocess(
        output.one_to_one,
        torch.tensor(case.info["sizes"]),
        max_detections=step.config.eval.max_detections,
        nms_iou_threshold=step.config.eval.nms_iou_threshold,
    )
    for image in range(len(case.info["sizes"])):
        kept = len(case.arrays[f"post{image}.scores"])
        assert not detections.scores[image, kept:].any()
        for field in ("scores", "boxes"):
            result = getattr(detections, field)[image, :kept]
            assert_relative(result, case.tensor(f"post{image}.{field}"), field)
        result = detections.labels[image, :kept]
        assert torch.equal(result, case.tensor(f"post{image}.labels"))


@MODELS
def test_losses(case: GoldenCase, step: Step) -> None:
    weights = step.config.loss
    factor = weights.hybrid_bbox_weight / weights.bbox_weight  # H-DETR reports it times lambda
    result = {
        name: value * (factor if name.endswith("_one2many") else 1.0)
        for name, value in published_values(step.losses.terms).items()
    }
    expected = {
        name: value for name, value in case.info["losses"].items() if not name.startswith(LOGGED)
    }
    assert result == pytest.approx(expected, rel=MODEL_TOLERANCE)
    assert step.losses.total.item() == pytest.approx(case.info["total"], rel=MODEL_TOLERANCE)


@pytest.mark.golden("h_detr", "deta_model")
def test_pairs(case: GoldenCase, step: Step) -> None:
    criterion = Criterion(step.config.assignment, step.config.loss)
    assignments = criterion.assign(step.output, step.targets, priority=step.priority or None)
    branches = {"": "one_to_one", "o2m.": "hybrid", "enc.": "encoder"}
    for prefix, branch in branches.items():
        if f"{prefix}pairs0" not in case.arrays:
            continue
        for image in range(len(case.info["sizes"])):
            result = published_pairs(assignments[branch], -1, image)
            assert result == case.pairs(f"{prefix}pairs{image}")


@MODELS
def test_gradient_norms(case: GoldenCase, step: Step) -> None:
    model = step.config.model
    result = {
        published_name(name, model): gradient.norm().item()
        for name, gradient in step.gradients.items()
    }
    scale = max(case.grad_norms.values())
    assert result == pytest.approx(case.grad_norms, rel=MODEL_TOLERANCE, abs=1e-9 * scale)


@MODELS
def test_clipped_step(case: GoldenCase, step: Step) -> None:
    if "update_norms" not in case.info:
        pytest.skip("the case records no optimizer step")
    before = {name: value.detach().clone() for name, value in step.model.named_parameters()}
    gradients = {name: gradient.clone() for name, gradient in step.gradients.items()}
    norm = torch.nn.utils.clip_grad_norm_(
        step.model.parameters(), step.config.optimizer.clip_grad_norm
    )
    build_optimizer(step.model, step.config.optimizer).step()
    assert norm.item() == pytest.approx(case.info["clip_total_norm"], rel=MODEL_TOLERANCE)

    result = {
        published_name(name, step.config.model): (value.detach() - before[name]).norm().item()
        for name, value in step.model.named_parameters()
        if value.requires_grad
    }
    with torch.no_grad():  # Leave the step as it was for the other tests.
        for name, value in step.model.named_parameters():
            value.copy_(before[name])
            if name in gradients:
                value.grad.copy_(gradients[name])
    expected = {name: norm for name, norm in case.info["update_norms"].items() if norm is not None}
    assert result == pytest.approx(expected, rel=MODEL_TOLERANCE)
