"""The picture of `docs/design/relatives.md` shows the presets as they are."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msdetr.config import ModelConfig
from msdetr.model.detector import Detector
from msdetr.presets import PRESETS
from msdetr.structures import DetectorOutput, ImageBatch, Targets

SCRIPT = Path(__file__).parents[1] / "docs" / "images" / "relatives.py"
DRAWING = runpy.run_path(str(SCRIPT), run_name="relatives")
FAMILIES: dict[str, str] = DRAWING["FAMILIES"]


def small(model: ModelConfig) -> ModelConfig:
    """The same parts, few and narrow."""
    return replace(
        model,
        num_classes=3,
        backbone="convnet",
        backbone_weights="none",
        hidden_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=2,
        feedforward_dim=16,
        num_queries=5,
        num_hybrid_queries=7,
        num_groups=2,
    )


def trained_output(model: ModelConfig) -> DetectorOutput:
    images = ImageBatch(torch.rand(2, 3, 64, 64), torch.tensor([[64, 64]] * 2))
    targets = Targets(torch.zeros(2, 1, dtype=torch.long), torch.rand(2, 1, 4), torch.ones(2))
    output: DetectorOutput = Detector(model).train()(images, targets)
    return output


def test_the_stored_picture_is_what_the_script_draws() -> None:
    assert SCRIPT.with_suffix(".svg").read_text(encoding="utf-8") == DRAWING["picture"]()


@pytest.mark.parametrize("preset", FAMILIES)
def test_blocks_have_the_branches_of_the_output(preset: str) -> None:
    model = small(PRESETS[preset].config.model)
    blocks = list(DRAWING["blocks"](model))
    output = trained_output(model)
    assert {branch for block in blocks for branch in block.branches} == output.branches.keys()
    for block in blocks:
        if block.column in ("encoder", "before"):
            (branch,) = block.branches
            assert block.stacked == (output.branches[branch].num_groups > 1)
    inference = [block.column for block in blocks if block.infers]
    assert inference == [*(["encoder"] if model.two_stage else []), "primary"]


def test_all_families_are_drawn() -> None:
    relatives = {
        name
        for name, preset in PRESETS.items()
        if preset.config.model.extra_queries != "none" or preset.config.model.denoising != "none"
    }
    assert relatives <= FAMILIES.keys() <= PRESETS.keys()
