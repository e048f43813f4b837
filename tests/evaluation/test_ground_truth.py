from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msdetr.evaluation.ground_truth import read_ground_truth


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 7}, {"id": 5}],
        "categories": [{"id": 4, "name": "four"}, {"id": 1}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4], "area": 9},
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 5, 2.5], "iscrowd": 1},
            {"id": 2, "image_id": 5, "category_id": 9, "bbox": [0, 0, 5, 2], "area": 10},
            {"id": 3, "image_id": 6, "category_id": 1, "bbox": [0, 0, 5, 2], "area": None},
        ],
    }


def written(path: Path, what: Any) -> Path:
    file = path / "instances.json"
    file.write_text(json.dumps(what))
    return file


def test_arrays(tmp_path: Path) -> None:
    truth = read_ground_truth(written(tmp_path, content()))
    assert truth.image_ids.tolist() == [5, 7]
    assert truth.category_ids.tolist() == [1, 4]
    assert truth.category_names == ("1", "four")
    # The last two refer to a category and to an image that the file does not list.
    assert truth.image_index.tolist() == [1, 0]
    assert truth.category_index.tolist() == [1, 0]
    assert truth.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 5, 2.5]]
    assert truth.area.tolist() == [9, 12.5]
    assert truth.is_crowd.tolist() == [False, True]


def test_chosen_images(tmp_path: Path) -> None:
    file = written(tmp_path, content())
    truth = read_ground_truth(file, [7, 7])
    assert truth.image_ids.tolist() == [7]
    assert truth.boxes.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"instances\.json has no image with id 6"):
        read_ground_truth(file, [7, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("images"), "no list 'images'"),
        (lambda file: file.update(annotations={}), "no list 'annotations'"),
        (lambda file: file["images"].append({"id": 5}), "id 5 occurs more than once in 'images'"),
        (lambda file: file["categories"].append({"id": 4}), "id 4 occurs .* 'categories'"),
        (lambda file: file["images"].append({"name": "a"}), "no 'id' in {'name': 'a'}"),
        (lambda file: file["categories"].append({"name": "a"}), "no 'id' in {'name': 'a'}"),
        (lambda file: file["images"].append({"id": "a"}), "unusable value in field 'id'"),
        (lambda file: file["annotations"][0].pop("image_id"), "no 'image_id' in {'id': 0,"),
        (lambda file: file["annotations"][0].pop("category_id"), "no 'category_id' in"),
        (lambda file: file["annotations"][0].pop("bbox"), "'bbox' is not .x, y, width, height. in"),
        (lambda file: file["annotations"][0].update(bbox=[1, 2, 3]), "'bbox' is not"),
        (lambda file: file["annotations"][0].update(bbox=[1, 2, 3, "a"]), "field 'bbox'"),
        (lambda file: file["annotations"][0].update(area="a"), "field 'area'"),
    ],
)
def test_defects_are_named(tmp_path: Path, change: Any, message: str) -> None:
    broken = content()
    change(broken)
    with pytest.raises(ValueError, match=message) as error:
        read_ground_truth(written(tmp_path, broken))
    assert "instances.json" in str(error.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read annotation file .*missing\.json: No such"):
        read_ground_truth(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"instances\.json holds a JSON list"):
        read_ground_truth(written(tmp_path, []))
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances\.json is not a JSON file"):
        read_ground_truth(tmp_path / "instances.json")
