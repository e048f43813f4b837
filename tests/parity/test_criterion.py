"""All losses and their gradients against the published criterion, which ran in float64.

The reference is held to float64; kernels compute in float32.
"""

from __future__ import annotations

import pytest
import torch

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.structures import Branch, DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion
from parity.golden import GoldenCase, published_values


def _predictions(case: GoldenCase, prefix: str) -> Predictions:
    layers = sum(1 for name in case.arrays if name.startswith(f"{prefix}layer")) // 2
    return Predictions(
        torch.stack([case.tensor(f"{prefix}layer{i}.pred_logits") for i in range(layers)]),
        torch.stack([case.tensor(f"{prefix}layer{i}.pred_boxes") for i in range(layers)]),
    )


@pytest.mark.golden("criterion")
def test_losses_and_gradients(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    place, tolerance = {}, 1e-9
    if impl == "triton":
        place = {"device": request.getfixturevalue("kernel_device"), "dtype": torch.float32}
        tolerance = 1e-5
    encoder = Predictions(case.tensor("enc.pred_logits")[None], case.tensor("enc.pred_boxes")[None])
    one_to_one, one_to_many, encoder = (
        Predictions(*(field.to(**place) for field in predictions))
        for predictions in (_predictions(case, ""), _predictions(case, "o2m."), encoder)
    )
    leaves = {"": one_to_one, "o2m.": one_to_many, "enc.": encoder}
    anchors = case.tensor("enc.anchors").to(**place)
    targets = Targets(*(field.to(anchors.device) for field in case.targets()))
    priority = case.tensor("priority").to(anchors.device)
    for predictions in leaves.values():
        predictions.logits.requires_grad_()
        predictions.boxes.requires_grad_()

    info = case.info
    criterion = Criterion(
        AssignmentConfig(
            one_to_many_k=info["k"],
            one_to_many_threshold=info["threshold"],
            indices_merge=info["use_indices_merge"],
        ),
        LossConfig(),
        impl=impl,
    )
    output = DetectorOutput(
        {
            "one_to_one": Branch(one_to_one),
            "one_to_many": Branch(one_to_many),
            "encoder": Branch(encoder, anchors),
        }
    )
    losses = criterion(output, targets, priority={"one_to_many": priority})

    result = published_values(losses.terms)
    expected = {name: value for name, value in info["losses"].items() if name in result}
    assert len(expected) == 3 * (2 * len(one_to_one.logits) + 1)
    assert result == pytest.approx(expected, rel=tolerance)
    assert losses.total.item() == pytest.approx(info["total"], rel=tolerance)

    losses.total.backward()
    for prefix, predictions in leaves.items():
        for layer in range(len(predictions.logits)):
            name = "grad.enc." if prefix == "enc." else f"grad.{prefix}layer{layer}."
            for field in ("logits", "boxes"):
                torch.testing.assert_close(
                    getattr(predictions, field).grad[layer].float().cpu(),
                    case.tensor(f"{name}pred_{field}"),
                    rtol=max(1e-6, 10 * tolerance),
                    atol=max(1e-7, tolerance),
                )
