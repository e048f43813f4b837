"""`msdetr demo`: train, evaluate and draw on a small generated data set, on any machine."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdetr.cli import evaluate, train
from msdetr.cli.options import parse_options, user_errors

NUM_DRAWN = 8


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Generate a data set of coloured shapes, train preset `tiny` on it, evaluate and draw.

    The data set is kept and used again; the run starts from scratch every time.
    """

    output: Path = Path("demo")
    """Folder of the data set (`data`), the run (`run`, replaced) and the drawing."""
    num_train: int = 2000
    """Training images to generate."""
    num_val: int = 240
    """Validation images to generate."""
    image_size: int = 128
    """Side of the images in pixels."""
    max_steps: int | None = None
    """Stop training after this many steps, for a quick look."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr demo") -> int:
    """Run the demo and return the exit status. The last line printed is the result."""
    options = parse_options(
        DemoOptions, sys.argv[1:] if arguments is None else arguments, prog=prog
    )
    data, run = options.output / "data", options.output / "run"
    _write_data(options, data)
    shutil.rmtree(run, ignore_errors=True)

    train_arguments = ["tiny", "--data.root", str(data), "--output", str(run)]
    if options.max_steps is not None:
        train_arguments += ["--train.max-steps", str(options.max_steps)]
    print(f"$ train.py {' '.join(train_arguments)}")
    started = time.perf_counter()
    status = train.main(train_arguments, prog="train.py")
    seconds = time.perf_counter() - started
    if status:
        return status

    weights = run / "weights.safetensors"
    evaluate_arguments = ["--checkpoint", str(weights), "--data.root", str(data)]
    print(f"$ evaluate.py {' '.join(evaluate_arguments)}")
    status = evaluate.main(evaluate_arguments, prog="evaluate.py")
    if status:
        return status
    _draw(weights, data, options.output / "predictions.png")

    text = (run / "evaluation" / evaluate.METRICS_FILE).read_text()
    metrics = json.loads(text)["metrics"]
    scores = " ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75"))
    print(f"demo: {scores} (training {seconds:.0f} s, {options.output})")
    return 0


def _write_data(options: DemoOptions, folder: Path) -> None:
    from msdetr.data.synthetic import write_synthetic_dataset

    with user_errors():
        options.output.mkdir(parents=True, exist_ok=True)
        write_synthetic_dataset(
            folder,
            num_train=options.num_train,
            num_val=options.num_val,
            size=options.image_size,
        )


def _draw(weights: Path, data: Path, drawing: Path) -> None:
    """Draw the first validation images, predictions beside the ground truth."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    from msdetr.config import DataConfig
    from msdetr.data.dataset import build_dataset
    from msdetr.data.images import decode_image
    from msdetr.engine.device import resolve_device
    from msdetr.engine.predict import detect
    from msdetr.engine.pretrained import load_detector
    from msdetr.evaluation.draw import draw_comparison

    device = resolve_device("auto")
    detector = load_detector(weights)
    detector.model.to(device)
    annotations = build_dataset(DataConfig(root=data), "val").annotations
    images, truth, detections = [], [], []
    for index in range(min(NUM_DRAWN, len(annotations))):
        image = decode_image(annotations.image_path(index)).image
        labels, boxes = annotations.targets(index)
        detected = detect(detector, image, device)
        images.append(pil_to_tensor(image))
        truth.append((boxes, labels))
        detections.append((detected.boxes, detected.labels, detected.scores))
    draw_comparison(drawing, images, truth, detections, detector.known_label_map.name_of)
    print(f"drew {len(images)} images with their predictions: {drawing}")
