"""Images per second of the training loader: `python -m benchmarks.loader`.

The recipe's augmentation (flip, multi-scale, random crop) on JPEG files of a data set in COCO
layout, or on generated files of COCO's sizes: stage by stage in one process with one thread, then
the whole loader, with and without worker processes. Each implementation runs in a process of its
own, and they take turns, round by round.

`images_per_second_per_core` is based on processor time, workers included, so other load on the
machine affects it only through caches; `images_per_second` is based on wall time. `cores_per_gpu`
is the number of cores for a GPU that trains `--step-rate` images/s. Peak memory is resident memory,
of the process and of its largest worker; shared pages count in each.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import PIL
import PIL.features
import torch
import torchvision

from benchmarks.cli import require_at_least, require_known
from benchmarks.common import Row, environment, peak_memory_mb, print_table, write_rows
from benchmarks.loader.pipelines import (
    IMPLEMENTATIONS,
    OURS,
    Pipeline,
    Source,
    build_pipeline,
    generate_data_set,
)
from benchmarks.processes import Worker
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import DataConfig
from msdetr.data.paths import resolve_split

MIN_RATE = 45.0
"""Images per second and core of the whole recipe, for `--check`."""

_COLUMNS = (
    "implementation stage workers cpu_ms_per_image:.2f images_per_second_per_core:.1f "
    "images_per_second:.1f cores_per_gpu:.2f peak_memory_mb:.0f worker_peak_memory_mb:.0f"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the training loader and its peers."""

    root: Path | None = None
    """Data set in COCO layout, whose training images are used. By default, images are generated."""
    images: int = 256
    """Samples per round; a smaller data set is repeated."""
    rounds: int = 3
    """Rounds of each implementation; rows hold the median."""
    batch: int = 2
    """Images per batch."""
    workers: int = 2
    """Worker processes of the loader, after it ran without any."""
    step_rate: float = 40.0
    """Images per second that a GPU trains."""
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    """Which to measure."""
    check: bool = False
    """Fail if ours loads less than 45 images/s per core, or less than a peer."""
    output: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images", "rounds", "batch", "workers")
        require_known("implementation", self.implementations, IMPLEMENTATIONS)
        if self.images < self.batch:
            raise ValueError(f"images ({self.images}) must be at least the batch ({self.batch})")
        if self.step_rate <= 0:
            raise ValueError(f"step_rate must be positive, got {self.step_rate}")


@contextlib.contextmanager
def data_source(options: Options) -> Iterator[Source]:
    """The data set, repeated up to `options.images` images.

    Raises:
        ValueError: there are no data in `options.root`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.root is None:
            images, content = folder, generate_data_set(folder, min(options.images, 64))
        else:
            images, file = resolve_split(DataConfig(root=options.root), "train")
            content = json.loads(file.read_bytes())
        annotations = folder / "annotations.json"
        annotations.write_text(json.dumps(_repeat(content, options.images)))
        yield Source(images, annotations, options.batch)


def _repeat(content: dict[str, Any], count: int) -> dict[str, Any]:
    """An annotation file of `count` images: those of `content`, repeated."""
    boxes = defaultdict(list)
    for annotation in content["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position in range(count):
        image = content["images"][position % len(content["images"])]
        images.append({**image, "id": position})
        for annotation in boxes[image["id"]]:
            annotations.append({**annotation, "id": len(annotations), "image_id": position})
    return {**content, "images": images, "annotations": annotations}


_pipeline: Pipeline
"""The pipeline of a worker's process."""

Times = dict[tuple[str, int], tuple[float, float]]
"""By stage and number of loader processes: wall and processor seconds per image."""


def _build(implementation: str, source: Source) -> None:
    global _pipeline
    torch.set_num_threads(1)
    # The default of a main program.
    multiprocessing.set_start_method("fork", force=True)
    _pipeline = build_pipeline(implementation, source)
    for _ in _pipeline.loader(0, 0):  # fills caches
        pass


def _run_stages(epoch: int, batch: int) -> Times:
    pipeline = _pipeline
    laps: dict[str, list[tuple[float, float]]] = defaultdict(list)
    num_images = pipeline.num_images // batch * batch
    samples: list[Any] = []
    for position in range(num_images):
        marks = [_now()]
        decoded = pipeline.decode(epoch, position)
        marks.append(_now())
        samples.append(pipeline.augment(decoded))
        marks.append(_now())
        if len(samples) == batch:
            pipeline.collate(samples)
            samples = []
        marks.append(_now())
        for stage, begin, end in zip(_STAGES, marks, marks[1:], strict=False):
            laps[stage].append((end[0] - begin[0], end[1] - begin[1]))
    return {
        (stage, 0): (fmean(wall for wall, _ in times), fmean(cpu for _, cpu in times))
        for stage, times in laps.items()
    }


_STAGES = ("decode", "augment", "collate")


def _run_whole(epoch: int, batch: int, num_workers: int) -> Times:
    """The whole loader; its worker processes start and end within the measurement."""
    num_images = 0
    begin = _now()
    children = _children_seconds()
    for _ in _pipeline.loader(epoch, num_workers):
        num_images += batch
    end = _now()
    cpu = end[1] - begin[1] + _children_seconds() - children
    return {("whole", num_workers): ((end[0] - begin[0]) / num_images, cpu / num_images)}


def _now() -> tuple[float, float]:
    """Wall and processor seconds of this process."""
    return time.perf_counter(), time.process_time()


def _children_seconds() -> float:
    """Processor seconds of the finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _environment() -> Row:
    device = torch.device("cpu")
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    return {
        "peak_memory_mb": peak_memory_mb(device),
        "worker_peak_memory_mb": largest_child,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "libjpeg_turbo": PIL.features.version("libjpeg_turbo"),
        **environment(device),
    }


def measure(options: Options) -> list[Row]:
    """A row per implementation and stage.

    Raises:
        ValueError: the data are missing or broken.
    """
    times: dict[str, dict[tuple[str, int], list[tuple[float, float]]]] = {}
    with data_source(options) as source, contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in options.implementations}
        for name, worker in workers.items():
            times[name] = defaultdict(list)
            worker.call(_build, name, source)
        for epoch in range(1, options.rounds + 1):
            for name, worker in workers.items():
                for key, seconds in _round(worker, epoch, options).items():
                    times[name][key].append(seconds)
        environments = {name: worker.call(_environment) for name, worker in workers.items()}
    return [
        _row(name, key, seconds, options, environments[name])
        for name, measured in times.items()
        for key, seconds in measured.items()
    ]


def _round(worker: Worker, epoch: int, options: Options) -> Times:
    times = worker.call(_run_stages, epoch, options.batch)
    for num_workers in (0, options.workers):
        times |= worker.call(_run_whole, epoch, options.batch, num_workers)
    return times


def _row(
    name: str,
    key: tuple[str, int],
    seconds: list[tuple[float, float]],
    options: Options,
    environment_of_worker: Row,
) -> Row:
    stage, num_workers = key
    wall, cpu = (median(column) for column in zip(*seconds, strict=True))
    row = {
        "benchmark": "loader",
        "implementation": name,
        "stage": stage,
        "workers": num_workers,
        "data": "generated" if options.root is None else options.root.name,
        "batch": options.batch,
        "images": options.images,
        "rounds": options.rounds,
        "cpu_ms_per_image": 1e3 * cpu,
        "images_per_second_per_core": 1 / cpu,
        "images_per_second": 1 / wall,
        "step_rate": options.step_rate,
        "cores_per_gpu": options.step_rate * cpu,
        **environment_of_worker,
    }
    if not num_workers:
        row["worker_peak_memory_mb"] = None
    return row


def find_failures(rows: Sequence[Row]) -> list[str]:
    """Cases in which our whole loader is slower than `MIN_RATE` or than a peer."""
    whole = [row for row in rows if row["stage"] == "whole"]
    failures = []
    for ours in (row for row in whole if row["implementation"] == OURS):
        rate, workers = ours["images_per_second_per_core"], ours["workers"]
        limits = {
            row["implementation"]: row["images_per_second_per_core"]
            for row in whole
            if row["workers"] == workers and not row["implementation"].startswith(OURS)
        }
        for name, limit in {"the goal": MIN_RATE, **limits}.items():
            if not rate >= limit:
                failures.append(
                    f"{workers} workers: {rate:.1f} images/s per core, {name} {limit:.1f}"
                )
    return failures


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if `--check` fails."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.loader")
        rows = measure(options)
        if options.output is not None:
            write_rows(options.output, rows)
    print_table(rows, _COLUMNS)
    failures = find_failures(rows) if options.check else []
    for failure in failures:
        print(failure)
    return 1 if failures else 0
