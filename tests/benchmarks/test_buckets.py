"""The report of what padding costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader.buckets import draw_batches, main, padded_shapes
from msdetr.config import DataConfig
from msdetr.data.transforms import evaluation_transform

SIZES = ((480, 640), (640, 480), (427, 640))


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": SIZES[i % 3][0], "width": SIZES[i % 3][1]}
        for i in range(12)
    ]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}
        for i in range(12)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_rows(annotations, tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--annotations", str(annotations), "--output", str(path)]
    limits = ["--num-batches", "256", "--batches", "2", "--buckets", "4", "16"]
    assert main([*arguments, *limits, "--multiples", "64"]) == 0
    rows = json.loads(path.read_text())
    targets = rows.pop()
    assert (targets["mean_targets"], targets["mean_slots"], targets["shapes"]) == (1.0, 8.0, 1)
    assert targets["padded_share"] == pytest.approx(7 / 8)
    train = {
        (row["order"], row["rule"], row["buckets"]): row for row in rows if row["split"] == "train"
    }
    assert len(train) == 8
    padded = [
        train[key]["padded_share"]
        for key in (
            ("area", "exact", None),
            ("random", "exact", None),
            ("random", "multiple", None),
            ("random", "buckets", 16),
            ("random", "buckets", 4),
        )
    ]
    assert padded == sorted(padded)
    assert 0 < padded[0] < padded[-1] < 1
    assert train["random", "multiple", None]["relative_area"] == 1.0
    assert train["area", "multiple", None]["relative_area"] < 1.0
    assert train["random", "buckets", 16]["shapes"] <= 16
    assert "padded_share" in capsys.readouterr().out


def test_batches_of_one_shape_are_not_padded():
    transform = evaluation_transform(DataConfig(test_size=64))
    sizes = draw_batches(np.array([[50, 50]]), transform, 3, 10, "random")
    assert sizes.shape == (10, 3, 2)
    assert (padded_shapes(sizes, 1, ()) == 64).all()
    assert (padded_shapes(sizes, 48, ()) == 96).all()
    assert (padded_shapes(sizes, 1, [(60, 99), (70, 80)]) == (70, 80)).all()


def test_orders_hold_the_same_samples():
    transform = evaluation_transform(DataConfig())
    ordered = [
        draw_batches(np.array(SIZES), transform, 2, 200, order)
        for order in ("random", "aspect", "area")
    ]
    first = sorted(map(tuple, ordered[0].reshape(-1, 2).tolist()))
    for sizes in ordered[1:]:
        assert sorted(map(tuple, sizes.reshape(-1, 2).tolist())) == first
        # Nearly all batches have one shape now.
        same = (sizes[:, 0] == sizes[:, 1]).all(axis=1).mean()
        assert same > 0.9 > (ordered[0][:, 0] == ordered[0][:, 1]).all(axis=1).mean()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--annotations", "absent.json"], "cannot read the file"),
        (["--annotations", "absent.json", "--buckets", "0"], "buckets must be positive"),
    ],
)
def test_wrong_options_are_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")
