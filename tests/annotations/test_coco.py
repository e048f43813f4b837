from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msdetr.annotations.coco import read_coco
from msdetr.annotations.findings import Finding
from msdetr.annotations.table import AnnotationTable

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
IMAGE = {"id": 5, "file_name": "a.jpg", "width": 100, "height": 50}
ANNOTATION = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4]}


def read(
    path: Path, images: list[Any], annotations: list[Any], categories: list[Any] = CATEGORIES
) -> tuple[AnnotationTable, list[Finding]]:
    file = path / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return read_coco(file)


def test_table(tmp_path: Path) -> None:
    table, findings = read(
        tmp_path,
        [IMAGE | {"id": 9, "file_name": "b/\u00e4.jpg", "width": 20}, IMAGE],
        [
            ANNOTATION | {"id": 0, "image_id": 9, "category_id": 7, "area": 9},
            ANNOTATION | {"iscrowd": 1},
            ANNOTATION | {"id": 2, "image_id": 9, "bbox": [0, 0, 5, 2.5], "area": None},
        ],
    )
    assert findings == []
    assert table.source == tmp_path / "instances.json"
    assert table.image_ids.tolist() == [5, 9]
    assert table.sizes.tolist() == [[50, 100], [50, 20]]
    assert [table.file_name(index) for index in range(2)] == ["a.jpg", "b/\u00e4.jpg"]
    assert table.categories == {3: "cat", 7: "dog"}
    # Grouped by image, in the order of the file.
    assert table.annotation_ids.tolist() == [1, 0, 2]
    assert table.box_offsets.tolist() == [0, 1, 3]
    assert table.image_index.tolist() == [0, 1, 1]
    assert table.category_index.tolist() == [0, 1, 0]
    assert table.boxes.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 5, 2.5]]
    assert table.areas.tolist() == [12, 9, 12.5]
    assert table.is_crowd.tolist() == [True, False, False]


def test_polygons_are_skipped_wherever_they_are(tmp_path: Path) -> None:
    tricky = '"segmentation": [1, 2]'
    polygons = {"segmentation": [[1.5, 2, 3e-5, 4], [5, 6]]}
    table, findings = read(
        tmp_path,
        [IMAGE],
        [
            polygons | ANNOTATION,
            ANNOTATION | {"id": 2} | polygons,  # the last field of the object
            ANNOTATION | {"id": 3, "segmentation": []},
            ANNOTATION | {"id": 4, "segmentation": {"counts": [1, 2], "size": [50, 100]}},
        ],
        [{"id": 3, "name": tricky}],
    )
    assert len(table.boxes) == 4
    assert table.category_names == (tricky,)
    assert findings == []


@pytest.mark.parametrize(
    ("value", "is_crowd", "codes"),
    [
        (0, False, []),
        (0.0, False, []),
        (False, False, []),
        (None, False, []),
        ("0", False, ["crowd_flag_text"]),
        (1, True, []),
        (1.0, True, []),
        (True, True, []),
        ("1", True, ["crowd_flag_text"]),
        (2, None, ["malformed_annotation"]),
        ("no", None, ["malformed_annotation"]),
        ([0], None, ["malformed_annotation"]),
    ],
)
def test_crowd_flags(tmp_path: Path, value: Any, is_crowd: bool | None, codes: list[str]) -> None:
    table, findings = read(tmp_path, [IMAGE], [ANNOTATION | {"iscrowd": value}])
    assert table.is_crowd.tolist() == ([] if is_crowd is None else [is_crowd])
    assert [finding.code for finding in findings] == codes


@pytest.mark.parametrize("value", ["nine", float("nan"), 10**400, [9], True])
def test_unusable_areas_are_reported_and_replaced(tmp_path: Path, value: Any) -> None:
    table, findings = read(tmp_path, [IMAGE], [ANNOTATION | {"area": value}])
    assert table.areas.tolist() == [12]
    assert [finding.code for finding in findings] == ["malformed_area"]


def test_areas_may_be_written_as_text(tmp_path: Path) -> None:
    table, findings = read(tmp_path, [IMAGE], [ANNOTATION | {"area": "9.5"}])
    assert table.areas.tolist() == [9.5]
    assert not findings


NO_ID = {key: value for key, value in IMAGE.items() if key != "id"}


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([NO_ID], [], "file a.jpg: 'id' is missing, it must be an integer"),
        ([17], [], "not an object: 17"),
        ([IMAGE | {"id": "5"}], [], "file a.jpg: 'id' is '5', it must be an integer"),
        ([IMAGE | {"id": 2**70}], [], "'id' is 1180591620717411303424, it must be an integer"),
        (
            [IMAGE | {"height": 1.5}],
            [],
            "image 5, file a.jpg: 'height' is 1.5, it must",
        ),
        ([IMAGE | {"width": 0}], [], "'width' is 0, it must be an integer of at least 1"),
        ([IMAGE | {"file_name": None}], [], "image 5: 'file_name' is None, it must be a text"),
        ([IMAGE, IMAGE], [], "id 5 appears more than once"),
        ([IMAGE | {"file_name": "../a.jpg"}], [], "file name '../a.jpg' is not a relative"),
        ([IMAGE | {"file_name": "a\ud83d.jpg"}], [], "half of a character"),
        ([IMAGE], [{**ANNOTATION, "id": "1"}], "image 5, file a.jpg: 'id' is '1', it must"),
        ([IMAGE], [ANNOTATION, ANNOTATION], "id 1 appears more than once"),
        (
            [IMAGE],
            [ANNOTATION | {"image_id": 6}],
            "annotation 1: there is no image with id 6",
        ),
        ([IMAGE], [ANNOTATION | {"category_id": 4}], "there is no category with id 4"),
        ([IMAGE], [ANNOTATION | {"category_id": None}], "'category_id' is None"),
        (
            [IMAGE],
            [ANNOTATION | {"bbox": None}],
            "'bbox' is None, it must be four finite numbers",
        ),
        ([IMAGE], [ANNOTATION | {"bbox": [1, 2, 3]}], "'bbox' is [1, 2, 3], it must"),
        ([IMAGE], [ANNOTATION | {"bbox": [1, 2, 3, "4"]}], "'bbox' is [1, 2, 3, '4'], it must"),
        ([IMAGE], [ANNOTATION | {"bbox": [1, 2, 3, True]}], "'bbox' is [1, 2, 3, True], it must"),
        (
            [IMAGE],
            [ANNOTATION | {"bbox": [1, 2, 3, float("nan")]}],
            "'bbox' is [1, 2, 3, nan], it",
        ),
        ([IMAGE], [ANNOTATION | {"bbox": [1, 2, 3, 1e39]}], "'bbox' is [1, 2, 3, 1e+39], it must"),
        ([IMAGE], [ANNOTATION | {"bbox": [1, 2, 3.5, 10**400]}], "'bbox' is [1, 2, 3.5, 1000"),
    ],
)
def test_broken_entries_are_reported(
    tmp_path: Path, images: list[Any], annotations: list[Any], message: str
) -> None:
    table, (finding,) = read(tmp_path, images, annotations)
    assert finding.severity == "error"
    assert message in str(finding)
    assert len(table.boxes) == len(annotations) - len(annotations[:1])


def test_sound_entries_survive_beside_broken_ones(tmp_path: Path) -> None:
    broken = [
        ANNOTATION | {"id": 2, "bbox": [float("inf")] * 4, "category_id": 9},
        ANNOTATION | {"id": 3, "image_id": "5", "iscrowd": "no"},
        "?",
    ]
    table, findings = read(tmp_path, [IMAGE, 1], [*broken, ANNOTATION], [*CATEGORIES, {"id": 3}])
    assert table.annotation_ids.tolist() == [1]
    # An entry with several faults has a finding for each.
    codes = [(finding.code, finding.annotation_id) for finding in findings]
    assert sorted(codes, key=str) == [
        ("invalid_categories", None),
        ("invalid_categories", None),
        ("malformed_annotation", 3),
        ("malformed_annotation", 3),
        ("malformed_annotation", None),
        ("malformed_image", None),
        ("nan_box", 2),
        ("unknown_category", 2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "invalid JSON"),
        ("[1, 2]", "no list 'images'"),
        ('{"images": [], "categories": []}', "no list 'annotations'"),
        ("\xff\xfe", "invalid JSON"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "instances.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        read_coco(file)
    assert str(error.value).startswith(f"{file}: ")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: cannot read the file"):
        read_coco(tmp_path / "absent.json")
