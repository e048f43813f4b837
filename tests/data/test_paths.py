from __future__ import annotations

from pathlib import Path

import pytest

from msdetr.config import DataConfig
from msdetr.data.paths import resolve_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}2017.json").touch()
    return tmp_path


def test_layout_of_the_coco_download(root):
    config = DataConfig(root=root)
    for split in ("train", "val"):
        expected = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
        assert resolve_split(config, split) == expected


def test_explicit_paths_take_precedence(root):
    images, annotations = root / "annotations", root / "annotations" / "instances_val2017.json"
    config = DataConfig(root=root, train_images=images)
    assert resolve_split(config, "train")[0] == images
    assert resolve_split(config, "train")[1].name == "instances_train2017.json"
    assert resolve_split(config, "val")[0] == root / "val2017"
    config = DataConfig(val_images=images, val_annotations=annotations)
    assert resolve_split(config, "val") == (images, annotations)


@pytest.mark.parametrize("config", [DataConfig(), DataConfig(train_images=Path("images"))])
def test_nothing_to_look_up_says_what_to_give(config):
    with pytest.raises(ValueError, match=r"--data\.root.*--data\.train-annotations"):
        resolve_split(config, "train")


def test_missing_paths_are_named(root):
    (root / "val2017").rmdir()
    with pytest.raises(ValueError, match=r"val2017: the folder.*--data\.val-images"):
        resolve_split(DataConfig(root=root), "val")
    (root / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(ValueError, match=r"instances_train2017\.json.*--data\.train-annotations"):
        resolve_split(DataConfig(root=root), "train")
