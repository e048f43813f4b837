"""One training step, ours and the published code's: `python -m benchmarks.bench_train_step`.

A step is forward, criterion, backward, and the update (clipping and AdamW), on random images and
targets that are on the device already. Each implementation has a process of its own, so that
neither sees the other's imports or memory, and they take turns step by step, so that what else
the machine does hits both.

What the published code (`--published DIR`) is spared, in its favour: normalising the images, which
its data loader does and our model does within the step; and the logging of its `engine.py`, which
reads some 90 scalars from the device. What its criterion reads and computes only for the log
(`class_error`, `cardinality_error`) is part of the criterion and is timed with it. It runs without
its CUDA extension, on the PyTorch attention that it ships for tests.

Before anything is timed, both must compute the same losses from the same weights and inputs.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.common import (
    PhaseTimer,
    Row,
    environment,
    peak_memory_mb,
    print_table,
    write_rows,
)
from benchmarks.published_code import build_published, by_published_name, published_groups
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import RunConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.engine.device import resolve_device, to_device
from msdetr.engine.optimizer import build_optimizer, clip_gradients
from msdetr.losses.criterion import Criterion
from msdetr.model.checkpoint_adapter import load_state, published_to_ours
from msdetr.model.detector import PIXEL_MEAN, PIXEL_STD, build_detector
from msdetr.presets import PRESETS
from msdetr.structures import Batch

P = ParamSpec("P")
T = TypeVar("T")

OURS = "msdetr"
PUBLISHED = "published, PyTorch attention"
NUM_CLASSES = 91
"""Of COCO, for which the recipes are."""
LOSS_TOLERANCE = 1e-3
"""Relative difference of a loss above which the implementations do not compute the same."""
PHASES = ("forward", "criterion", "backward", "optimizer")

_COLUMNS = {
    "implementation": "",
    "step_seconds_p50": ".3f",
    "step_seconds_best": ".3f",
    **{f"{phase}_seconds": ".3f" for phase in PHASES},
    "images_per_second": ".3f",
    "peak_memory_mb": ".0f",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one training step, ours and the published code's."""

    preset: str = "ms-detr-r50-300"
    """Recipe, by name."""
    batch: int = 2
    """Images per step."""
    height: int = 480
    """Image height in pixels."""
    width: int = 640
    """Image width in pixels."""
    num_targets: int = 7
    """Boxes per image (COCO has 7.3 on average)."""
    steps: int = 3
    """Measured steps of each implementation."""
    warmup: int = 1
    """Steps before the measured ones."""
    published: Path | None = None
    """Folder of the published code; it is then measured as well."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    seed: int = 0
    """Seed of weights, images, targets and dropout."""
    output: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r}: known are {', '.join(PRESETS)}")
        for name in ("batch", "height", "width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_targets", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.published is not None and not (self.published / "models").is_dir():
            raise ValueError(f"published: {self.published} has no package `models`")

    @property
    def config(self) -> RunConfig:
        """The recipe, for COCO's classes."""
        config = PRESETS[self.preset].config
        return replace(config, model=replace(config.model, num_classes=NUM_CLASSES))


def random_batch(options: Options) -> Batch:
    """Noise images of one size with random boxes, on the CPU; a function of the options alone."""
    generator = torch.Generator().manual_seed(options.seed)
    size = (options.height, options.width)
    samples = []
    for image_id in range(options.batch):
        sides = torch.rand(options.num_targets, 2, generator=generator) * 0.45 + 0.05
        centers = sides / 2 + torch.rand(sides.shape, generator=generator) * (1.0 - sides)
        samples.append(
            Sample(
                torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
                torch.randint(NUM_CLASSES, (options.num_targets,), generator=generator),
                torch.cat((centers, sides), dim=1),
                image_id,
                size,
            )
        )
    # Not padded: both then compute on images of one and the same size.
    return Collate(pad_multiple=1, target_buckets=options.config.data.target_buckets)(samples)


class TrainStep(ABC):
    """A model, its criterion and its optimizer, on one batch."""

    model: nn.Module

    @abstractmethod
    def _forward(self) -> Any:
        """The model's output."""

    @abstractmethod
    def _compute_losses(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and the unweighted ones under their published names."""

    @abstractmethod
    def _backward(self, total: Tensor) -> None:
        """Gradients of the total loss."""

    @abstractmethod
    def _update(self) -> None:
        """Clip the gradients, and let the optimizer step."""

    def losses(self) -> dict[str, float]:
        """All losses of the batch, without dropout."""
        with torch.no_grad(), _without_dropout(self.model):
            total, terms = self._compute_losses(self._forward())
        return {name: float(value) for name, value in {"total": total, **terms}.items()}

    def run(self, timer: PhaseTimer) -> dict[str, float]:
        """Take a step; seconds of each of `PHASES`."""
        timer.start()
        output = self._forward()
        timer.lap("forward")
        total, _ = self._compute_losses(output)
        timer.lap("criterion")
        self._backward(total)
        timer.lap("backward")
        self._update()
        timer.lap("optimizer")
        return timer.seconds()


class OurStep(TrainStep):
    """The step of `msdetr.engine.trainer`, without its data and its log."""

    def __init__(self, options: Options, weights: Path | None, device: torch.device) -> None:
        config = options.config
        torch.manual_seed(options.seed)
        model = build_detector(config.model, initialize_backbone=False)
        if weights is not None:
            published = torch.load(weights, map_location="cpu", weights_only=True)
            load_state(model, published_to_ours(published, config.model))
        self.model = model.to(device).train()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_norm = config.optimizer.clip_grad_norm
        self._optimizer = build_optimizer(model, config.optimizer)
        self._criterion = Criterion(config.assignment, config.loss)
        self._generator = torch.Generator(device).manual_seed(options.seed)
        self._batch = to_device(random_batch(options), device)

    def _forward(self) -> Any:
        return self.model(self._batch.images)

    def _compute_losses(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = self._criterion(output, self._batch.targets, generator=self._generator)
        return total, by_published_name(terms)

    def _backward(self, total: Tensor) -> None:
        total.backward()

    def _update(self) -> None:
        clip_gradients(self._parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class PublishedStep(TrainStep):
    """The step of the published `engine.py`, without its data and its log."""

    def __init__(self, options: Options, weights: Path, device: torch.device) -> None:
        assert options.published is not None
        torch.manual_seed(options.seed)
        args, model, self._criterion = build_published(options.published, options.config, device)
        torch.save(model.state_dict(), weights)
        self.model = model.to(device).train()
        self._criterion.train()
        self._max_norm = args.clip_max_norm
        self._optimizer = torch.optim.AdamW(
            published_groups(model, args), lr=args.lr, weight_decay=args.weight_decay
        )
        batch = to_device(random_batch(options), device)
        mean, std = (
            torch.tensor(value, device=device)[:, None, None] for value in (PIXEL_MEAN, PIXEL_STD)
        )
        images = list((batch.images.pixels / 255.0 - mean) / std)
        self._samples = importlib.import_module("util.misc").nested_tensor_from_tensor_list(images)
        self._targets = [
            {"labels": labels[:count], "boxes": boxes[:count]}
            for labels, boxes, count in zip(
                batch.targets.labels, batch.targets.boxes, batch.targets.count.tolist(), strict=True
            )
        ]

    def _forward(self) -> Any:
        return self.model(self._samples)

    def _compute_losses(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._criterion(output, self._targets)
        weights = self._criterion.weight_dict
        total = sum(value * weights[name] for name, value in losses.items() if name in weights)
        return total, {name: value for name, value in losses.items() if name.startswith("loss_")}

    def _backward(self, total: Tensor) -> None:
        self._optimizer.zero_grad()
        total.backward()

    def _update(self) -> None:
        if self._max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        self._optimizer.step()


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    # `p` of nn.Dropout, `dropout` of attention modules.
    rates = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("p", "dropout")
        if isinstance(getattr(module, name, None), float)
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    yield
    for module, name, rate in rates:
        setattr(module, name, rate)


class Worker(contextlib.AbstractContextManager["Worker"]):
    """One implementation in a process of its own, which ends with the context."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function, called there."""
        return self._process.submit(function, *args, **kwargs).result()


_step: TrainStep
"""The step of a worker's process."""
_device: torch.device


def _build_step(implementation: str, options: Options, weights: Path | None) -> None:
    global _step, _device
    _device = resolve_device(options.device)
    if implementation == OURS:
        _step = OurStep(options, weights, _device)
    else:
        assert weights is not None
        _step = PublishedStep(options, weights, _device)


def _losses() -> dict[str, float]:
    return _step.losses()


def _run_step() -> dict[str, float]:
    return _step.run(PhaseTimer(_device))


def _circumstances() -> Row:
    return {"peak_memory_mb": peak_memory_mb(_device), **environment(_device)}


def check_same_losses(ours: dict[str, float], published: dict[str, float]) -> float:
    """The largest relative difference of a loss.

    Raises:
        ValueError: it is above `LOSS_TOLERANCE`, or one side has losses that the other lacks.
    """
    if ours.keys() != published.keys():
        raise ValueError(f"losses of one side only: {sorted(ours.keys() ^ published.keys())}")
    difference = {
        name: abs(value - published[name]) / max(abs(published[name]), 1e-12)
        for name, value in ours.items()
    }
    # Not `<=`, which NaN would pass.
    wrong = [name for name, value in difference.items() if not value < LOSS_TOLERANCE]
    if wrong:
        raise ValueError(
            "nothing is reported, because the losses differ: "
            + ", ".join(f"{name} {ours[name]:.6g} and {published[name]:.6g}" for name in wrong)
        )
    return max(difference.values())


def measure(options: Options) -> list[Row]:
    """A row per implementation, ours first.

    Raises:
        ValueError: the published code cannot run the recipe, or computes other losses.
    """
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker(OURS))
        workers = [ours]
        if options.published is None:
            ours.call(_build_step, OURS, options, None)
        else:
            published = stack.enter_context(Worker(PUBLISHED))
            workers.append(published)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            weights = Path(folder) / "weights.pth"
            # The published code goes first: its initial weights are those of both.
            for worker in (published, ours):
                worker.call(_build_step, worker.implementation, options, weights)
            difference = check_same_losses(ours.call(_losses), published.call(_losses))
            print(f"losses agree to {difference:.1e}, relative")
        steps: dict[str, list[dict[str, float]]] = {w.implementation: [] for w in workers}
        for _ in range(options.warmup + options.steps):
            for worker in workers:
                steps[worker.implementation].append(worker.call(_run_step))
        return [
            _row(options, worker, steps[worker.implementation][options.warmup :])
            for worker in workers
        ]


def _row(options: Options, worker: Worker, steps: list[dict[str, float]]) -> Row:
    totals = [sum(step.values()) for step in steps]
    median = statistics.median(totals)
    return {
        "benchmark": "train_step",
        "preset": options.preset,
        "implementation": worker.implementation,
        "dtype": "float32",
        "batch": options.batch,
        "height": options.height,
        "width": options.width,
        "images_per_second": options.batch / median,
        "step_seconds_p50": median,
        "step_seconds_best": min(totals),
        **{
            f"{phase}_seconds": statistics.median(step[phase] for step in steps) for phase in PHASES
        },
        **worker.call(_circumstances),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.bench_train_step")
        rows = measure(options)
    print_table(rows, _COLUMNS)
    if len(rows) == 2:
        ours, published = (row["step_seconds_p50"] for row in rows)
        print(f"ours / published: {ours / published:.3f} of the step time (p50)")
    if options.output is not None:
        write_rows(options.output, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
