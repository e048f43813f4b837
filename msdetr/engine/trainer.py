"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from msdetr.config import RunConfig, config_to_dict
from msdetr.data.collate import Collate
from msdetr.data.dataset import DetectionDataset, Sample
from msdetr.data.loader import (
    build_eval_loader,
    build_train_loader,
    steps_per_epoch,
    train_image_buckets,
)
from msdetr.data.sampler import rank_batch_size
from msdetr.data.transforms import Size
from msdetr.engine.checkpoint import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    Progress,
    optimizer_tensors,
    save_checkpoint,
)
from msdetr.engine.compile import (
    compile_step,
    eager_code,
    explain_compile_errors,
    is_compiled,
)
from msdetr.engine.cuda_graphs import StepGraphs
from msdetr.engine.device import autocast, to_device
from msdetr.engine.distributed import MeanOverRanks, Worker
from msdetr.engine.ema import WeightAverage
from msdetr.engine.evaluate import evaluate_detector
from msdetr.engine.finite import FiniteCheck, guard_update
from msdetr.engine.metrics import MetricsWriter, StepMeter, progress
from msdetr.engine.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state_by_name,
    optimizer_state_targets,
    set_learning_rate,
)
from msdetr.engine.parallel import distribute, full_tensor, gathered, gradient_sync
from msdetr.engine.prefetch import StepInput, prefetch
from msdetr.engine.seeding import seed_step
from msdetr.engine.side_stream import SideStream
from msdetr.evaluation.coco_eval import CocoEvaluator
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.losses.criterion import Criterion, LossOutput, add_losses
from msdetr.model.checkpoint_adapter import check_state
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
            ValueError: the batch size is not divisible by the number of processes times
                micro-batches, or there are no images.
        """
        train = config.train
        rank_batch_size(
            train.batch_size,
            world_size=worker.world_size,
            accumulation_steps=train.accumulation_steps,
        )
        self.config = config
        self.train_data = train_data
        self.val_data = val_data
        self.label_map = train_data.annotations.label_map
        self.worker = worker
        self.model = model.train()
        model.checkpoint_activations(train.activation_checkpointing)
        self.step = 0
        self.steps_per_epoch = steps_per_epoch(len(train_data), train.batch_size)
        self.schedule_steps = train.epochs * self.steps_per_epoch
        self.last_step = min(self.schedule_steps, train.max_steps or self.schedule_steps)
        self.criterion = Criterion(config.assignment, config.loss)
        self.is_compiled = is_compiled(config.compile, worker.device)
        records = config.compile.cuda_graphs
        if records and worker.device.type != "cuda":
            raise ValueError(f"compile.cuda_graphs needs CUDA, this run is on {worker.device}")
        # Before anything takes the parameters, which it may replace. Graphs average by themselves.
        self.distributed_model: nn.Module = model
        if not records:
            self.distributed_model = distribute(model, worker, config.parallel)
        if self.is_compiled:
            compile_step(model, self.criterion)
        self.optimizer = build_optimizer(model, config.optimizer, rates_on_device=records)
        self.ema: WeightAverage | None = None
        if train.ema_decay is not None:
            self.ema = WeightAverage(
                model, decay=train.ema_decay, warmup_steps=train.ema_warmup_steps
            )
        self.generator = torch.Generator(worker.device)
        self.side_stream = SideStream(worker.device)
        self.meter = StepMeter(worker, train.batch_size)
        self.finite = FiniteCheck(worker)
        self.metrics = MetricsWriter(config.output, worker)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.graphs: StepGraphs | None = None
        if records:
            self.graphs = StepGraphs(
                self.forward_backward, self.update, self._parameters, worker, self.generator
            )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same model, data and batch size.

        Raises:
            ValueError: its tensors do not fit the model.
        """
        index = checkpoint.tensors.index
        check_state(self.model, _without_prefix(index, MODEL))
        states = optimizer_state_targets(self.model, _without_prefix(index, OPTIMIZER))
        targets = _with_prefix(self.model.state_dict(), MODEL) | optimizer_tensors(states)
        if self.ema is not None and checkpoint.has_averages:
            targets |= _with_prefix(self.ema.averages, AVERAGE)
        missing = sorted(targets.keys() - index.keys())
        if missing:
            raise ValueError(f"{checkpoint.path} lacks {', '.join(missing[:5])}")
        checkpoint.tensors.load(targets)
        load_optimizer_state(self.optimizer, self.model, states)
        if self.ema is not None and not checkpoint.has_averages:
            self.ema.restart()
            logger.warning("%s has no averaged weights: they start anew", checkpoint.path)
        elif self.ema is None and checkpoint.has_averages:
            logger.warning("%s has averaged weights: given up without ema_decay", checkpoint.path)
        self.step = checkpoint.progress.step

    def train(self) -> CocoResult | None:
        """Train to the last step.

        Returns:
            The last evaluation, on rank 0 and where there was one.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite.
            CompileError: part of the step cannot be compiled.
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
            if self.is_compiled and self.config.compile.warm_up:
                with self.meter.paused():
                    self.warm_up()
            while self.step < self.last_step:
                self._train_epoch()
                self.save()
                if self._evaluation_is_due():
                    result = self.evaluate()
        finally:
            self.metrics.close()
        return result

    def warm_up(self) -> None:
        """Compile what the run's image buckets need, and record it. All ranks call it; changes
        nothing else."""
        buckets = train_image_buckets(
            self.config, self.train_data, world_size=self.worker.world_size
        )
        started = time.perf_counter()
        # Two numbers of targets are enough: from the second on, graphs serve any.
        few, *more = self.config.data.target_buckets
        shapes = [(size, few) for size in buckets]
        if buckets and more:
            shapes.append((buckets[0], more[0]))
        for size, num_targets in shapes:
            batch = to_device(self._blank_batch(size, num_targets), self.worker.device)
            self._run_micro_batch(batch, torch.ones((), device=self.worker.device))
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
        if buckets:
            seconds = time.perf_counter() - started
            logger.info("compiled for %d image sizes in %.0f s", len(buckets), seconds)

    def train_step(self, step_input: StepInput) -> None:
        """One optimizer step on this rank's micro-batches. Reads nothing back from a GPU."""
        step, worker = self.step, self.worker
        micro_batches = step_input.host
        num_targets = self._mean_num_targets(micro_batches)
        seed_step(self.config.seed, step, worker.rank, self.generator)
        set_learning_rate(self.optimizer, self._learning_rate_factor())
        if self.ema is not None:
            self.ema.set_step(step + 1)
        losses = []
        for position, batch in enumerate(step_input.device, start=1):
            with gradient_sync(self.distributed_model, enabled=position == len(micro_batches)):
                losses.append(self._run_micro_batch(batch, num_targets))
        loss, terms = add_losses(losses)
        grad_norm = self.update() if self.graphs is None else self.graphs.update()

        self.step = step + 1
        image_ids = torch.cat([batch.image_ids for batch in micro_batches])
        self.finite.record(self.step, loss, grad_norm, image_ids)
        self.meter.add(loss, grad_norm, terms)
        if worker.device.type == "cpu":
            self.finite.verify()  # Free here.

    def forward_backward(self, batch: Batch, num_targets: Tensor) -> LossOutput:
        """Add the gradients of a micro-batch on the device to those of the step.

        `num_targets` (0-dim) is the mean over ranks of the targets of all micro-batches.
        """
        device = self.worker.device
        with self.side_stream.fork():
            anchors = self.model.anchors(batch.images)
            encoder_assignment = self.criterion.assign_encoder(anchors, batch.targets)
        with autocast(device, self.config.train.precision):
            output = self.distributed_model(batch.images)
        # Drawn here: what compiles can have no generator.
        priority = torch.rand(
            output.one_to_one.logits.shape[:3], device=device, generator=self.generator
        )
        self.side_stream.join()
        losses: LossOutput = self.criterion(
            output,
            batch.targets,
            encoder_assignment=encoder_assignment,
            num_targets=num_targets,
            priority=priority,
        )
        losses.total.backward()
        return LossOutput(losses.total.detach(), losses.terms)

    def update(self) -> Tensor:
        """Clip the step's gradients, move weights and averages, clear the gradients; their norm.

        A gradient that is not finite moves nothing.
        """
        grad_norm = clip_gradients(self._parameters, self.config.optimizer.clip_grad_norm)
        finite = torch.isfinite(grad_norm)
        guard_update(self.optimizer, finite)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(finite)
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        return grad_norm

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and optimizer state, named as in a checkpoint; shards where sharded."""
        averages = {} if self.ema is None else self.ema.averages
        return {
            **_with_prefix(self.model.state_dict(), MODEL),
            **_with_prefix(averages, AVERAGE),
            **optimizer_tensors(optimizer_state_by_name(self.optimizer, self.model)),
        }

    def save(self) -> None:
        """Write a checkpoint and the weights file. All ranks call it."""
        self.finite.verify()
        with self.meter.paused():
            output, progress = self.config.output, self._progress()
            path = save_checkpoint(
                self.tensors(),
                progress,
                output,
                self.worker,
                keep=self.config.train.keep_checkpoints,
            )
            weights = self.model.state_dict() | ({} if self.ema is None else self.ema.averages)
            exported = {name: full_tensor(tensor) for name, tensor in weights.items()}
            if self.worker.is_main:
                save_weights(output / WEIGHTS_FILE, exported, self.config, progress.label_map)
        averaged = "" if self.ema is None else " (averaged)"
        logger.info("step %d: wrote %s and %s%s", self.step, path, WEIGHTS_FILE, averaged)

    def evaluate(self) -> CocoResult | None:
        """Score the validation images. All ranks call it; rank 0 has the result."""
        self.finite.verify()
        config, worker, data = self.config, self.worker, self.val_data
        assert data is not None, "without eval_every there is no validation set"
        started = time.perf_counter()
        with self.meter.paused(), self._averages_applied(), gathered(self.model), eager_code():
            result = evaluate_detector(
                self.model,
                build_eval_loader(config, data, rank=worker.rank, world_size=worker.world_size),
                CocoEvaluator(data.annotations.table, self.label_map),
                config.eval,
                worker,
                precision=config.train.precision,
            )
        if result is None:
            return None
        self.metrics.write("eval", {"step": self.step, "epoch": self._epoch(), **result.metrics})
        logger.info(
            "step %d: evaluated %d images%s in %.1f s\n%s",
            self.step,
            result.num_images,
            "" if self.ema is None else " with averaged weights",
            time.perf_counter() - started,
            result.table(),
        )
        return result

    def _train_epoch(self) -> None:
        """Train to the end of the epoch that `step` lies in, or to the last step."""
        every = self.config.train.checkpoint_every
        for step_input in prefetch(self._micro_batches(), self.worker.device):
            self.train_step(step_input)
            ends = self.step == self.last_step or self.step % self.steps_per_epoch == 0
            if ends or self.step % self.config.train.log_every == 0:
                self._log()
            if ends:
                return
            if every is not None and self.step % every == 0:
                self.save()

    def _micro_batches(self) -> Iterator[list[Batch]]:
        """What the steps left in this epoch take; the meter learns how long each waited for it."""
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

    def _run_micro_batch(self, batch: Batch, num_targets: Tensor) -> LossOutput:
        with explain_compile_errors():
            if self.graphs is not None:
                return self.graphs.forward_backward(batch, num_targets)
            return self.forward_backward(batch, num_targets)

    def _blank_batch(self, size: Size, num_targets: int) -> Batch:
        """A micro-batch of black images of `size`, each with `num_targets` targets."""
        train, data = self.config.train, self.config.data
        count = rank_batch_size(
            train.batch_size,
            world_size=self.worker.world_size,
            accumulation_steps=train.accumulation_steps,
        )
        sample = Sample(
            pixels=torch.zeros(3, *size, dtype=torch.uint8),
            labels=torch.zeros(num_targets, dtype=torch.int64),
            boxes=torch.full((num_targets, 4), 0.5),
            image_id=0,
            original_size=size,
        )
        return Collate(data.pad_multiple, data.target_buckets, (size,))([sample] * count)

    def _progress(self) -> Progress:
        return Progress(
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
            config=config_to_dict(self.config),
            label_map=self.label_map.to_dict(),
            world_size=self.worker.world_size,
        )

    def _averages_applied(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has its averaged weights, if there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def _mean_num_targets(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Targets of the step, averaged over ranks; 0-dim, on the device.

        Counted on the host, so that the first backward pass knows the last micro-batch's.
        """
        count = sum(int(batch.targets.count.sum()) for batch in micro_batches)
        # Filled on the device: a copy from the host would wait for it.
        on_device = torch.full((), float(count), device=self.worker.device)
        return MeanOverRanks(on_device, self.worker).wait()

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


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
