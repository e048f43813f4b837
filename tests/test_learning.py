"""Every kind of supervision learns the generated data set of `msdetr demo`."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from engine.helpers import tiny_options

from msdetr.cli import train
from msdetr.config import ModelConfig, RunConfig
from msdetr.data.synthetic import write_synthetic_dataset
from msdetr.presets import PRESETS

NAMES = (
    "h-deformable-detr-r50",
    "group-deformable-detr-r50",
    "ms-h-deformable-detr-r50",
    "ms-group-deformable-detr-r50",
    "dn-deformable-detr-r50",
    "dino-r50-4scale",
    "deta-r50",
    "ms-dn-deformable-detr-r50",
    "ms-cdn-deformable-detr-r50",
)
SIZES = {
    field.name: getattr(PRESETS["tiny"].config.model, field.name)
    for field in dataclasses.fields(ModelConfig)
    if re.match("num_(?!classes)|backbone|hidden_dim|feedforward_dim", field.name)
}
"""Fields of the model that are those of `tiny`."""


def tiny_form(name: str, data: Path, output: Path) -> RunConfig:
    """The model and supervision of a preset in the sizes of `tiny`, with few extra queries."""
    preset, tiny = PRESETS[name].config, PRESETS["tiny"].config
    sizes = SIZES | {"num_hybrid_queries": 100, "num_groups": 3}
    return replace(
        tiny,
        model=replace(preset.model, **sizes),
        assignment=preset.assignment,
        loss=preset.loss,
        data=replace(tiny.data, root=data),
        eval=replace(tiny.eval, nms_iou_threshold=preset.eval.nms_iou_threshold),
        output=output,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learning") / "data"
    write_synthetic_dataset(root, num_train=2000, num_val=240, size=128)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learns_shapes(name: str, data: Path, tmp_path: Path) -> None:
    config = tiny_form(name, data, tmp_path / "run")
    assert train.main(tiny_options(config)) == 0
    rows = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    *_, last = (row for row in rows if row["kind"] == "eval")
    assert last["AP"] > 0.4
