from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from engine.helpers import RELATIVES, TINY_MODEL, tiny_config

from msdetr.annotations.labels import LabelMap
from msdetr.config import ModelConfig, RunConfig, config_to_dict
from msdetr.engine.checkpoint import Progress, save_checkpoint
from msdetr.engine.distributed import Worker
from msdetr.engine.pretrained import LoadedDetector, load_detector, start_from_weights
from msdetr.engine.run import build_trainer
from msdetr.model.checkpoint_adapter import ours_to_published
from msdetr.model.detector import Detector, build_detector
from msdetr.weights import save_weights

LABELS = LabelMap((5, 6, 7, 9), (0, 1, 2, 3), ("a", "b", "c", "d"), 4)
CONFIG = RunConfig(model=TINY_MODEL)


def write(model: Detector, folder: Path, kind: str) -> Path:
    state_dict = model.state_dict()
    config = dataclasses.replace(CONFIG, model=model.config)
    if kind == "weights":
        path = folder / "weights.safetensors"
        save_weights(path, state_dict, config, LABELS.to_dict())
        return path
    progress = Progress(
        step=1,
        epoch=0,
        steps_per_epoch=2,
        config=config_to_dict(config),
        label_map=LABELS.to_dict(),
        world_size=1,
    )
    tensors = {f"model.{name}": tensor for name, tensor in state_dict.items()}
    if kind == "ema":
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in state_dict.items()}
    worker = Worker(device=torch.device("cpu"))
    return save_checkpoint(tensors, progress, folder, worker, keep=1)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("weights", TINY_MODEL),
        ("checkpoint", TINY_MODEL),
        ("ema", TINY_MODEL),
        ("weights", RELATIVES["ms-hybrid"]),
        ("ema", RELATIVES["ms-group"]),
        ("weights", RELATIVES["dino"]),
        ("weights", RELATIVES["dn-one-stage"]),
        ("ema", RELATIVES["deta"]),
    ],
    ids=[
        "weights",
        "checkpoint",
        "ema",
        "weights of ms-hybrid",
        "ema of ms-group",
        "weights of dino",
        "weights of dn",
        "ema of deta",
    ],
)
def test_a_detector_comes_back_from_its_files(
    tmp_path: Path, kind: str, config: ModelConfig
) -> None:
    model = build_detector(config)
    loaded = load_detector(write(model, tmp_path, kind))
    assert loaded.config == RunConfig(model=config)
    assert loaded.label_map == loaded.known_label_map == LABELS
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def published_file(folder: Path) -> tuple[Path, Detector]:
    """A checkpoint of a small model in the format of the published code."""
    config = ModelConfig(
        backbone_weights="none",
        num_classes=91,
        hidden_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=2,
        feedforward_dim=32,
        num_queries=8,
    )
    model = build_detector(config)
    args = argparse.Namespace(
        with_box_refine=True,
        two_stage=True,
        use_ms_detr=True,
        use_aux_ffn=True,
        hidden_dim=16,
        nheads=2,
        enc_layers=1,
        dec_layers=2,
        dim_feedforward=32,
        num_queries=8,
    )
    state_dict = ours_to_published(model.state_dict(), config)
    torch.save({"model": state_dict, "args": args, "epoch": 11}, folder / "published.pth")
    return folder / "published.pth", model


def test_published_checkpoint(tmp_path: Path) -> None:
    path, model = published_file(tmp_path)
    loaded = load_detector(path)
    assert loaded.label_map is None
    assert loaded.known_label_map.name_of(18) == "dog"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    # It can also be the start of a run.
    other = build_detector(model.config)
    config = RunConfig(model=model.config)
    assert start_from_weights(other, path, config) == []
    assert torch.equal(other.level_embed, model.level_embed)


def test_classes_without_names() -> None:
    model = build_detector(TINY_MODEL)
    detector = LoadedDetector(model=model, config=CONFIG, label_map=None)
    assert detector.known_label_map.name_of(3) == "class 3"
    assert detector.known_label_map.num_classes == 4


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt"):
        load_detector(tmp_path / "text.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is not a checkpoint"):
        load_detector(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"there is no weights file .*absent"):
        load_detector(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("model_config", "group_heads"),
    [(TINY_MODEL, 0), (RELATIVES["group"], 2), (RELATIVES["ms-dn"], 0)],
    ids=["ms-detr", "group", "ms-dn"],
)
def test_other_classes_start_fresh(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model_config: ModelConfig,
    group_heads: int,
) -> None:
    source = build_detector(model_config)
    path = write(source, tmp_path, "weights")
    config = dataclasses.replace(model_config, num_classes=7)
    model = build_detector(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        fresh = start_from_weights(model, path, RunConfig(model=config))
    num_heads = TINY_MODEL.num_decoder_layers + 1
    heads = [f"class_embed.{i}" for i in range(num_heads)]
    heads += [f"group_class_embed.{i}" for i in range(group_heads)]
    names = {f"heads.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    if model_config.denoising != "none":
        names.add("denoising.label_embed.weight")
    assert set(fresh) == names
    assert len(fresh) == len(set(fresh))
    assert "has 4 classes, this run 7" in caplog.text
    assert all(name in caplog.text for name in fresh)
    for name, tensor in model.state_dict().items():
        expected = before[name] if name in fresh else source.state_dict()[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("change", [{"hidden_dim": 32}, {"num_decoder_layers": 3}])
def test_everything_else_must_fit(tmp_path: Path, change: dict[str, int]) -> None:
    path = write(build_detector(TINY_MODEL), tmp_path, "weights")
    config = dataclasses.replace(TINY_MODEL, num_classes=7, **change)
    with pytest.raises(ValueError, match="do not fit the model"):
        start_from_weights(build_detector(config), path, RunConfig(model=config))


@pytest.mark.parametrize("denoising", ["dn", "contrastive"])
@pytest.mark.parametrize("in_the_weights", [False, True])
def test_the_message_names_the_field_that_does_not_fit(
    tmp_path: Path, denoising: str, in_the_weights: bool
) -> None:
    with_denoising = dataclasses.replace(TINY_MODEL, denoising=denoising)
    source, target = TINY_MODEL, with_denoising
    if in_the_weights:
        source, target = target, source
    path = write(build_detector(source), tmp_path, "weights")
    message = f"model.denoising '{target.denoising}' .weights: '{source.denoising}'.$"
    with pytest.raises(ValueError, match=message) as raised:
        start_from_weights(build_detector(target), path, RunConfig(model=target))
    assert "denoising.label_embed.weight" in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_run_starts_from_weights(shapes: Path, tmp_path: Path) -> None:
    source = build_detector(TINY_MODEL)
    path = write(source, tmp_path, "weights")
    worker = Worker(device=torch.device("cpu"))
    trainer = build_trainer(tiny_config(shapes, tmp_path / "run", weights=path), worker)
    assert trainer.step == 0
    assert trainer.config.model.num_classes == 3  # of the data, not of the weights
    assert torch.equal(trainer.model.level_embed, source.level_embed)
