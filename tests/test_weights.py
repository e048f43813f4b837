"""A weights file is complete, readable by all users, and written atomically."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from msdetr.config import DataConfig, RunConfig
from msdetr.presets import PRESETS
from msdetr.weights import load_weights, save_weights

LABEL_MAP = {"category_ids": [1, 7], "labels": [0, 1], "names": ["cat", "Zähne"]}


@pytest.fixture
def state_dict():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 6, generator=generator)
    return {
        "level_embed": matrix,
        "view": matrix[:, 1:3],
        "transposed": matrix.T,
        "same": matrix,
        "scalar": torch.tensor(3.0),
        "half": matrix.to(torch.bfloat16),
        "count": torch.arange(3),
    }


@pytest.mark.parametrize("label_map", [LABEL_MAP, None])
@pytest.mark.parametrize("preset", ["tiny", "ms-detr-pp-r50-900"])
def test_everything_comes_back(tmp_path, state_dict, preset, label_map):
    config = replace(
        PRESETS[preset].config, data=DataConfig(root=Path("some/where")), weights=Path("x.pth")
    )
    path = tmp_path / "weights.safetensors"
    save_weights(path, state_dict, config, label_map)
    loaded = load_weights(path)
    assert loaded.config == config
    assert loaded.label_map == label_map
    assert loaded.state_dict.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        torch.testing.assert_close(loaded.state_dict[name], tensor, rtol=0, atol=0)


def test_parameters_that_require_gradients_are_saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": torch.nn.Parameter(torch.ones(2))}, RunConfig())
    assert not load_weights(path).state_dict["w"].requires_grad


def test_whoever_may_read_the_folder_may_read_the_file(tmp_path, state_dict):
    path, other = tmp_path / "weights.safetensors", tmp_path / "other"
    save_weights(path, state_dict, RunConfig())
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_metadata_is_plain_json(tmp_path, state_dict):
    path = tmp_path / "weights.safetensors"
    save_weights(path, state_dict, RunConfig(), LABEL_MAP)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "msdetr"
    assert json.loads(metadata["config"])["model"]["num_queries"] == 300
    assert json.loads(metadata["label_map"]) == LABEL_MAP


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, state_dict, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(path, state_dict, RunConfig())
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, {"level_embed": torch.zeros(1)}, RunConfig())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    named_at_sync = []
    monkeypatch.setattr("os.fsync", lambda descriptor: named_at_sync.append(path.exists()))
    save_weights(path, {"w": torch.zeros(1)}, RunConfig())
    assert named_at_sync == [False, True]  # the content, then the name in the folder


@pytest.mark.parametrize("content", [b"", b"hello, not tensors", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a readable safetensors"):
        load_weights(path)


def test_a_truncated_file_is_refused(tmp_path, state_dict):
    path = tmp_path / "weights.safetensors"
    save_weights(path, state_dict, RunConfig())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_weights(path)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, "without the configuration"),
        ({"format": "pt"}, "without the configuration"),
        ({"format": "msdetr", "config": "{"}, "cannot be read"),
        ({"format": "msdetr", "config": "[]"}, "cannot be read"),
        ({"format": "msdetr", "config": '{"colour": 1}'}, "no field colour"),
        ({"format": "msdetr", "config": '{"model": {"num_levels": 9}}'}, "num_levels"),
        ({"format": "msdetr", "config": "{}", "label_map": "{"}, "cannot be read"),
    ],
)
def test_files_of_others_are_refused(tmp_path, metadata, complaint):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=complaint):
        load_weights(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(tmp_path / "nowhere.safetensors")
