"""The training loop."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msdetr.config import RunConfig, config_to_dict
from msdetr.data.dataset import DetectionDataset
from msdetr.data.loader import build_eval_loader, build_train_loader, steps_per_epoch
from msdetr.engine.checkpoint import Checkpoint, save_checkpoint
from msdetr.engine.device import autocast, to_device
from msdetr.engine.distributed import MeanOverRanks, Worker
from msdetr.engine.evaluate import evaluate_detector
from msdetr.engine.finite import FiniteCheck, guard_update
from msdetr.engine.metrics import MetricsWriter, StepMeter, progress
from msdetr.engine.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state_by_name,
    set_learning_rate,
)
from msdetr.engine.seeding import seed_step
from msdetr.engine.side_stream import SideStream
from msdetr.evaluation.coco_eval import CocoEvaluator, CocoResult
from msdetr.losses.criterion import Criterion
from msdetr.model.checkpoint_adapter import load_state
from msdetr.model.detector import Detector
from msdetr.structures import Batch
from msdetr.weights import save_weights

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"


class Trainer:
    """Trains a detector: steps, reports, checkpoints, evaluations.

    All state that decides what comes next is the weights, the optimizer state and `step`:
    images, augmentation, dropout and learning rate are functions of the step and the seed.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Detector,
        train_data: DetectionDataset,
        val_data: DetectionDataset | None,
        worker: Worker,
    ) -> None:
        """Prepare step 0.

        Args:
            config: resolved: `model.num_classes` is set.
            model: on the worker's device, with the same weights on every rank.
            train_data: what to train on; its label map names the classes.
            val_data: what to evaluate on; None where the run does not evaluate.
            worker: this process.

        Raises:
            ValueError: the batch size does not fit the number of processes or images.
        """
        train = config.train
        if train.batch_size % worker.world_size:
            raise ValueError(
                f"train.batch_size ({train.batch_size}) is the number of images over all "
                f"processes: it must be divisible by their number ({worker.world_size})"
            )
        self.config = config
        self.train_data = train_data
        self.val_data = val_data
        self.label_map = train_data.annotations.label_map
        self.worker = worker
        self.model = model.train()
        self.step = 0
        self.steps_per_epoch = steps_per_epoch(len(train_data), train.batch_size)
        self.schedule_steps = train.epochs * self.steps_per_epoch
        self.last_step = min(self.schedule_steps, train.max_steps or self.schedule_steps)
        self.criterion = Criterion(config.assignment, config.loss)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.generator = torch.Generator(worker.device)
        self.side_stream = SideStream(worker.device)
        self.meter = StepMeter(worker, train.batch_size)
        self.finite = FiniteCheck(worker)
        self.metrics = MetricsWriter(config.output, worker)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._distributed_model = self._wrap(model)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same model, data and batch size."""
        load_state(self.model, checkpoint.model)
        load_optimizer_state(self.optimizer, self.model, checkpoint.optimizer)
        self.step = checkpoint.step

    def train(self) -> CocoResult | None:
        """Train to the last step.

        Returns:
            The last evaluation, on rank 0 and where there was one.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite.
        """
        if self.step >= self.last_step:
            logger.info(
                "nothing to do: training is finished at step %d of %d; raise train.epochs or "
                "train.max-steps to go on",
                self.step,
                self.last_step,
            )
            return None
        result = None
        try:
            while self.step < self.last_step:
                self._train_epoch()
                self.save()
                if self._evaluation_is_due():
                    result = self.evaluate()
        finally:
            self.metrics.close()
        return result

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's part of the batch. Reads nothing back from a GPU."""
        config, worker, step = self.config, self.worker, self.step
        batch = to_device(batch, worker.device)
        num_targets = MeanOverRanks(batch.targets.count.sum().float(), worker)
        seed_step(config.seed, step, worker.rank, self.generator)
        set_learning_rate(self.optimizer, self._learning_rate_factor())

        with self.side_stream.fork():
            anchors = self.model.anchors(batch.images)
            encoder_assignment = self.criterion.assign_encoder(anchors, batch.targets)
        with autocast(worker.device, config.train.precision):
            output = self._distributed_model(batch.images)
        # Drawn here: what compiles can have no generator.
        priority = torch.rand(
            output.one_to_one.logits.shape[:3], device=worker.device, generator=self.generator
        )
        self.side_stream.join()
        loss, terms = self.criterion(
            output,
            batch.targets,
            encoder_assignment=encoder_assignment,
            num_targets=num_targets.wait(),
            priority=priority,
        )
        loss.backward()
        grad_norm = clip_gradients(self._parameters, config.optimizer.clip_grad_norm)

        self.step = step + 1
        self.finite.record(self.step, loss, grad_norm, batch.image_ids)
        if worker.device.type == "cpu":
            self.finite.verify()  # Free here, and before a weight moves.
        else:
            guard_update(self.optimizer, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(loss, grad_norm, terms)

    def save(self) -> None:
        """Write a checkpoint and the weights file. All ranks call it; rank 0 writes."""
        self.finite.verify()
        if not self.worker.is_main:
            return
        with self.meter.paused():
            checkpoint = Checkpoint(
                model=self.model.state_dict(),
                optimizer=optimizer_state_by_name(self.optimizer, self.model),
                step=self.step,
                epoch=self.step // self.steps_per_epoch,
                steps_per_epoch=self.steps_per_epoch,
                config=config_to_dict(self.config),
                label_map=self.label_map.to_dict(),
                world_size=self.worker.world_size,
            )
            output = self.config.output
            path = save_checkpoint(checkpoint, output, keep=self.config.train.keep_checkpoints)
            save_weights(output / WEIGHTS_FILE, checkpoint.model, self.config, checkpoint.label_map)
        logger.info("step %d: wrote %s", self.step, path)

    def evaluate(self) -> CocoResult | None:
        """Score the validation images. All ranks call it; rank 0 has the result."""
        self.finite.verify()
        config, worker, data = self.config, self.worker, self.val_data
        assert data is not None, "without eval_every there is no validation set"
        started = time.perf_counter()
        with self.meter.paused():
            result = evaluate_detector(
                self.model,
                build_eval_loader(config, data, rank=worker.rank, world_size=worker.world_size),
                CocoEvaluator(data.annotations.annotation_file, self.label_map),
                config.eval,
                worker,
                precision=config.train.precision,
            )
        if result is None:
            return None
        self.metrics.write("eval", {"step": self.step, "epoch": self._epoch(), **result.metrics})
        logger.info(
            "step %d: evaluated %d images in %.1f s\n%s",
            self.step,
            result.num_images,
            time.perf_counter() - started,
            result.table(),
        )
        return result

    def _train_epoch(self) -> None:
        """Train to the end of the epoch that `step` lies in, or to the last step."""
        every = self.config.train.checkpoint_every
        for batch in self._batches():
            self.train_step(batch)
            ends = self.step == self.last_step or self.step % self.steps_per_epoch == 0
            if ends or self.step % self.config.train.log_every == 0:
                self._log()
            if ends:
                return
            if every is not None and self.step % every == 0:
                self.save()

    def _batches(self) -> Iterator[Batch]:
        """The batches left in this epoch; the meter learns how long each was waited for."""
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        loader = build_train_loader(
            self.config,
            self.train_data,
            epoch=epoch,
            first_step=first_step,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
        )
        bar = progress(
            loader,
            f"epoch {epoch + 1}/{self.config.train.epochs}",
            self.worker,
            initial=first_step,
            total=self.steps_per_epoch,
        )
        batches = iter(bar)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.meter.add_wait(time.perf_counter() - started)
            yield batch

    def _log(self) -> None:
        self.finite.verify()
        row = self.meter.read()
        learning_rate = self.config.optimizer.lr * self._learning_rate_factor(self.step - 1)
        self.metrics.write(
            "train", {"step": self.step, "epoch": self._epoch(), "lr": learning_rate, **row}
        )
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  grad norm %.3g  lr %.3g  %.1f images/s  "
            "waiting for data %.0f%%",
            self.step,
            self.last_step,
            self._epoch(),
            row["loss"],
            row["grad_norm"],
            learning_rate,
            row["images_per_second"],
            100 * row["data_wait_share"],
        )

    def _epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def _learning_rate_factor(self, step: int | None = None) -> float:
        return learning_rate_factor(
            self.step if step is None else step,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.schedule_steps,
            config=self.config.optimizer,
        )

    def _evaluation_is_due(self) -> bool:
        every = self.config.train.eval_every
        if not every:
            return False
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        return self.step == self.last_step or (rest == 0 and epoch % every == 0)

    def _wrap(self, model: Detector) -> nn.Module:
        if self.worker.world_size == 1:
            return model
        options: dict[str, Any] = {}
        if self.worker.device.type == "cuda":
            options["device_ids"] = [self.worker.device.index]
        # Buffers never change (BatchNorm is frozen). Newer versions of torch renamed the option.
        parameters = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers"
        options[name if name in parameters else "broadcast_buffers"] = False
        # Every parameter gets a gradient in every step, whatever the targets: nothing to look for.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
