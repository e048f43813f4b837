"""Both stages of DETA's assignment, their losses and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.structures import Branch, DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion
from parity.golden import GoldenCase, published_pairs, published_values


@pytest.mark.golden("deta_", kind="function")
@pytest.mark.parametrize("empty_slots", [0, 2])
def test_pairs_losses_and_gradients(
    case: GoldenCase, empty_slots: int, impl: str, request: pytest.FixtureRequest
) -> None:
    place: dict[str, Any] = {}
    tolerance = 1e-9
    if impl == "triton":
        place = {"device": request.getfixturevalue("kernel_device"), "dtype": torch.float32}
        tolerance = 1e-5
    info = case.info
    prefixes = {
        "one_to_one": [f"layer{layer}." for layer in range(info["layers"])],
        "encoder": ["enc."],
    }
    anchors = {"one_to_one": "init_reference", "encoder": "anchors"}
    branches = {}
    for name, layers in prefixes.items():
        fields = (
            torch.stack([case.tensor(f"{layer}pred_{field}") for layer in layers]).to(**place)
            for field in Predictions._fields
        )
        predictions = Predictions(*(field.requires_grad_() for field in fields))
        branches[name] = Branch(predictions, case.tensor(anchors[name]).to(**place))
    output = DetectorOutput(branches)
    device = output.one_to_one.boxes.device
    targets = Targets(*(x.to(device) for x in case.targets(empty_slots=empty_slots)))
    priority = {
        "one_to_one": case.tensor("priority").to(device),
        "encoder": case.tensor("enc.priority").to(device),
    }
    criterion = Criterion(
        AssignmentConfig(decoder_match="iou", encoder_match="iou"),
        LossConfig(encoder_class_weight=1.0),
        impl=impl,
    )
    assignments = criterion.assign(output, targets, priority=priority)
    for name, prefix in (("one_to_one", ""), ("encoder", "enc.")):
        for layer in range(len(prefixes[name])):
            for image in range(len(targets.count)):
                pairs = published_pairs(assignments[name], layer, image)
                assert pairs == case.pairs(f"{prefix}pairs{image}")

    losses = criterion(output, targets, priority=priority)
    result = published_values(losses.terms)
    assert result.keys() == info["weights"].keys()
    expected = {name: info["losses"][name] for name in result}
    assert result == pytest.approx(expected, rel=tolerance)
    assert losses.total.item() == pytest.approx(info["total"], rel=tolerance)

    losses.total.backward()
    for name, layers in prefixes.items():
        for field, leaf in branches[name].predictions._asdict().items():
            for layer, prefix in enumerate(layers):
                torch.testing.assert_close(
                    leaf.grad[layer].double().cpu(),
                    case.tensor(f"grad.{prefix}pred_{field}"),
                    rtol=10 * tolerance,
                    atol=tolerance,
                )
