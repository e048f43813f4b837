"""Code that tests run in several processes, and how they are started.

A separate module, because spawned processes import it by name.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.profiler import ProfilerActivity, profile

from msdetr.config import RunConfig
from msdetr.engine import trainer as trainer_module
from msdetr.engine.checkpoint import Progress, save_checkpoint
from msdetr.engine.compile import compile_step, num_graphs
from msdetr.engine.distributed import Worker, worker_from_environment
from msdetr.engine.finite import FiniteCheck, NonFiniteError
from msdetr.engine.metrics.writer import METRICS_FILE
from msdetr.engine.parallel import full_tensor, local_tensor
from msdetr.engine.prefetch import StepInput
from msdetr.engine.run import build_trainer
from msdetr.evaluation.coco_eval import CocoEvaluator
from msdetr.evaluation.coco_metrics import CocoResult

PROGRESS = Progress(step=99, epoch=0, steps_per_epoch=100, config={}, label_map={}, world_size=2)

Task = Callable[[Worker, Any], Any]

_PRELOADED = ["torch._dynamo", "torch.distributed.checkpoint.hf_storage", "msdetr.engine.run"]


def run_in_processes(task: Task, argument: Any, folder: Path, *, num_processes: int) -> list[Any]:
    """`task(worker, argument)` in gloo processes; the results in rank order, passed by file."""
    # The system chooses a free port, which stays in use until all processes have ended.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Forked from a process with all imports, which take seconds in each process otherwise.
    multiprocessing.set_forkserver_preload(_PRELOADED)
    torch.multiprocessing.start_processes(
        _enter,
        (task, argument, folder, num_processes, store.port),
        num_processes,
        start_method="forkserver",
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def _enter(rank: int, task: Task, argument: Any, folder: Path, world_size: int, port: int) -> None:
    faulthandler.enable()  # A crash outside of Python says where Python was.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
            # As torchrun does: the store is the parent's.
            ("TORCHELASTIC_USE_AGENT_STORE", True),
            ("TORCHELASTIC_RESTART_COUNT", 0),
            ("WORLD_SIZE", world_size),
            ("RANK", rank),
            ("LOCAL_RANK", rank),
        ):
            patch.setenv(name, str(value))
        with worker_from_environment("cpu") as worker:
            torch.save(task(worker, argument), folder / f"{rank}.pt")


def train_run(worker: Worker, config: RunConfig) -> dict[str, Any]:
    """Train, and report the run: images, targets, and losses of every step, the gradients of the
    first step, the collectives of the second, all tensors before and after, and the scores of the
    detections. Tensors are whole."""
    with pytest.MonkeyPatch.context() as patch:
        # The same graphs as for generated code, which would take long to generate.
        patch.setattr(
            trainer_module, "compile_step", functools.partial(compile_step, backend="eager")
        )
        trainer = build_trainer(config, worker)
    image_ids, targets = [], []
    collectives: Counter[str] = Counter()
    gradients: dict[str, Tensor] = {}
    real_step, real_update = trainer.train_step, trainer.update
    initial = whole(trainer.state.tensors())

    def recorded_step(step_input: StepInput) -> None:
        image_ids.append([i for batch in step_input.host for i in batch.image_ids.tolist()])
        targets.append([int(batch.targets.count.sum()) for batch in step_input.host])
        if worker.world_size == 1 or trainer.step != 1:  # Profiling is slow: one step is enough.
            real_step(step_input)
            return
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            real_step(step_input)
        names = (event.name for event in profiler.events())
        collectives.update(name for name in names if name.startswith("c10d::"))

    def recorded_update() -> Tensor:
        if not gradients:
            named = trainer.model.named_parameters()
            gradients.update(whole({n: p.grad for n, p in named if p.grad is not None}))
        return real_update()

    trainer.train_step = recorded_step  # type: ignore[method-assign]
    trainer.update = recorded_update  # type: ignore[method-assign]
    scores: dict[int, list[float]] = defaultdict(list)
    real_summarize = CocoEvaluator.summarize

    def recorded_summarize(evaluator: CocoEvaluator) -> CocoResult:
        scores.clear()
        for entry in evaluator.results():
            scores[entry["image_id"]].append(entry["score"])
        return real_summarize(evaluator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CocoEvaluator, "summarize", recorded_summarize)
        trainer.train()
    rows = [json.loads(line) for line in (config.output / METRICS_FILE).read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
        "grad_norms": [row["grad_norm"] for row in rows if row["kind"] == "train"],
        "image_ids": image_ids,
        "targets": targets,
        "collectives": collectives,
        "gradients": gradients,
        "initial": initial,
        "tensors": whole(trainer.state.tensors()),
        "scores": {image_id: sorted(values) for image_id, values in scores.items()},
        "num_graphs": num_graphs(),
        "num_local": sum(local_tensor(p).numel() for p in trainer.model.parameters()),
    }


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor).detach().clone() for name, tensor in tensors.items()}


def loaded_tensors(worker: Worker, config: RunConfig) -> dict[str, Tensor]:
    """The tensors of a run that loads its checkpoint. An evaluation changes none of them."""
    trainer = build_trainer(config, worker)
    trainer.evaluate()
    return whole(trainer.state.tensors())


@dataclass(frozen=True)
class Tasks:
    """The work of the processes of a test module, in this order."""

    train: dict[str, RunConfig]
    """Runs to train, by name."""
    load: dict[str, RunConfig]
    """Runs to load the checkpoint of."""


def do_tasks(worker: Worker, tasks: Tasks) -> dict[str, Any]:
    """The results by name, and the errors of ranks that are made to fail."""
    return {
        **{name: train_run(worker, config) for name, config in tasks.train.items()},
        **{name: loaded_tensors(worker, config) for name, config in tasks.load.items()},
        "bad loss": find_bad_rank(worker, worker.world_size - 1),
        "full disk": find_full_disk(worker, next(iter(tasks.train.values())).output),
    }


def find_full_disk(worker: Worker, run_folder: Path) -> str:
    """The error of a checkpoint that the last rank cannot write."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if worker.rank == worker.world_size - 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", fail)
        tensors = {"model.weight": torch.zeros(3), "model.bias": torch.zeros(3)}
        with pytest.raises(OSError, match="could not write") as caught:
            save_checkpoint(tensors, PROGRESS, run_folder, worker, keep=3)
    return str(caught.value)


def find_bad_rank(worker: Worker, bad_rank: int) -> str:
    """The error of a check whose loss is NaN in step 2 on `bad_rank`."""
    check = FiniteCheck(worker)
    for step in (1, 2, 3):
        nan, fine = torch.tensor(float("nan")), torch.tensor(1.0)
        loss = nan if step == 2 and worker.rank == bad_rank else fine
        # Gradients are averaged: one that is bad on a rank is bad on all.
        grad_norm = nan if step == 2 else fine
        check.record(step, loss, grad_norm, torch.tensor([step * 10 + worker.rank]))
    with pytest.raises(NonFiniteError) as caught:
        check.verify()
    return str(caught.value)
