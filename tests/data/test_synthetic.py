from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdetr.config import DataConfig
from msdetr.data import synthetic
from msdetr.data.dataset import build_dataset
from msdetr.data.inspect import inspect_splits
from msdetr.data.paths import resolve_split
from msdetr.data.synthetic import CLASS_NAMES, write_synthetic_dataset


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "shapes"
    write_synthetic_dataset(root, num_train=30, num_val=10, seed=3)
    return root


@pytest.fixture(scope="module")
def instances(root) -> dict:
    return json.loads((root / "annotations" / "instances_train2017.json").read_text())


def test_layout_and_counts(root):
    assert sorted(path.name for path in root.iterdir()) == [
        "annotations",
        "synthetic.json",
        "train2017",
        "val2017",
    ]
    for split, count in (("train", 30), ("val", 10)):
        files = sorted((root / f"{split}2017").iterdir())
        assert len(files) == count
        with Image.open(files[0]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))
        dataset = build_dataset(DataConfig(root=root, test_size=128), split)
        assert len(dataset) == count
        assert dataset.annotations.label_map.names == CLASS_NAMES


def test_the_doctor_finds_nothing(root):
    splits = [resolve_split(DataConfig(root=root), split) for split in ("train", "val")]
    for report in inspect_splits(splits):
        assert report.findings == ()
        assert min(report.class_histogram.values()) > 0
        assert report.num_images_without_boxes == 0


def test_boxes_and_areas(instances):
    boxes = np.array([annotation["bbox"] for annotation in instances["annotations"]])
    areas = np.array([annotation["area"] for annotation in instances["annotations"]])
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 128
    extents = boxes[:, 2:].max(axis=1)
    assert extents.min() >= 8
    assert extents.max() <= 62
    assert extents.max() > 2 * extents.min()
    # A star fills about a third of its box, a square at most all of it.
    fill = areas / boxes[:, 2:].prod(axis=1)
    assert fill.min() > 0.15
    assert fill.max() <= 1
    counts = np.bincount([annotation["image_id"] for annotation in instances["annotations"]])
    assert set(counts[1:]) == {1, 2, 3, 4, 5}
    assert all(annotation["iscrowd"] == 0 for annotation in instances["annotations"])


def test_boxes_are_tight_around_what_is_drawn(monkeypatch):
    """Without noise and clutter, what differs from a plain background is the shapes."""
    background = np.full((128, 128, 3), 128, dtype=np.float32)
    monkeypatch.setattr(synthetic, "_draw_background", lambda size, rng: background.copy())
    monkeypatch.setattr(synthetic, "_MAX_SHAPES", 1)
    for seed in range(20):
        pixels, shapes = synthetic._draw_image(128, np.random.default_rng(seed))
        (shape,) = shapes
        # Every shape differs from what is behind it by 90 or more; noise has a deviation of 10.
        differs = np.linalg.norm(pixels.astype(np.float32) - 128, axis=-1) > 50
        x, y, width, height = synthetic._annotation(shape)["bbox"]
        inside = differs[y : y + height, x : x + width]
        assert inside.sum() >= 0.9 * shape.mask.sum()
        assert differs.sum() - inside.sum() < 0.1 * shape.mask.sum()
        for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
            assert edge.any()


def test_later_shapes_leave_most_of_earlier_ones_visible(monkeypatch):
    masks = []
    draw_shape = synthetic._draw_shape

    def record(size, rng):
        label, coverage = draw_shape(size, rng)
        masks.append((label, coverage >= 0.5))
        return label, coverage

    monkeypatch.setattr(synthetic, "_draw_shape", record)
    num_covered = 0
    for seed in range(30):
        masks.clear()
        _, shapes = synthetic._draw_image(128, np.random.default_rng(seed))
        for shape in shapes:
            # The drawn shape that this is the visible part of.
            full = min(
                mask.sum()
                for label, mask in masks
                if label == shape.label and not (shape.mask & ~mask).any()
            )
            assert shape.mask.sum() >= 0.65 * full
            num_covered += shape.mask.sum() < full
    assert num_covered > 5


def test_the_seed_decides_every_byte(root, tmp_path):
    write_synthetic_dataset(tmp_path / "again", num_train=30, num_val=10, seed=3)
    assert contents(tmp_path / "again") == contents(root)
    write_synthetic_dataset(tmp_path / "other", num_train=30, num_val=10, seed=4)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(root).keys()
    assert all(other[name] != data for name, data in contents(root).items())


def test_splits_differ(root):
    train, val = ((root / f"{split}2017" / f"{1:012d}.jpg") for split in ("train", "val"))
    assert train.read_bytes() != val.read_bytes()


def test_a_complete_set_is_left_alone_and_another_is_replaced(tmp_path):
    root = tmp_path / "shapes"
    write_synthetic_dataset(root, num_train=3, num_val=2, size=64)
    first = root / "train2017" / f"{1:012d}.jpg"
    first.write_bytes(b"changed")
    write_synthetic_dataset(root, num_train=3, num_val=2, size=64)
    assert first.read_bytes() == b"changed"
    write_synthetic_dataset(root, num_train=2, num_val=2, size=64)
    assert first.read_bytes() != b"changed"
    assert len(list((root / "train2017").iterdir())) == 2


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    root = tmp_path / "shapes"

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_annotation", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic_dataset(root, num_train=2, num_val=2, size=64)
    assert not root.exists()
    write_synthetic_dataset(root, num_train=2, num_val=2, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_other_content_is_not_touched(tmp_path):
    (tmp_path / "letter.txt").write_text("dear all")
    with pytest.raises(ValueError, match="something other than a synthetic set"):
        write_synthetic_dataset(tmp_path, num_train=2, num_val=2)
    with pytest.raises(ValueError, match="something other than a synthetic set"):
        write_synthetic_dataset(tmp_path / "letter.txt", num_train=2, num_val=2)
    assert (tmp_path / "letter.txt").read_text() == "dear all"


@pytest.mark.parametrize("change", [{"size": 32}, {"num_train": 0}, {"num_val": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, change):
    arguments = {"num_train": 2, "num_val": 2, "size": 64} | change
    with pytest.raises(ValueError, match="at least"):
        write_synthetic_dataset(tmp_path / "shapes", **arguments)
