"""Inference of each implementation: `python -m benchmarks.detector inference`.

A pass is the model and its post-processing: from pixels on the device to detections there, 100 per
image, without suppression. Each implementation post-processes with its own code. The others get
normalised images; ours normalises within the pass. The latency is that of a pass that the host
waits for. On a GPU, `images_per_second` is measured over passes that follow each other without
waiting. On a CPU it is the batch size divided by the latency. docs/design/benchmarks.md explains
the fields of a row.
"""

from __future__ import annotations

import importlib
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cli import require_at_least
from benchmarks.common import Row
from benchmarks.detector.cases import random_batch
from benchmarks.detector.comparison import (
    ComparisonOptions,
    Durations,
    Setup,
    Subject,
    collect,
    compare,
    print_rows,
)
from benchmarks.detector.hugging_face import build_hugging_face, hugging_face_images
from benchmarks.detector.implementations import COMPILED, is_published
from benchmarks.detector.published import build_published, published_images
from benchmarks.detector.train import choose_attention, impl_of, load_published_weights
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.compile import compile_step, explain_compile_errors
from msdetr.engine.cuda_graphs import CudaCapture, Replay
from msdetr.engine.device import autocast, to_device
from msdetr.evaluation.postprocess import postprocess
from msdetr.model.detector import build_detector
from msdetr.supervision.criterion import Criterion

MAX_DETECTIONS = 100
_COMPARED = 10
"""Number of best scores of the first image in which implementations must agree."""


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Time inference: ours in its variants, the published code's, Hugging Face's."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Images at once."""
    passes: int = 10
    """Measured passes of each implementation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "passes")


class InferencePass(Subject):
    """A model in evaluation mode and its post-processing, on one batch."""

    training = False

    def __init__(self, setup: Setup) -> None:
        """The throughput is unknown before `run`."""
        super().__init__(setup)
        self._seconds_back_to_back: float | None = None

    @abstractmethod
    def scores(self) -> Tensor:
        """Run the pass; the scores [D] of the first image, best first, on the device."""

    @torch.no_grad()
    def call(self) -> Tensor:
        """The pass."""
        return self.scores()

    def values(self) -> dict[str, float] | None:
        """The best scores of the first image."""
        best = self.call()[:_COMPARED].tolist()
        return {f"score {rank}": score for rank, score in enumerate(best, start=1)}

    def run(self, repetitions: int) -> list[Durations]:
        """Passes that the host waits for, each; on a GPU then as many that it does not."""
        durations = []
        for _ in range(repetitions):
            begin = time.perf_counter()
            self.call()
            self._wait()
            durations.append({"total": time.perf_counter() - begin})
        if self.setup.device.type == "cuda":
            begin = time.perf_counter()
            for _ in range(repetitions):
                self.call()
            self._wait()
            self._seconds_back_to_back = (time.perf_counter() - begin) / repetitions
        return durations

    def facts(self, seconds: float) -> Row:
        """Throughput and shares of time refer to passes that the host does not wait for."""
        per_pass = self._seconds_back_to_back or seconds
        rate = {"images_per_second": self.setup.case.batch / per_pass}
        return rate | super().facts(per_pass)

    def _wait(self) -> None:
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize(self.setup.device)


class OurPass(InferencePass):
    """The pass of `msdetr.engine.evaluate`; compiled and captured on request."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.case.config
        self._nms_iou_threshold = config.eval.nms_iou_threshold
        if self._nms_iou_threshold is not None and setup.implementation == "compiled-graphs":
            raise ValueError(
                f"{setup.case.preset} suppresses overlapping detections, whose number the host "
                "reads: it cannot be captured as a CUDA graph"
            )
        torch.manual_seed(setup.case.seed)
        self.model = build_detector(config.model, initialize_backbone=False)
        load_published_weights(self.model, setup)
        self.model.to(setup.device).eval()
        choose_attention(self.model, impl_of(setup.implementation))
        if setup.implementation in COMPILED:
            # The criterion is compiled when it first runs, which is never here.
            compile_step(self.model, Criterion(config.assignment, config.loss))
        self._given = to_device(random_batch(setup.case), setup.device)
        self._batch = to_device(random_batch(setup.case), setup.device)
        self._captured: tuple[Replay, Tensor] | None = None

    def scores(self) -> Tensor:
        """Run eagerly, or replay the captured pass on a copy of the batch."""
        if self.setup.implementation != "compiled-graphs":
            return self._detect()
        for tensor, value in zip(self._batch.images, self._given.images, strict=True):
            tensor.copy_(value)
        if self._captured is None:
            self._captured = self._capture()
        replay, scores = self._captured
        replay()
        return scores

    def _detect(self) -> Tensor:
        with autocast(self.setup.device, self.setup.case.dtype), explain_compile_errors():
            output = self.model(self._batch.images)
        detections = postprocess(
            output.one_to_one,
            self._batch.original_sizes,
            max_detections=MAX_DETECTIONS,
            nms_iou_threshold=self._nms_iou_threshold,
        )
        return detections.scores[0]

    def _capture(self) -> tuple[Replay, Tensor]:
        device = self.setup.device
        for _ in range(2):  # compile, allocate and choose before the capture
            self._detect()
        return CudaCapture(device, torch.Generator(device))(self._detect)


class PublishedPass(InferencePass):
    """The pass of the published evaluation."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.published is not None
        torch.manual_seed(setup.case.seed)
        _, model, _, self._postprocess = build_published(
            setup.published, setup.case.config, setup.device
        )
        torch.save(model.state_dict(), setup.weights)
        self.model = model.to(setup.device).eval()
        batch = to_device(random_batch(setup.case), setup.device)
        self._samples = published_images(batch.images)
        self._sizes = batch.original_sizes

    def scores(self) -> Tensor:
        """Its model, then its post-processing."""
        scores: Tensor = self._postprocess(self.model(self._samples), self._sizes)[0]["scores"]
        return scores


class HuggingFacePass(InferencePass):
    """Deformable-DETR of `transformers` and its post-processing."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        torch.manual_seed(setup.case.seed)
        config = setup.case.config
        self.model = build_hugging_face(config.model, config.loss).to(setup.device).eval()
        batch = to_device(random_batch(setup.case), setup.device)
        self._pixels, self._mask = hugging_face_images(batch.images)
        self._sizes = batch.original_sizes
        transformers: Any = importlib.import_module("transformers")
        self._postprocess: Callable[..., Any] = (
            transformers.DeformableDetrImageProcessor().post_process_object_detection
        )

    def values(self) -> None:
        """None: it is another model, with other weights."""

    def scores(self) -> Tensor:
        """Its model, then its post-processing."""
        with autocast(self.setup.device, self.setup.case.dtype):
            output = self.model(self._pixels, pixel_mask=self._mask)
        results = self._postprocess(
            output, threshold=0.0, target_sizes=self._sizes, top_k=MAX_DETECTIONS
        )
        scores: Tensor = results[0]["scores"]
        return scores


def build_pass(setup: Setup) -> Subject:
    """The pass of an implementation, for its process."""
    if is_published(setup.implementation):
        return PublishedPass(setup)
    return (HuggingFacePass if setup.implementation == "huggingface" else OurPass)(setup)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector inference")
        rows = compare(
            options.cases, options, build_pass, benchmark="inference", repetitions=options.passes
        )
        print_rows(collect(rows, options.output))
    return 0
