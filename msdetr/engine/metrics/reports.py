"""Reports of a run: a row of metrics and a log line for each interval and each evaluation."""

from __future__ import annotations

import logging
from pathlib import Path

from msdetr.engine.distributed import Worker
from msdetr.engine.metrics.writer import MetricsWriter
from msdetr.evaluation.coco_metrics import CocoResult

logger = logging.getLogger(__name__)


class Reports:
    """Writes the reports of a run on rank 0."""

    def __init__(
        self, run_folder: Path, worker: Worker, *, steps_per_epoch: int, last_step: int
    ) -> None:
        self._metrics = MetricsWriter(run_folder, worker)
        self._steps_per_epoch = steps_per_epoch
        self._last_step = last_step

    def training(self, step: int, *, learning_rate: float, row: dict[str, float]) -> None:
        """Report the steps up to `step`, whose averages are `row`."""
        epoch = step / self._steps_per_epoch
        self._metrics.write("train", {"step": step, "epoch": epoch, "lr": learning_rate, **row})
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  grad norm %.3g  lr %.3g  %.1f images/s  "
            "waiting for data %.0f%%",
            step,
            self._last_step,
            epoch,
            row["loss"],
            row["grad_norm"],
            learning_rate,
            row["images_per_second"],
            100 * row["data_wait_share"],
        )

    def evaluation(self, step: int, result: CocoResult, *, weights: str, seconds: float) -> None:
        """Report an evaluation of the named weights after `step`."""
        epoch = step / self._steps_per_epoch
        self._metrics.write("eval", {"step": step, "epoch": epoch, **result.metrics})
        logger.info(
            "step %d: evaluated %d images with the %s in %.1f s\n%s",
            step,
            result.num_images,
            weights,
            seconds,
            result.table(),
        )
