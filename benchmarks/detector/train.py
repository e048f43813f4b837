"""A training step of each implementation: `python -m benchmarks.detector train`.

A step is forward, criterion, backward, and the update (clipping and AdamW), on random images and
targets that are on the device already. Ours is `Trainer.train_step` itself. `comparison` explains
how implementations are compared, and `implementations` lists them. docs/design/benchmarks.md
explains the fields of a row.

Two things are left out in favour of the others. Their images are normalised beforehand, as their
data loaders do it; our model normalises within the step. The logging of the published `engine.py`,
which reads some 90 scalars from the device, is skipped. The published criterion computes
`class_error` and `cardinality_error` for its log; they are part of the criterion and are timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.cli import require_at_least
from benchmarks.detector.cases import random_batch
from benchmarks.detector.comparison import (
    ComparisonOptions,
    Durations,
    Setup,
    Subject,
    collect,
    compare,
    print_rows,
    too_slow,
)
from benchmarks.detector.hugging_face import build_hugging_face, hugging_face_images
from benchmarks.detector.implementations import COMPILED, is_published
from benchmarks.detector.published import (
    build_published,
    by_published_name,
    published_groups,
    published_images,
)
from benchmarks.device_time import PhaseTimer
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import CompileConfig, RunConfig
from msdetr.data.dataset import DetectionDataset
from msdetr.engine.compile import explain_compile_errors
from msdetr.engine.device import autocast, to_device
from msdetr.engine.distributed import Worker
from msdetr.engine.prefetch import StepInput
from msdetr.engine.trainer import Trainer
from msdetr.model.attention import MSDeformAttn
from msdetr.model.checkpoint_adapter import load_state, published_to_ours
from msdetr.model.detector import Detector, build_detector
from msdetr.ops.dispatch import Impl
from msdetr.structures import Batch, TargetCount

PHASES = ("forward", "criterion", "backward", "forward_backward", "optimizer")
"""Parts of a step. `forward` is everything before the criterion; `optimizer` is clipping and the
update. A step that replays a CUDA graph has `forward_backward` instead of the first three."""

MIN_SPEEDUP = 1.5
"""Over the published code, for `--check`."""


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time a training step: ours in its variants, the published code's, Hugging Face's."""

    steps: int = 3
    """Measured steps of each implementation."""
    check: bool = False
    """Exit with 1 unless the fastest of ours is 1.5 times as fast as the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "steps")


class TrainStep(Subject):
    """A model, its criterion and its optimizer, on one batch."""

    training = True
    model: nn.Module

    def __init__(self, setup: Setup) -> None:
        """No call is timed before `run`."""
        super().__init__(setup)
        self._timer: PhaseTimer | None = None

    def lap(self, phase: str) -> None:
        """End a phase of a call, if it is timed."""
        if self._timer is not None:
            self._timer.lap(phase)

    def run(self, repetitions: int) -> list[Durations]:
        """Durations of consecutive steps."""
        timers = []
        for repetition in range(repetitions):
            timer = self._timer = PhaseTimer(self.setup.device)
            # Later steps do not wait for the device, so that the host may run ahead.
            timer.start(wait=repetition == 0)
            self.call()
            timer.lap("rest")
            timers.append(timer)
        self._timer = None
        steps = [timer.seconds() for timer in timers]
        return [{"total": sum(step.values()), **step} for step in steps]


class _NoImages:
    """Replaces a data set: nothing is loaded from it."""

    annotations = SimpleNamespace(label_map=None)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def build_trainer(config: RunConfig, device: torch.device) -> Trainer:
    """A trainer with initial weights of its seed, and without data."""
    torch.manual_seed(config.seed)
    model = build_detector(config.model, initialize_backbone=False).to(device)
    data = cast(DetectionDataset, _NoImages(config.train.batch_size))
    return Trainer(config, model, data, None, Worker(device=device))


def choose_attention(model: Detector, impl: Impl) -> None:
    """Set the implementation of all deformable attention of a detector."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.impl = impl


def impl_of(implementation: str) -> Impl:
    """The ops that an implementation of ours uses."""
    return "reference" if implementation == "eager-reference" else "auto"


def load_published_weights(model: Detector, setup: Setup) -> None:
    """Load the initial weights of the published model, if that is measured too."""
    if setup.weights.is_file():
        published = torch.load(setup.weights, map_location="cpu", weights_only=True)
        load_state(model, published_to_ours(published, setup.case.config.model))


class OurStep(TrainStep):
    """`Trainer.train_step`, unchanged."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        compiles = setup.implementation in COMPILED
        compiling = CompileConfig(
            mode="on" if compiles else "off",
            cuda_graphs=setup.implementation == "compiled-graphs",
        )
        self.trainer = build_trainer(replace(setup.case.config, compile=compiling), setup.device)
        self.trainer.criterion.impl = impl = impl_of(setup.implementation)
        choose_attention(self.trainer.model, impl)
        self.model = self.trainer.model
        load_published_weights(self.trainer.model, setup)
        host = random_batch(setup.case)
        self._input = StepInput([host], [to_device(host, setup.device)])
        self._time_phases()

    def _time_phases(self) -> None:
        trainer = self.trainer
        if trainer.graphs is None:
            trainer.distributed_model.register_forward_hook(lambda *_: self.lap("forward"))
            trainer.criterion.register_forward_hook(lambda *_: self.lap("criterion"))
        owner: Any = trainer if trainer.graphs is None else trainer.graphs
        update = owner.update
        before = "backward" if trainer.graphs is None else "forward_backward"

        def timed_update() -> Tensor:
            self.lap(before)
            norm: Tensor = update()
            self.lap("optimizer")
            return norm

        owner.update = timed_update

    @property
    def batch(self) -> Batch:
        """On the device."""
        (batch,) = self._input.device
        return batch

    def call(self) -> None:
        """The trainer's."""
        self.trainer.train_step(self._input)

    def values(self) -> dict[str, float]:
        """All losses by their published names, without dropout.

        In bfloat16: the total of a first step of the code that is timed next, with dropout.
        """
        if self.setup.case.dtype == "float32":
            return self._losses()
        self.call()
        return {"total": self.trainer.meter.read()["loss"]}

    def _losses(self) -> dict[str, float]:
        trainer, batch = self.trainer, self.batch
        with without_dropout(self.model), explain_compile_errors():
            total, terms = trainer.forward_backward(
                batch, TargetCount(*[batch.targets.count.sum()] * 2)
            )
        trainer.optimizer.zero_grad(set_to_none=trainer.graphs is None)
        return _as_floats({"total": total, **by_published_name(terms)})


class PublishedStep(TrainStep):
    """The step of the published `engine.py`, without its data and its log."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.published is not None
        case, device = setup.case, setup.device
        torch.manual_seed(case.seed)
        args, model, self._criterion, _ = build_published(setup.published, case.config, device)
        torch.save(model.state_dict(), setup.weights)
        self.model = model.to(device).train()
        self._criterion.train()
        self._max_norm = args.clip_max_norm
        self._optimizer = torch.optim.AdamW(
            published_groups(model, args), lr=args.lr, weight_decay=args.weight_decay
        )
        batch = to_device(random_batch(case), device)
        self._samples = published_images(batch.images)
        self._targets = targets_per_image(batch, labels="labels")

    def values(self) -> dict[str, float]:
        """All losses, without dropout."""
        with torch.no_grad(), without_dropout(self.model):
            total, losses = self._compute_losses()
        terms = {name: value for name, value in losses.items() if name.startswith("loss_")}
        return _as_floats({"total": total, **terms})

    def _compute_losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.model(self._samples)
        self.lap("forward")
        losses = self._criterion(output, self._targets)
        weights = self._criterion.weight_dict
        total = sum(value * weights[name] for name, value in losses.items() if name in weights)
        self.lap("criterion")
        return total, losses

    def call(self) -> None:
        """The operations of the published loop, in its order."""
        total, _ = self._compute_losses()
        self._optimizer.zero_grad()
        total.backward()
        self.lap("backward")
        if self._max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        self._optimizer.step()
        self.lap("optimizer")


class HuggingFaceStep(TrainStep):
    """A step of Deformable-DETR of `transformers`, with its loss and the recipe's optimizer."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        case, device, config = setup.case, setup.device, setup.case.config
        torch.manual_seed(case.seed)
        model: Any = build_hugging_face(config.model, config.loss).to(device).train()
        self.model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_norm = config.optimizer.clip_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        batch = to_device(random_batch(case), device)
        self._pixels, self._mask = hugging_face_images(batch.images)
        self._labels = targets_per_image(batch, labels="class_labels")
        loss_function = model.loss_function

        def timed_loss(*args: Any, **kwargs: Any) -> Any:
            self.lap("forward")
            return loss_function(*args, **kwargs)

        model.loss_function = timed_loss

    def values(self) -> None:
        """None: it is another model, with other weights."""

    def call(self) -> None:
        """Forward with its loss inside, backward, clipping, AdamW."""
        self._optimizer.zero_grad()
        with autocast(self.setup.device, self.setup.case.dtype):
            output = self.model(self._pixels, pixel_mask=self._mask, labels=self._labels)
        self.lap("criterion")
        output.loss.backward()
        self.lap("backward")
        nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self.lap("optimizer")


def build_step(setup: Setup) -> Subject:
    """The step of an implementation, for its process."""
    if is_published(setup.implementation):
        return PublishedStep(setup)
    return (HuggingFaceStep if setup.implementation == "huggingface" else OurStep)(setup)


def targets_per_image(batch: Batch, *, labels: str) -> list[dict[str, Tensor]]:
    """Targets for the other implementations: a dictionary per image, without padding."""
    return [
        {labels: classes[:count], "boxes": boxes[:count]}
        for classes, boxes, count in zip(
            batch.targets.labels, batch.targets.boxes, batch.targets.count.tolist(), strict=True
        )
    ]


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Disable all dropout of a model."""
    # nn.Dropout has `p`, attention modules have `dropout`.
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


def _as_floats(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if `--check` fails."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector train")
        rows = compare(
            options.cases,
            options,
            build_step,
            benchmark="train_step",
            phases=PHASES,
            repetitions=options.steps,
        )
        results = collect(rows, options.output)
    print_rows(results, PHASES)
    failures = too_slow(results, MIN_SPEEDUP) if options.check else []
    for failure in failures:
        print(f"too slow: {failure}")
    return 1 if failures else 0
