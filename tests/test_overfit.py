"""The whole pipeline can overfit real photographs, from COCO images to COCO scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msdetr.cli import evaluate, train

NUM_IMAGES = 8
REPEATS = 25


def _first_images(annotations: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The first images of an annotation file, each listed `repeats` times under new ids."""
    images = sorted(annotations["images"], key=lambda image: image["id"])[:NUM_IMAGES]
    subset: dict[str, Any] = {"images": [], "annotations": []}
    for _ in range(repeats):
        for image in images:
            image_id = len(subset["images"]) + 1
            subset["images"].append(image | {"id": image_id})
            for annotation in annotations["annotations"]:
                if annotation["image_id"] == image["id"]:
                    new_ids = {"id": len(subset["annotations"]) + 1, "image_id": image_id}
                    subset["annotations"].append(annotation | new_ids)
    return subset | {"categories": annotations["categories"]}


@pytest.mark.slow
def test_overfits_eight_coco_images(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "coco64"
    annotations = json.loads((source / "annotations/instances_train2017.json").read_text())
    for name, repeats in (("train", REPEATS), ("val", 1)):
        subset = _first_images(annotations, repeats)
        (tmp_path / f"{name}.json").write_text(json.dumps(subset))
    files = [
        *("--data.train-images", str(source / "train2017")),
        *("--data.train-annotations", str(tmp_path / "train.json")),
        *("--data.val-images", str(source / "train2017")),
        *("--data.val-annotations", str(tmp_path / "val.json")),
    ]
    run = tmp_path / "run"
    status = train.main(
        [
            "tiny",
            *files,
            *("--output", str(run)),
            *("--data.augmentation", "none", "--data.test-size", "128", "--data.max-size", "256"),
            *("--train.batch-size", "8", "--train.epochs", "36", "--train.eval-every", "0"),
        ]
    )
    assert status == 0
    status = evaluate.main(["--checkpoint", str(run / "weights.safetensors"), *files])
    assert status == 0
    metrics = json.loads((run / "evaluation" / evaluate.METRICS_FILE).read_text())["metrics"]
    assert metrics["AP"] > 0.9
