from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from engine.helpers import RELATIVES, TINY_MODEL, assignment_of
from torch import Tensor

from msdetr.config import LossConfig, ModelConfig
from msdetr.model.detector import Detector, build_detector
from msdetr.structures import ImageBatch, Targets
from msdetr.supervision.criterion import Criterion

Parts = Literal["none", "encoder", "all"]

RESNET = dataclasses.replace(TINY_MODEL, backbone="resnet50", num_levels=4)
MODELS = {
    "convnet": dataclasses.replace(TINY_MODEL, num_encoder_layers=3, num_decoder_layers=3),
    "resnet50": dataclasses.replace(RESNET, num_encoder_layers=2),
    "one-stage": dataclasses.replace(
        TINY_MODEL,
        two_stage=False,
        mixed_selection=False,
        one_to_many="none",
        one_to_many_ffn=False,
    ),
    **RELATIVES,
}


def make_model(config: ModelConfig, parts: Parts) -> Detector:
    torch.manual_seed(0)
    model = build_detector(dataclasses.replace(config, dropout=0.2)).train()
    model.checkpoint_activations(parts)
    return model


def loss_of(model: Detector) -> Tensor:
    """Draws the same dropout whenever it is called."""
    generator = torch.Generator().manual_seed(1)
    images = ImageBatch(
        torch.randn(2, 3, 96, 64, generator=generator), torch.tensor([[96, 64], [70, 50]])
    )
    boxes = torch.rand(2, 8, 4, generator=generator) * 0.3 + 0.2
    targets = Targets(torch.zeros(2, 8, dtype=torch.int64), boxes, torch.tensor([3, 0]))
    torch.manual_seed(2)
    criterion = Criterion(assignment_of(model.config, positive_fraction=1.0), LossConfig())
    noise = model.draw_noise(targets, generator)
    total: Tensor = criterion(model(images, targets, noise), targets).total
    return total


@pytest.mark.parametrize("parts", ["encoder", "all"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_same_loss_and_gradients(config: ModelConfig, parts: Parts) -> None:
    kept, recomputed = (make_model(config, p) for p in ("none", parts))  # type: ignore[arg-type]
    losses = [loss_of(model) for model in (kept, recomputed)]
    assert torch.equal(*losses)
    after = []
    for loss in losses:
        torch.manual_seed(3)
        loss.backward()
        after.append(torch.rand(()))  # recomputing leaves the generator where it was
    assert torch.equal(*after)
    for (name, a), (_, b) in zip(
        kept.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def saved_bytes(config: ModelConfig, parts: Parts) -> int:
    """Memory that the forward pass keeps for the backward pass, besides the parameters."""
    model = make_model(config, parts)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def test_less_is_kept() -> None:
    def of_layers(num_encoder_layers: int) -> list[int]:
        config = dataclasses.replace(
            TINY_MODEL, num_encoder_layers=num_encoder_layers, feedforward_dim=256
        )
        return [saved_bytes(config, parts) for parts in ("none", "encoder", "all")]

    few, many = of_layers(1), of_layers(6)
    assert many[0] > 1.1 * few[0]
    # Of recomputed layers nothing is saved: their inputs are held besides.
    assert many[1] == few[1] < few[0]
    # Backbone and decoder keep most.
    assert many[2] < 0.5 * many[1]


def test_no_effect_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("checkpointed in evaluation")

    monkeypatch.setattr("msdetr.model.activation_checkpointing.checkpoint", refuse)
    model = make_model(TINY_MODEL, "all")
    images = ImageBatch(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    with torch.no_grad():
        model.eval()(images)
    with pytest.raises(AssertionError, match="checkpointed"):
        model.train()(images)


def test_compiled_layers() -> None:
    eager, compiled = (make_model(MODELS["convnet"], "all") for _ in range(2))
    for layer in (*compiled.encoder.layers, *compiled.decoder.layers):
        layer.compile(backend="eager", fullgraph=True)
    losses = [loss_of(model) for model in (eager, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses)
    for (name, a), (_, b) in zip(
        eager.named_parameters(), compiled.named_parameters(), strict=True
    ):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name
