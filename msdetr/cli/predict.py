"""`msdetr predict --checkpoint F --images FILE|FOLDER ...`: detect in images and draw."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msdetr.cli.options import configure_logging, parse_options, user_errors

if TYPE_CHECKING:
    import torch

    from msdetr.engine.pretrained import LoadedDetector

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.json"


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Detect objects in images: write the detections and drawings of them."""

    checkpoint: Path
    """A checkpoint or weights file of a run, or a checkpoint of the published code."""
    images: tuple[Path, ...]
    """Image files, and folders whose image files are taken."""
    output: Path
    """Folder for predictions.json and the drawn images (PNG)."""
    score_threshold: float = 0.3
    """Detections below are left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.score_threshold <= 1.0:
            raise ValueError(f"score_threshold must be in [0, 1], got {self.score_threshold}")


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr predict") -> int:
    """Predict, write the results, and return the exit status."""
    options = parse_options(
        PredictOptions, sys.argv[1:] if arguments is None else arguments, prog=prog
    )
    from msdetr.engine.device import resolve_device
    from msdetr.engine.pretrained import load_detector

    configure_logging()
    with user_errors():
        files = find_images(options.images)
        device = resolve_device(options.device)
        detector = load_detector(options.checkpoint)
        detector.model.to(device)
        options.output.mkdir(parents=True, exist_ok=True)
        rows = [_predict(file, name, detector, device, options) for name, file in files.items()]
    path = options.output / PREDICTIONS_FILE
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{sum(len(row['detections']) for row in rows)} detections in {len(rows)} images: {path}")
    return 0


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """The image files that `paths` name, by a unique name for the output.

    Raises:
        ValueError: a path does not exist, or there is no image.
    """
    from PIL import Image

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            suffixes = Image.registered_extensions()
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"there is no image or folder {path}")
    if not files:
        raise ValueError(f"there is no image in {', '.join(map(str, paths))}")
    named: dict[str, Path] = {}
    for file in files:
        name, number = file.stem, 1
        while name in named:
            number += 1
            name = f"{file.stem}-{number}"
        named[name] = file
    return named


def _predict(
    file: Path, name: str, detector: LoadedDetector, device: torch.device, options: PredictOptions
) -> dict[str, Any]:
    """Detect in one image, write the drawing, and return the detections as JSON types."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    from msdetr.data.images import decode_image
    from msdetr.engine.predict import detect
    from msdetr.evaluation.draw import draw_detections

    image = decode_image(file, exif=detector.config.data.exif).image
    detections = detect(detector, image, device)
    kept = detections.scores >= options.score_threshold
    scores, labels, boxes = (column[kept] for column in detections)
    label_map = detector.known_label_map
    drawn = draw_detections(
        pil_to_tensor(image),
        boxes,
        labels,
        scores,
        label_map.name_of,
        panel_size=min(max(448, *image.size), 1600),
    )
    drawn.save(options.output / f"{name}.png")
    return {
        "file": str(file),
        "width": image.width,
        "height": image.height,
        "drawing": f"{name}.png",
        "detections": [
            {
                "category_id": label_map.category_of(label),
                "name": label_map.name_of(label),
                "score": score,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            for score, label, (x0, y0, x1, y1) in zip(
                scores.tolist(), labels.tolist(), boxes.tolist(), strict=True
            )
        ],
    }
