"""Code that tests run in several processes, and how they start them.

In a module of its own, because spawned processes import it by name.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from msdetr.config import RunConfig
from msdetr.engine.distributed import Worker, worker_from_environment
from msdetr.engine.finite import FiniteCheck, NonFiniteError
from msdetr.engine.metrics import METRICS_FILE
from msdetr.engine.run import build_trainer

Task = Callable[[Worker, Any], Any]


def run_in_processes(task: Task, argument: Any, folder: Path, *, num_processes: int) -> list[Any]:
    """`task(worker, argument)` in gloo processes; the results in rank order, passed by file."""
    torch.multiprocessing.start_processes(
        _enter, (task, argument, folder, num_processes, _free_port()), num_processes
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def _enter(rank: int, task: Task, argument: Any, folder: Path, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
            ("WORLD_SIZE", world_size),
            ("RANK", rank),
            ("LOCAL_RANK", rank),
        ):
            patch.setenv(name, str(value))
        with worker_from_environment("cpu") as worker:
            torch.save(task(worker, argument), folder / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def train_run(worker: Worker, config: RunConfig) -> dict[str, Any]:
    """Train; the images and losses of every step, the weights, the scores, and what the ranks say
    of a loss that is NaN on the last of them."""
    trainer = build_trainer(config, worker)
    image_ids, targets = [], []
    real_step = trainer.train_step
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    def recorded_step(batches: Any) -> None:
        image_ids.append([i for batch in batches for i in batch.image_ids.tolist()])
        targets.append([int(batch.targets.count.sum()) for batch in batches])
        real_step(batches)

    trainer.train_step = recorded_step  # type: ignore[method-assign]
    result = trainer.train()
    rows = [json.loads(line) for line in (config.output / METRICS_FILE).read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
        "grad_norms": [row["grad_norm"] for row in rows if row["kind"] == "train"],
        "bad_rank_error": find_bad_rank(worker, worker.world_size - 1),
        "image_ids": image_ids,
        "targets": targets,
        "initial": initial,
        "weights": trainer.model.state_dict(),
        "metrics": None if result is None else result.metrics,
    }


def train_runs(worker: Worker, configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """`train_run` of each configuration, in the same processes."""
    return {name: train_run(worker, config) for name, config in configs.items()}


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
