from __future__ import annotations

import json
import multiprocessing.reduction
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data.conftest import CocoFolder

from msdetr.annotations.labels import LabelMap
from msdetr.data.annotated_images import load_annotated_images

IMAGE = {"id": 5, "file_name": "a.jpg", "width": 100, "height": 50}
ANNOTATION = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4]}


def expected_targets(content: dict, image: dict, label_of: dict[int, int]) -> list:
    """[(label, x0, y0, x1, y1)] of an image, one annotation after the other."""
    rows = []
    for annotation in content["annotations"]:
        if annotation["image_id"] != image["id"] or annotation.get("iscrowd", 0):
            continue
        x, y, width, height = np.array(annotation["bbox"], dtype=np.float32)
        x0, x1 = (min(max(v, 0), image["width"]) for v in (x, x + width))
        y0, y1 = (min(max(v, 0), image["height"]) for v in (y, y + height))
        if x1 > x0 and y1 > y0:
            rows.append((label_of[annotation["category_id"]], x0, y0, x1, y1))
    return rows


def assert_same_as_file(folder, content, label_of):
    dataset = folder.load()
    images = sorted(content["images"], key=lambda image: image["id"])
    assert len(dataset) == len(images)
    for index, image in enumerate(images):
        assert dataset.image_id(index) == image["id"]
        assert dataset.file_name(index) == image["file_name"]
        assert dataset.image_size(index) == (image["height"], image["width"])
        labels, boxes = dataset.targets(index)
        assert (labels.dtype, boxes.dtype) == (torch.int64, torch.float32)
        rows = [(label, *box) for label, box in zip(labels.tolist(), boxes.tolist(), strict=True)]
        assert rows == expected_targets(content, image, label_of)
    return dataset


def test_arrays_hold_the_content_of_the_file(write_coco):
    rng = random.Random(0)
    images = [
        {"id": i, "file_name": f"part {i}/bild_ä{i}.jpg", "width": 60 + i % 40, "height": 90}
        for i in rng.sample(range(1000, 2000), 30)
    ]
    annotations = [
        {
            "id": i,
            "image_id": rng.choice(images[:20])["id"],  # the others have no boxes
            "category_id": rng.choice((3, 7)),
            "bbox": [rng.uniform(-20, 90), rng.uniform(-20, 90), *rng.choices((0, 9.5, 40), k=2)],
            "iscrowd": int(rng.random() < 0.2),
        }
        for i in rng.sample(range(10_000), 200)
    ]
    folder = write_coco(images, annotations)
    content = json.loads(folder.annotations.read_text())
    dataset = assert_same_as_file(folder, content, {3: 0, 7: 1})
    assert 0 < len(dataset.boxes) < 160  # crowds, degenerate and outside boxes are gone
    assert (dataset.boxes[:, 2:] > dataset.boxes[:, :2]).all()
    assert dataset.label_map == LabelMap((3, 7), (0, 1), ("cat", "dog"), 2)
    assert dataset.image_path(0) == folder.images / dataset.file_name(0)


@pytest.mark.parametrize(("name", "num_classes"), [("coco64", 91), ("bccd", 3)])
def test_real_annotations(shared_data, name, num_classes):
    root = shared_data / name
    annotations = root / "annotations" / "instances_train2017.json"
    folder = CocoFolder(root / "train2017", annotations)
    content = json.loads(annotations.read_text())
    ids = sorted(category["id"] for category in content["categories"])
    labels = ids if num_classes == 91 else range(len(ids))
    dataset = assert_same_as_file(folder, content, dict(zip(ids, labels, strict=True)))
    assert dataset.label_map.num_classes == num_classes


def test_images_without_any_annotation(write_coco):
    folder = write_coco([IMAGE])
    dataset = folder.load()
    assert dataset.targets(0)[0].shape == (0,)
    assert dataset.targets(0)[1].shape == (0, 4)


def test_labels_of_another_set(write_coco):
    folder = write_coco([IMAGE], [ANNOTATION], [{"id": 3, "name": "cat"}])
    trained = LabelMap((1, 3), (0, 1), ("bird", "cat"), 2)
    dataset = folder.load(trained)
    assert dataset.label_map is trained
    assert dataset.labels.tolist() == [1]
    for other in (LabelMap((1,), (0,), ("bird",), 1), LabelMap((3,), (0,), ("bird",), 1)):
        with pytest.raises(ValueError, match="category 3 is 'cat' here"):
            folder.load(other)


def test_errors_of_all_files_are_reported_together(write_coco):
    unknown = [ANNOTATION | {"id": i, "image_id": 6} for i in range(7)]
    train = write_coco([IMAGE], unknown, name="train.json")
    val = write_coco(
        [IMAGE | {"width": 0}],
        [ANNOTATION],  # no second error, although its image is refused
        [{"id": 3, "name": "bird"}],
        name="val.json",
    )
    splits = [(folder.images, folder.annotations) for folder in (train, val)]
    with pytest.raises(ValueError, match=r"^9 error\(s\).*`msdetr doctor` lists all") as error:
        load_annotated_images(splits)
    lines = str(error.value).splitlines()[1:]
    assert [line for line in lines if line.startswith(f"  {train.annotations}: ")] == [
        *[
            f"  {train.annotations}: image 6, annotation {i}: there is no image with id 6"
            for i in range(5)
        ],
        f"  {train.annotations}: 2 more of unknown_image",
    ]
    assert [line.split(": ")[1] for line in lines[6:]] == [
        "image 5, file a.jpg",
        "category 3 is 'bird' here, but 'cat' in the label map of the model or training set",
    ]


def test_spawned_processes_share_the_arrays(write_coco):
    annotations = [ANNOTATION | {"id": i} for i in range(5000)]
    folder = write_coco([IMAGE], annotations)
    dataset = folder.load()
    assert dataset.boxes.nbytes == 80_000
    assert dataset.table.boxes.nbytes == 160_000
    pickled = multiprocessing.reduction.ForkingPickler.dumps(dataset)
    assert len(pickled) < 5000  # handles, not contents
    assert dataset.boxes.is_shared()
    assert dataset.table.boxes.is_shared()


def write_large_annotations(path: Path, num_images: int, num_boxes: int) -> None:
    """A file as COCO's: addresses, dates, and polygons of 20 to 60 numbers."""
    rng = random.Random(0)
    polygons = [
        [[round(rng.uniform(0, 640), 2) for _ in range(2 * rng.randint(10, 30))]]
        for _ in range(500)
    ]
    polygons = [json.dumps(polygon) for polygon in polygons]
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        for i in range(num_images):
            name = f"{5 * i:012d}.jpg"
            image = {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{name}",
                "id": 5 * i,
            }
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(num_boxes):
            x, y = rng.uniform(0, 600), rng.uniform(0, 440)
            file.write(
                f'{", " if i else ""}{{"segmentation": {polygons[i % 500]}, "area": {x * y:.4f}, '
                f'"iscrowd": 0, "image_id": {5 * rng.randrange(num_images)}, '
                f'"bbox": [{x:.2f}, {y:.2f}, {rng.uniform(1, 40):.2f}, {rng.uniform(1, 40):.2f}], '
                f'"category_id": {rng.randint(1, 80)}, "id": {900_000 + i}}}'
            )
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


MEASURE = """
import os, sys, time
from pathlib import Path
from msdetr.data.annotated_images import load_annotated_images

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

before, start = resident(), time.process_time()
(dataset,) = load_annotated_images([(Path("images"), Path(sys.argv[1]))])
print(len(dataset), len(dataset.boxes), time.process_time() - start, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
@pytest.mark.parametrize(
    ("num_images", "num_boxes", "max_seconds", "max_megabytes"),
    [
        (5900, 43_000, 10, 60),
        pytest.param(118_000, 860_000, 30, 300, marks=pytest.mark.slow),
    ],
    ids=["one twentieth of COCO", "as COCO"],
)
def test_large_files_load_fast_and_stay_small(
    tmp_path, num_images, num_boxes, max_seconds, max_megabytes
):
    file = tmp_path / "instances.json"
    write_large_annotations(file, num_images, num_boxes)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], check=True, capture_output=True, text=True
    ).stdout
    *counts, seconds, megabytes = map(float, output.split())
    assert counts == [num_images, num_boxes]
    assert seconds < max_seconds
    assert megabytes < max_megabytes
