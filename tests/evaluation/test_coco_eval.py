from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msdetr.annotations.coco import read_coco
from msdetr.annotations.labels import LabelMap
from msdetr.evaluation.coco_eval import CocoEvaluator
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.structures import Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CATEGORY_IDS = (2, 3, 7, 9)  # 9 is never annotated
NUM_DETECTIONS = 300
IMAGE_IDS = tuple(range(10, 130, 10))


# Labels are category ids, as for COCO: most of 0..11 belong to no category.
LABELS = LabelMap(CATEGORY_IDS, CATEGORY_IDS, ("a", "b", "c", "d"), 12)


def write_annotations(path: Path, annotations: list[dict[str, Any]]) -> Path:
    content = {
        "images": [
            {"id": image, "file_name": f"{image}.jpg", "width": 400, "height": 400}
            for image in reversed(IMAGE_IDS)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in CATEGORY_IDS],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return path


def random_annotations(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Sides of 8 to 250 pixels, some crowds; the first image has no boxes."""
    annotations: list[dict[str, Any]] = []
    for image in IMAGE_IDS[1:]:
        for _ in range(rng.integers(1, 12)):
            width, height = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            x, y = rng.uniform(0, 150, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice(CATEGORY_IDS[:3])),
                    "bbox": [x, y, width, height],
                    "area": 0.7 * width * height,  # that of a mask
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return annotations


def random_detections(
    rng: np.random.Generator, annotations: list[dict[str, Any]], image: int
) -> tuple[list[float], list[int], list[list[float]]]:
    """Near the truth, doubled, misplaced; scores of one decimal, so that many are equal."""
    if image == IMAGE_IDS[1]:
        return [], [], []
    near = [entry for entry in annotations if entry["image_id"] == image for _ in range(2)]
    boxes = [np.array(entry["bbox"]) * rng.normal(1, 0.12, 4) for entry in near]
    labels = [entry["category_id"] if rng.random() < 0.9 else 4 for entry in near]
    num_random = 200 if image == IMAGE_IDS[2] else 15
    boxes += list(rng.uniform((0, 0, 8, 8), (300, 300, 200, 200), (num_random, 4)))
    labels += rng.choice([0, 2, 9], num_random, p=[0.1, 0.8, 0.1]).tolist()
    scores = rng.integers(1, 11, len(boxes)) / 10
    corners = [[x, y, x + width, y + height] for x, y, width, height in np.abs(boxes).tolist()]
    order = np.argsort(-scores, kind="stable")
    return scores[order].tolist(), [labels[i] for i in order], [corners[i] for i in order]


def padded(rows: list[tuple[list[float], list[int], list[list[float]]]]) -> Detections:
    detections = Detections(
        scores=torch.zeros(len(rows), NUM_DETECTIONS),
        labels=torch.zeros(len(rows), NUM_DETECTIONS, dtype=torch.int64),
        boxes=torch.zeros(len(rows), NUM_DETECTIONS, 4),
    )
    for image, (scores, labels, boxes) in enumerate(rows):
        detections.scores[image, : len(scores)] = torch.tensor(scores)
        detections.labels[image, : len(scores)] = torch.tensor(labels, dtype=torch.int64)
        detections.boxes[image, : len(scores)] = torch.tensor(boxes).reshape(-1, 4)
    return detections


def make_case(path: Path, seed: int) -> tuple[Path, Detections]:
    """An annotation file and detections in the order of IMAGE_IDS."""
    rng = np.random.default_rng(seed)
    annotations = random_annotations(rng)
    rows = [random_detections(rng, annotations, image) for image in IMAGE_IDS]
    return write_annotations(path / "instances.json", annotations), padded(rows)


def perfect(annotations: list[dict[str, Any]]) -> Detections:
    rows = []
    for image in IMAGE_IDS:
        entries = [entry for entry in annotations if entry["image_id"] == image]
        boxes = [entry["bbox"] for entry in entries]
        rows.append(
            (
                [0.5] * len(entries),
                [entry["category_id"] for entry in entries],
                [[x, y, x + width, y + height] for x, y, width, height in boxes],
            )
        )
    return padded(rows)


def new_evaluator(file: Path) -> CocoEvaluator:
    return CocoEvaluator(read_coco(file)[0], LABELS)


def scored(file: Path, detections: Detections) -> CocoResult:
    evaluator = new_evaluator(file)
    evaluator.add(IMAGE_IDS, detections)
    return evaluator.summarize()


def published_evaluation(file: Path, results: str | list[dict[str, Any]]) -> COCOeval:
    """pycocotools as its own documentation uses it."""
    truth = COCO(str(file))
    evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def published_class_scores(evaluator: COCOeval) -> list[tuple[float, float]]:
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    return [
        tuple(float(p[p > -1].mean()) if (p > -1).any() else -1.0 for p in (both, both[0]))
        for both in np.moveaxis(precision, 2, 0)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_pycocotools(tmp_path: Path, seed: int) -> None:
    file, detections = make_case(tmp_path, seed)
    evaluator = new_evaluator(file)
    evaluator.add(IMAGE_IDS, detections)
    result = evaluator.summarize()

    expected = published_evaluation(file, list(evaluator.results()))
    assert all(0.01 < value < 0.99 for value in expected.stats)  # the case exercises every number
    assert list(result.metrics) == list(METRICS)
    np.testing.assert_allclose(list(result.metrics.values()), expected.stats, rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        [(entry.ap, entry.ap50) for entry in result.per_class],
        published_class_scores(expected),
        rtol=0,
        atol=1e-14,
    )
    assert (result.per_class[-1].ap, result.per_class[-1].num_boxes) == (-1, 0)


def test_images_never_added_count_as_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    annotations = [
        {"id": number, "image_id": image, "category_id": 2, "bbox": [9, 9, 50, 50]}
        for number, image in enumerate(IMAGE_IDS)
    ]
    file = write_annotations(tmp_path / "instances.json", annotations)
    evaluator = new_evaluator(file)
    half = Detections(*(column[:6] for column in perfect(annotations)))
    evaluator.add(IMAGE_IDS[:6], half)
    with caplog.at_level(logging.WARNING):
        result = evaluator.summarize()
    assert result["AR100"] == pytest.approx(0.5)
    assert "6 of 12 images were not added" in caplog.text


def test_perfect_detections(tmp_path: Path) -> None:
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": [9, 9, side, 20]}
        for number, (image, category, side) in enumerate(
            [(10, 2, 20), (10, 3, 20.5), (30, 2, 300), (120, 7, 30)]
        )
    ]  # ids from 0, no areas, no crowd flags: as exporters of custom data write them
    file = write_annotations(tmp_path / "instances.json", annotations)
    result = scored(file, perfect(annotations))
    for name in set(METRICS) - {"APl", "ARl"}:
        assert result[name] == pytest.approx(1.0), name
    assert result["APl"] == result["ARl"] == -1
    assert [entry.num_boxes for entry in result.per_class] == [2, 1, 1, 0]
    assert [entry.ap for entry in result.per_class] == pytest.approx([1, 1, 1, -1])


def test_nothing_detected(tmp_path: Path) -> None:
    file, _ = make_case(tmp_path, 0)
    result = scored(file, padded([([], [], [])] * len(IMAGE_IDS)))
    assert set(result.metrics.values()) == {0.0}
    assert [entry.ap for entry in result.per_class] == [0, 0, 0, -1]
    unscored = new_evaluator(file)
    assert unscored.summarize().metrics == result.metrics
    assert list(unscored.results()) == []


@pytest.mark.parametrize("with_images", [True, False])
def test_nothing_annotated(tmp_path: Path, with_images: bool) -> None:
    _, detections = make_case(tmp_path, 0)
    file = write_annotations(tmp_path / "instances.json", [])
    if with_images:
        result = scored(file, detections)
    else:
        file.write_text('{"images": [], "categories": [], "annotations": []}')
        result = new_evaluator(file).summarize()
        assert result.per_class == []
    assert set(result.metrics.values()) == {-1.0}
    assert all(line.endswith(" -") for line in result.table().splitlines())


def test_suppressed_places_and_unused_labels_are_dropped(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 1)
    evaluator = new_evaluator(file)
    evaluator.add(IMAGE_IDS, detections)
    used = torch.isin(detections.labels, torch.tensor(CATEGORY_IDS)) & (detections.scores > 0)
    results = list(evaluator.results())
    assert 0 < len(results) == used.sum() < (detections.scores > 0).sum()
    assert {entry["category_id"] for entry in results} == {2, 3, 7, 9}


def test_values_that_are_not_finite_are_dropped(tmp_path: Path) -> None:
    file, _ = make_case(tmp_path, 1)
    detections = padded([([0.9, 0.8, 0.7, 0.6], [2] * 4, [[1.0, 2, 4, 8]] * 4)])
    detections.scores[0, 0] = torch.nan
    detections.scores[0, 1] = torch.inf
    detections.boxes[0, 2, 3] = torch.nan
    evaluator = new_evaluator(file)
    evaluator.add([10], detections)
    assert list(evaluator.results()) == [
        {
            "image_id": 10,
            "category_id": 2,
            "bbox": [1, 2, 3, 6],
            "score": pytest.approx(0.6, rel=1e-7),
        }
    ]


def test_categories_that_the_file_lacks_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, detections = make_case(tmp_path, 1)
    content = json.loads(file.read_text())
    content["categories"] = content["categories"][:2]
    file.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        result = scored(file, detections)
    assert [entry.category_id for entry in result.per_class] == [2, 3]
    assert "(ids [7, 9]): they are not scored" in caplog.text


def test_shards_merge_into_the_whole(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 2)
    whole = new_evaluator(file)
    whole.add(IMAGE_IDS, detections)
    shards = []
    for rank in range(2):
        shard = new_evaluator(file)
        for first in range(rank, len(IMAGE_IDS), 4):  # two batches of every second image
            chosen = slice(first, first + 3, 2)
            shard.add(
                torch.tensor(IMAGE_IDS)[chosen], Detections(*(part[chosen] for part in detections))
            )
        shards.append(shard)
    idle = new_evaluator(file)  # a rank without images
    for state in (shards[1].state(), idle.state()):
        shards[0].merge(pickle.loads(pickle.dumps(state)))
    assert list(shards[0].results()) == list(whole.results())
    assert shards[0].summarize() == whole.summarize()


def test_image_added_twice_is_refused(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 2)
    evaluator = new_evaluator(file)
    one = Detections(*(column[:1] for column in detections))
    with pytest.raises(ValueError, match="image 20 was added twice"):
        evaluator.add([20, 20], Detections(*(column[:2] for column in detections)))
    evaluator.add([20], one)  # the refused batch left no trace
    with pytest.raises(ValueError, match="image 20 was added twice"):
        evaluator.add([20], one)
    other = new_evaluator(file)
    other.add([20], one)
    with pytest.raises(ValueError, match="image 20 was added twice"):
        evaluator.merge(other.state())
    assert evaluator.state().image_ids.tolist() == [20]


def test_unsuitable_images_are_refused(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 2)
    evaluator = new_evaluator(file)
    with pytest.raises(ValueError, match=r"instances\.json has no image with id 11"):
        evaluator.add([11], Detections(*(column[:1] for column in detections)))
    with pytest.raises(ValueError, match="1 image ids for the detections of 12 images"):
        evaluator.add([10], detections)


def test_results_file_scores_as_the_run_did(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 0)
    evaluator = new_evaluator(file)
    evaluator.add(IMAGE_IDS, detections)
    path = tmp_path / "new" / "results.json"
    evaluator.write_results(path)
    assert json.loads(path.read_text()) == list(evaluator.results())
    expected = published_evaluation(file, str(path)).stats
    np.testing.assert_allclose(
        list(evaluator.summarize().metrics.values()), expected, rtol=0, atol=1e-14
    )


def test_results_file_without_detections(tmp_path: Path) -> None:
    file, _ = make_case(tmp_path, 0)
    path = tmp_path / "results.json"
    new_evaluator(file).write_results(path)
    assert json.loads(path.read_text()) == []


def test_failed_write_keeps_the_old_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, detections = make_case(tmp_path, 0)
    evaluator = new_evaluator(file)
    evaluator.add(IMAGE_IDS, detections)
    path = tmp_path / "results" / "results.json"
    path.parent.mkdir()
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluator.write_results(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, detections = make_case(tmp_path, 0)
    scored(file, detections)
    assert capfd.readouterr() == ("", "")


def test_tables(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 0)
    result = scored(file, detections)
    lines = result.table().splitlines()
    assert [line.split()[2] for line in lines] == list(METRICS)
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines] == [f"{v:.3f}" for v in result.metrics.values()]
    header, *rows = result.per_class_table().splitlines()
    assert header.split() == ["id", "class", "boxes", "AP", "AP50"]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert rows[-1].split() == ["9", "class", "9", "0", "-", "-"]
    first = result.per_class[0]
    assert rows[0].split() == [
        *("2", "class", "2"),
        *(str(first.num_boxes), f"{first.ap:.3f}", f"{first.ap50:.3f}"),
    ]


def test_result_is_json(tmp_path: Path) -> None:
    file, detections = make_case(tmp_path, 0)
    result = scored(file, detections)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["metrics"] == result.metrics
    assert content["num_images"] == len(IMAGE_IDS)
    assert content["per_class"][1] == {
        "category_id": 3,
        "name": "class 3",
        "AP": result.per_class[1].ap,
        "AP50": result.per_class[1].ap50,
        "num_boxes": result.per_class[1].num_boxes,
    }
