from __future__ import annotations

import json

import pytest

from msdetr.annotations.labels import COCO_CATEGORIES, LabelMap

CUSTOM = {7: "dog", 3: "cat", 200: "cow"}


def test_coco_categories_are_those_that_torchvision_lists():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    unused = ("__background__", "N/A")
    assert {i: name for i, name in enumerate(names) if name not in unused} == COCO_CATEGORIES


def test_auto_keeps_the_ids_of_coco():
    label_map = LabelMap.from_categories(COCO_CATEGORIES)
    assert label_map.num_classes == 91
    assert label_map.labels == label_map.category_ids == tuple(COCO_CATEGORIES)
    assert label_map.category_of(90) == 90
    assert label_map.name_of(90) == "toothbrush"


@pytest.mark.parametrize("changes", [{91: "broom"}, {90: "broom"}])
def test_auto_is_contiguous_for_anything_else(changes):
    categories = COCO_CATEGORIES | changes
    label_map = LabelMap.from_categories(categories)
    assert label_map.labels == tuple(range(len(categories)))
    assert label_map.num_classes == len(categories)


def test_contiguous_labels_ascend_with_ids():
    label_map = LabelMap.from_categories(CUSTOM)
    assert label_map == LabelMap((3, 7, 200), (0, 1, 2), ("cat", "dog", "cow"), 3)
    assert [label_map.category_of(label) for label in range(4)] == [3, 7, 200, None]
    assert [label_map.name_of(label) for label in range(4)] == ["cat", "dog", "cow", "unused 3"]


def test_layout_can_be_forced():
    assert LabelMap.from_categories(COCO_CATEGORIES, "contiguous").num_classes == 80
    label_map = LabelMap.from_categories({7: "dog", 3: "cat"}, "coco")
    assert (label_map.labels, label_map.num_classes) == ((3, 7), 91)
    assert label_map.category_of(5) is None


def test_round_trip_through_json():
    for categories in (COCO_CATEGORIES, CUSTOM):
        label_map = LabelMap.from_categories(categories)
        assert LabelMap.from_dict(json.loads(json.dumps(label_map.to_dict()))) == label_map


@pytest.mark.parametrize(
    ("categories", "layout", "message"),
    [({}, "auto", "no categories"), (CUSTOM, "coco", "below 91"), ({-1: "a"}, "coco", "-1 to -1")],
)
def test_bad_categories_are_refused(categories, layout, message):
    with pytest.raises(ValueError, match=message):
        LabelMap.from_categories(categories, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 0, 1]}, "labels must differ"),
        ({"labels": [0, 1, 3]}, "must be in"),
        ({"category_ids": [7, 3, 200]}, "must ascend"),
        ({"names": ["a"]}, "differ in length"),
    ],
)
def test_contradicting_fields_are_refused(change, message):
    fields = LabelMap.from_categories(CUSTOM).to_dict()
    with pytest.raises(ValueError, match=message):
        LabelMap.from_dict(fields | change)


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="num_classes"):
        LabelMap.from_dict({"category_ids": [], "labels": [], "names": []})
