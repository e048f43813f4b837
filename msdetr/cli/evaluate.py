"""`evaluate.py --checkpoint F --data.root D`: score a detector on a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msdetr.cli.cpu_runtime import keep_freed_memory, tune_cpu_environment
from msdetr.cli.options import configure_logging, option_value, parse_options, user_errors
from msdetr.config import DataConfig, EvalConfig

if TYPE_CHECKING:
    from msdetr.annotations.labels import LabelMap
    from msdetr.engine.distributed import Worker
    from msdetr.engine.pretrained import LoadedDetector
    from msdetr.evaluation.coco_metrics import CocoResult

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a detector on the validation images of a data set, with COCO metrics.

    Options of data and evaluation default to those that the detector was trained with.
    """

    checkpoint: Path
    """A checkpoint or weights file of a run, or a checkpoint of the published code."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """From predictions to scored detections."""
    output: Path | None = None
    """Folder for results.json and metrics.json (default: `evaluation` beside the checkpoint)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` computes matrix products under autocast."""


def main(arguments: Sequence[str] | None = None, *, prog: str = "msdetr evaluate") -> int:
    """Evaluate, print the tables, write the results, and return the exit status."""
    tune_cpu_environment()
    options, detector = _parse(sys.argv[1:] if arguments is None else list(arguments), prog)
    from msdetr.engine.distributed import worker_from_environment

    with contextlib.ExitStack() as stack:
        with user_errors():
            worker = stack.enter_context(worker_from_environment(options.device))
            configure_logging(is_main=worker.is_main)
            if worker.device.type == "cpu":
                keep_freed_memory()
        result = run(options, detector, worker)
    if result is not None:
        print(f"\n{result.per_class_table()}\n\n{result.table()}")
    return 0


def run(options: EvaluateOptions, detector: LoadedDetector, worker: Worker) -> CocoResult | None:
    """Evaluate and write the results; the scores on rank 0, None elsewhere."""
    from msdetr.data.dataset import build_dataset
    from msdetr.data.loader import build_eval_loader
    from msdetr.engine.evaluate import evaluate_detector
    from msdetr.evaluation.coco_eval import CocoEvaluator

    with user_errors():
        dataset = build_dataset(options.data, "val", label_map=detector.label_map)
        label_map = dataset.annotations.label_map
        table = dataset.annotations.table
        _check_labels(label_map, detector, table.source)
        evaluator = CocoEvaluator(table, label_map)
    config = dataclasses.replace(detector.config, data=options.data, eval=options.eval)
    loader = build_eval_loader(config, dataset, rank=worker.rank, world_size=worker.world_size)
    model = detector.model.to(worker.device)
    result = evaluate_detector(
        model, loader, evaluator, options.eval, worker, precision=options.precision
    )
    if result is not None:
        output = options.output or options.checkpoint.parent / "evaluation"
        output.mkdir(parents=True, exist_ok=True)
        evaluator.write_results(output / RESULTS_FILE)
        row = {"checkpoint": str(options.checkpoint), "annotations": str(table.source)}
        text = json.dumps(row | result.to_dict(), indent=2)
        (output / METRICS_FILE).write_text(text + "\n")
        logger.info("wrote %s and %s", output / RESULTS_FILE, output / METRICS_FILE)
    return result


def _parse(arguments: list[str], prog: str) -> tuple[EvaluateOptions, LoadedDetector]:
    checkpoint = option_value(arguments, "--checkpoint")
    if checkpoint is None or not {"-h", "--help"}.isdisjoint(arguments):
        parse_options(EvaluateOptions, arguments, prog=prog)  # Prints the help or an error.
        raise SystemExit(0)
    from msdetr.engine.pretrained import load_detector

    with user_errors():
        detector = load_detector(Path(checkpoint))
    default = EvaluateOptions(
        checkpoint=Path(checkpoint),
        data=_evaluation_data(detector),
        eval=detector.config.eval,
    )
    return parse_options(EvaluateOptions, arguments, prog=prog, default=default), detector


def _check_labels(label_map: LabelMap, detector: LoadedDetector, annotation_file: Path) -> None:
    num_classes = detector.config.model.num_classes
    assert num_classes is not None
    if max(label_map.labels) >= num_classes:
        raise ValueError(
            f"{annotation_file}: its labels go up to {max(label_map.labels)}, but the detector has "
            f"{num_classes} classes; see --data.label-layout"
        )


def _evaluation_data(detector: LoadedDetector) -> DataConfig:
    """How the detector's images are prepared; the command line says where they are."""
    data = dataclasses.replace(
        detector.config.data,
        root=None,
        train_images=None,
        train_annotations=None,
        val_images=None,
        val_annotations=None,
    )
    # Published checkpoints do not name their classes: labels are the category ids.
    return data if detector.label_map else dataclasses.replace(data, label_layout="coco")
