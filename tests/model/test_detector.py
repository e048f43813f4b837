"""The whole detector: every variant trains, evaluates to the same answer and ignores padding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from model.helpers import NUM_CLASSES, image_batch, randomize, tiny_config
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.detector import Detector, build_detector
from msdetr.structures import DetectorOutput, ImageBatch

BRANCHES = (
    {"one_to_many": "none", "one_to_many_ffn": False},
    {"one_to_many": "internal", "one_to_many_ffn": False},
    {"one_to_many": "internal", "one_to_many_ffn": True},
    {"one_to_many": "output", "one_to_many_ffn": False},
)
STAGES = (
    {"two_stage": False},
    {"two_stage": True, "mixed_selection": False},
    {"two_stage": True, "mixed_selection": True},
)
REFINEMENTS = (
    {"box_refine": False},
    {"box_refine": True, "look_forward_twice": False},
    {"box_refine": True, "look_forward_twice": True},
)


def variants() -> list[ModelConfig]:
    """All combinations of the flags. What is independent of them takes turns."""
    configs = []
    orders = ("cross_self", "self_cross")
    for index, (order, *flags) in enumerate(product(orders, BRANCHES, STAGES, REFINEMENTS)):
        changes: dict[str, object] = {"decoder_order": order}
        for flag in flags:
            changes |= flag
        # Coprime periods, so that each choice meets each flag.
        changes["num_levels"] = index % 5 + 1
        changes["position_embedding"] = ("sine", "learned")[index // 3 % 2]
        changes["hidden_dim"] = (32, 36)[index % 2]
        changes["num_decoder_layers"] = index % 7 % 3 + 1
        configs.append(tiny_config(**changes))
    return configs


def describe(config: ModelConfig) -> str:
    flags = ("one_to_many_ffn", "two_stage", "mixed_selection", "box_refine", "look_forward_twice")
    words = [config.decoder_order, config.one_to_many]
    words += [flag for flag in flags if getattr(config, flag)]
    return "-".join([*words, config.position_embedding, f"{config.num_levels}levels"])


def loss_of(output: DetectorOutput) -> Tensor:
    """A scalar that every prediction takes part in."""
    branches = output.branches.values()
    return sum(x.square().mean() for branch in branches for x in branch.predictions)


def parameters_without_gradient(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("config", variants(), ids=describe)
def test_variants(config):
    detector, images = Detector(config), image_batch()
    layers, classes = config.num_decoder_layers, config.num_classes
    output = detector(images)
    assert output.one_to_one.logits.shape == (layers, 2, 4, classes)
    assert output.one_to_one.boxes.shape == (layers, 2, 4, 4)
    expected = {"one_to_one"}
    expected |= {"one_to_many"} if config.one_to_many != "none" else set()
    expected |= {"encoder"} if config.two_stage else set()
    assert output.branches.keys() == expected

    loss_of(output).backward()
    # DistributedDataParallel waits for the gradient of every parameter.
    assert not parameters_without_gradient(detector)
    assert all(p.grad.isfinite().all() for p in detector.parameters())

    state = detector.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)

    detector.eval()
    with torch.no_grad():
        evaluated = detector(images)
    assert evaluated.branches.keys() == {"one_to_one"}
    for result, expected in zip(evaluated.one_to_one, output.one_to_one, strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["convnet", "resnet50"])
def test_a_frozen_backbone_gets_no_gradient(backbone):
    detector = Detector(tiny_config(backbone=backbone, train_backbone=False))
    loss_of(detector(image_batch((32, 64), padded=(32, 64)))).backward()
    assert not parameters_without_gradient(detector)
    assert all(parameter.grad is None for parameter in detector.backbone.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_what_lies_in_the_padding_does_not_matter(training, two_stage, size):
    detector = Detector(tiny_config(two_stage=two_stage)).train(training)
    randomize(detector)
    images = image_batch((30, 41), size, (20, 10), padded=size)
    garbage = images.pixels.clone()
    for image, (height, width) in enumerate(images.sizes.tolist()):
        garbage[image, :, height:] = 255
        garbage[image, :, :, width:] = 255
    assert not torch.equal(garbage, images.pixels)
    with torch.no_grad():
        expected, result = detector(images), detector(images._replace(pixels=garbage))
    for branch, other in zip(expected, result, strict=True):
        if isinstance(branch, tuple):
            assert all(map(torch.equal, branch, other))


def test_uint8_pixels_are_normalised_as_torchvision_does():
    detector = Detector(tiny_config()).eval()
    images = image_batch()
    normalized = torch.zeros(2, 3, 64, 64)
    for image, (height, width) in enumerate(images.sizes.tolist()):
        pixels = transforms.to_dtype(images.pixels[image], torch.float32, scale=True)
        pixels = transforms.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        normalized[image, :, :height, :width] = pixels[:, :height, :width]
    seen = []
    detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        from_uint8 = detector(images)
        from_float = detector(ImageBatch(normalized, images.sizes))
    torch.testing.assert_close(seen[0], normalized)
    assert torch.equal(seen[1], normalized), "floating point pixels are taken as they are"
    torch.testing.assert_close(
        from_uint8.one_to_one.boxes, from_float.one_to_one.boxes, rtol=1e-4, atol=1e-5
    )


def test_images_of_a_batch_are_independent():
    detector = Detector(tiny_config(num_levels=3)).eval()
    randomize(detector)
    images = image_batch()
    with torch.no_grad():
        together = detector(images).one_to_one
        for image in range(2):
            alone = detector(ImageBatch(*(field[image : image + 1] for field in images)))
            for result, expected in zip(alone.one_to_one, together, strict=True):
                torch.testing.assert_close(result[:, 0], expected[:, image], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one_to_many_ffn", [True, False])
def test_evaluation_runs_nothing_that_only_training_needs(one_to_many_ffn):
    one_to_many = "internal" if one_to_many_ffn else "output"
    detector = Detector(tiny_config(one_to_many=one_to_many, one_to_many_ffn=one_to_many_ffn))
    ran: set[str] = set()
    for name, module in detector.named_modules():
        if "one_to_many" in name:
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    detector(image_batch())
    assert ran
    ran.clear()
    detector.eval()
    detector(image_batch())
    assert not ran


def test_dropout_acts_in_training_only():
    detector, images = Detector(tiny_config(dropout=0.5)), image_batch()
    randomize(detector)
    dropped = [detector(images).one_to_one.logits for _ in range(2)]
    assert not torch.equal(*dropped)
    detector.eval()
    kept = [detector(images).one_to_one.logits for _ in range(2)]
    assert torch.equal(*kept)


def test_initial_predictions():
    """Boxes stand where their proposals do, and every class has about the prior probability."""
    detector = Detector(tiny_config())
    output = detector(image_batch())
    proposals, anchors, _ = output.branches["encoder"]
    torch.testing.assert_close(proposals.boxes[0], anchors)
    first, last = output.one_to_one.boxes
    torch.testing.assert_close(first, last)
    probability = output.one_to_one.logits.sigmoid()
    assert 0.001 < probability.median() < 0.1


def test_initial_boxes_of_one_stage_are_small():
    output = Detector(tiny_config(two_stage=False))(image_batch())
    expected = torch.full((2, 4, 2), -2.0).sigmoid()
    torch.testing.assert_close(output.one_to_one.boxes[0, ..., 2:], expected)


@pytest.mark.parametrize("two_stage", [True, False])
def test_geometry_stays_float32_under_autocast(two_stage):
    config = tiny_config(two_stage=two_stage, num_levels=3)
    detector, images = Detector(config), image_batch()
    randomize(detector)
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(images)
    assert len(output.branches) == (3 if two_stage else 2)
    for predictions, *_ in output.branches.values():
        assert predictions.boxes.dtype == torch.float32
        assert predictions.logits.isfinite().all()
    loss_of(output).backward()
    assert not parameters_without_gradient(detector)
    assert all(p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    detector = Detector(tiny_config()).to(dtype).eval()
    predictions = detector(image_batch()).one_to_one
    assert predictions.logits.dtype == dtype
    assert predictions.boxes.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (33, 65)])
def test_images_of_any_size(size):
    detector = Detector(tiny_config(num_levels=4)).eval()
    output = detector(image_batch(size, (10, 20), padded=size))
    assert output.one_to_one.boxes.isfinite().all()


def test_too_few_tokens_for_the_queries_are_refused():
    detector = Detector(tiny_config(num_queries=300))
    with pytest.raises(ValueError, match="300 queries cannot be chosen from 20 tokens"):
        detector(image_batch())


def test_one_stage_needs_no_more_tokens_than_there_are():
    detector = Detector(tiny_config(num_queries=300, two_stage=False)).eval()
    assert detector(image_batch()).one_to_one.boxes.shape == (2, 2, 300, 4)


def test_num_classes_is_needed():
    with pytest.raises(ValueError, match="num_classes is not set"):
        Detector(tiny_config(num_classes=None))


def test_state_holds_weights_only():
    state = Detector(tiny_config()).state_dict()
    assert not any("pixel" in name for name in state)
    assert state["level_embed"].shape == (2, 32)


def test_equal_seeds_build_equal_detectors():
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build_detector(tiny_config()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_number_of_classes():
    detector = Detector(tiny_config(num_classes=1)).eval()
    assert detector(image_batch()).one_to_one.logits.shape == (2, 2, 4, 1)
    assert NUM_CLASSES != 1
