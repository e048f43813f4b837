"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from msdetr.config import RunConfig, config_to_dict
from msdetr.data.dataset import DetectionDataset
from msdetr.data.loader import build_eval_loader, build_train_loader, steps_per_epoch
from msdetr.data.sampler import rank_batch_size
from msdetr.engine.checkpoint import Checkpoint, Progress, save_checkpoint
from msdetr.engine.compile import compile_step, eager_code, explain_compile_errors, is_compiled
from msdetr.engine.cuda_graphs import StepGraphs
from msdetr.engine.device import autocast, to_device
from msdetr.engine.distributed import MeanOverRanks, Worker
from msdetr.engine.ema import WeightEMA
from msdetr.engine.evaluate import evaluate_detector
from msdetr.engine.finite import FiniteCheck, guard_update
from msdetr.engine.metrics.meter import StepMeter
from msdetr.engine.metrics.progress import progress
from msdetr.engine.metrics.reports import Reports
from msdetr.engine.optimizer.clipping import clip_gradients
from msdetr.engine.optimizer.groups import build_optimizer
from msdetr.engine.optimizer.schedule import learning_rate_factor, set_learning_rate
from msdetr.engine.parallel import distribute, gathered, gradient_sync
from msdetr.engine.prefetch import StepInput, prefetch
from msdetr.engine.seeding import seed_step
from msdetr.engine.training_state import TrainingState
from msdetr.engine.warm_up import warm_up_batches
from msdetr.evaluation.coco_eval import CocoEvaluator
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.model.detector import Detector
from msdetr.structures import Batch, TargetCount
from msdetr.supervision.criterion import Criterion, LossOutput, add_losses
from msdetr.weights import save_weights

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"


class Trainer:
    """Trains a detector: steps, reports, checkpoints, evaluations.

    A run is determined by its tensors (`state`), `step` and the seed: order of the images,
    augmentation, dropout and learning rate are functions of the step and the seed.
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
            train_data: the training images; its label map names the classes.
            val_data: the validation images; None where the run does not evaluate.
            worker: this process.

        Raises:
            ValueError: the batch size is not divisible by the number of processes times
                micro-batches, there are no images, or CUDA graphs are asked for without CUDA.
        """
        train = config.train
        rank_batch_size(
            train.batch_size,
            world_size=worker.world_size,
            accumulation_steps=train.accumulation_steps,
        )
        self.config = config
        self.worker = worker
        self.train_data = train_data
        self.val_data = val_data
        self.label_map = train_data.annotations.label_map
        self.step = 0
        self.steps_per_epoch = steps_per_epoch(len(train_data), train.batch_size)
        schedule_steps = train.epochs * self.steps_per_epoch
        self.last_step = min(schedule_steps, train.max_steps or schedule_steps)
        self._learning_rate_factor = functools.partial(
            learning_rate_factor,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=schedule_steps,
            config=config.optimizer,
        )

        self.model = model.train()
        model.checkpoint_activations(train.activation_checkpointing)
        self.criterion = Criterion(config.assignment, config.loss)
        captures = config.compile.cuda_graphs
        if captures and worker.device.type != "cuda":
            raise ValueError(f"compile.cuda_graphs needs CUDA, this run is on {worker.device}")
        # Sharding replaces the parameters, so it comes before everything that holds them. CUDA
        # graphs average the gradients themselves.
        self.distributed_model: nn.Module = model
        if not captures:
            self.distributed_model = distribute(model, worker, config.parallel)
        self.is_compiled = is_compiled(config.compile, worker.device)
        if self.is_compiled:
            compile_step(model, self.criterion)
        self.optimizer = build_optimizer(model, config.optimizer, rates_on_device=captures)
        self.ema: WeightEMA | None = None
        if train.ema_decay is not None:
            self.ema = WeightEMA(model, decay=train.ema_decay, warmup_steps=train.ema_warmup_steps)
        self.state = TrainingState(model, self.optimizer, self.ema)
        self._weights_name = "weights" if self.ema is None else "EMA weights"

        self.generator = torch.Generator(worker.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.graphs: StepGraphs | None = None
        if captures:
            self.graphs = StepGraphs(
                self.forward_backward, self.update, self._parameters, worker, self.generator
            )
        self.meter = StepMeter(worker, train.batch_size)
        self.finite = FiniteCheck(worker)
        self.reports = Reports(
            config.output, worker, steps_per_epoch=self.steps_per_epoch, last_step=self.last_step
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same model, data and batch size.

        Raises:
            ValueError: its tensors do not fit the model.
        """
        self.state.load(checkpoint)
        self.step = checkpoint.progress.step

    def train(self) -> CocoResult | None:
        """Train to the last step.

        Returns:
            The last evaluation, on rank 0 and where there was one.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite.
            CompileError: the step cannot be compiled.
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
        if self.is_compiled and self.config.compile.warm_up:
            with self.meter.paused():
                self.warm_up()
        while self.step < self.last_step:
            self._train_epoch()
            self.save()
            if self._evaluation_is_due():
                result = self.evaluate()
        return result

    def warm_up(self) -> None:
        """Compile for the image buckets of the run, and capture them. All ranks call it.

        Changes nothing else.
        """
        started = time.perf_counter()
        sizes = set()
        for batch in warm_up_batches(self.config, self.train_data, self.worker):
            # Two tensors, as in a step: one tensor twice would be another graph.
            count = TargetCount(*(torch.ones((), device=self.worker.device) for _ in range(2)))
            self._run_micro_batch(to_device(batch, self.worker.device), count)
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
            sizes.add(batch.images.pixels.shape)
        if sizes:
            seconds = time.perf_counter() - started
            logger.info("compiled for %d image sizes in %.0f s", len(sizes), seconds)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch of `step`, or to the last step."""
        every = self.config.train.checkpoint_every
        for step_input in prefetch(self._load_steps(), self.worker.device):
            self.train_step(step_input)
            ends = self.step == self.last_step or self.step % self.steps_per_epoch == 0
            if ends or self.step % self.config.train.log_every == 0:
                self._report()
            if ends:
                return
            if every is not None and self.step % every == 0:
                self.save()

    def train_step(self, step_input: StepInput) -> None:
        """One optimizer step on this rank's micro-batches. Reads nothing back from a GPU."""
        micro_batches = step_input.host
        num_targets = self._count_targets(micro_batches)
        seed_step(self.config.seed, self.step, self.worker.rank, self.generator)
        set_learning_rate(self.optimizer, self._learning_rate_factor(self.step))
        if self.ema is not None:
            self.ema.set_step(self.step + 1)
        losses = []
        for position, batch in enumerate(step_input.device, start=1):
            with gradient_sync(self.distributed_model, enabled=position == len(micro_batches)):
                losses.append(self._run_micro_batch(batch, num_targets))
        loss, terms = add_losses(losses)
        grad_norm = self.update() if self.graphs is None else self.graphs.update()

        self.step += 1
        image_ids = torch.cat([batch.image_ids for batch in micro_batches])
        self.finite.record(self.step, loss, grad_norm, image_ids)
        self.meter.add(loss, grad_norm, terms)
        if self.worker.device.type == "cpu":
            self.finite.verify()  # Costs nothing here.

    def forward_backward(self, batch: Batch, num_targets: TargetCount) -> LossOutput:
        """Add the gradients of a micro-batch on the device to those of the step."""
        device = self.worker.device
        noise = self.model.draw_noise(batch.targets, self.generator)
        with autocast(device, self.config.train.precision):
            output = self.distributed_model(batch.images, batch.targets, noise)
        priority = self.criterion.draw_priority(output, self.generator)
        losses: LossOutput = self.criterion(
            output, batch.targets, num_targets=num_targets, priority=priority
        )
        losses.total.backward()
        return LossOutput(losses.total.detach(), losses.terms)

    def update(self) -> Tensor:
        """Clip the gradients, update weights and EMA weights, clear the gradients.

        A gradient that is not finite changes no weight.

        Returns:
            The norm of the gradient before clipping, 0-dim.
        """
        grad_norm = clip_gradients(self._parameters, self.config.optimizer.clip_grad_norm)
        finite = torch.isfinite(grad_norm)
        guard_update(self.optimizer, finite)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(finite)
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        return grad_norm

    def save(self) -> None:
        """Write a checkpoint and the weights file. All ranks call it."""
        self.finite.verify()
        config, progress = self.config, self._progress()
        with self.meter.paused():
            path = save_checkpoint(
                self.state.tensors(),
                progress,
                config.output,
                self.worker,
                keep=config.train.keep_checkpoints,
            )
            weights = self.state.exported_weights()
            if self.worker.is_main:
                save_weights(config.output / WEIGHTS_FILE, weights, config, progress.label_map)
        logger.info(
            "step %d: wrote %s and the %s to %s", self.step, path, self._weights_name, WEIGHTS_FILE
        )

    def evaluate(self) -> CocoResult | None:
        """Score the validation images. All ranks call it; rank 0 has the result."""
        self.finite.verify()
        config, worker, data = self.config, self.worker, self.val_data
        assert data is not None, "without eval_every there is no validation set"
        started = time.perf_counter()
        ema_weights = contextlib.nullcontext() if self.ema is None else self.ema.applied()
        with self.meter.paused(), ema_weights, gathered(self.model), eager_code():
            result = evaluate_detector(
                self.model,
                build_eval_loader(config, data, rank=worker.rank, world_size=worker.world_size),
                CocoEvaluator(data.annotations.table, self.label_map),
                config.eval,
                worker,
                precision=config.train.precision,
            )
        if result is not None:
            seconds = time.perf_counter() - started
            self.reports.evaluation(self.step, result, weights=self._weights_name, seconds=seconds)
        return result

    def _load_steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of the remaining steps of this epoch. Waits go to the meter."""
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        loader = build_train_loader(
            self.config,
            self.train_data,
            epoch=epoch,
            first_step=first_step,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
        )
        batches = iter(loader)
        for _ in progress(
            range(first_step, self.steps_per_epoch),
            f"epoch {epoch + 1}/{self.config.train.epochs}",
            self.worker,
            initial=first_step,
            total=self.steps_per_epoch,
        ):
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.config.train.accumulation_steps)]
            self.meter.add_wait(time.perf_counter() - started)
            yield micro_batches

    def _run_micro_batch(self, batch: Batch, num_targets: TargetCount) -> LossOutput:
        with explain_compile_errors():
            if self.graphs is not None:
                return self.graphs.forward_backward(batch, num_targets)
            return self.forward_backward(batch, num_targets)

    def _count_targets(self, micro_batches: Sequence[Batch]) -> TargetCount:
        """Targets of the step, on the device.

        Counted on the host, before the first backward pass needs the sum over all micro-batches.
        """
        count = sum(int(batch.targets.count.sum()) for batch in micro_batches)
        # `full` fills on the device. A copy from the host would wait for the device.
        local = torch.full((), float(count), device=self.worker.device)
        return TargetCount(MeanOverRanks(local, self.worker).wait(), local)

    def _report(self) -> None:
        self.finite.verify()
        learning_rate = self.config.optimizer.lr * self._learning_rate_factor(self.step - 1)
        self.reports.training(self.step, learning_rate=learning_rate, row=self.meter.read())

    def _progress(self) -> Progress:
        return Progress(
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
            config=config_to_dict(self.config),
            label_map=self.label_map.to_dict(),
            world_size=self.worker.world_size,
        )

    def _evaluation_is_due(self) -> bool:
        every = self.config.train.eval_every
        if not every:
            return False
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        return self.step == self.last_step or (rest == 0 and epoch % every == 0)
