from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import (
    BATCH_SIZE,
    SEED,
    assert_same_within_rounding,
    deterministic_config,
    write_shapes,
)
from engine.processes import run_in_processes, train_run

from msdetr.data.sampler import step_indices
from msdetr.engine.device import resolve_device
from msdetr.engine.distributed import Worker, worker_from_environment

WORKER = Worker(device=torch.device("cpu"))
NUM_TRAIN = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose first step gives rank 1 of 2 no target at all."""
    empty = step_indices(
        seed=SEED,
        epoch=0,
        step=0,
        num_images=NUM_TRAIN,
        batch_size=BATCH_SIZE,
        rank=1,
        world_size=2,
    )
    root = tmp_path_factory.mktemp("distributed") / "data"
    return write_shapes(root, num_train=NUM_TRAIN, num_val=5, without_targets=set(empty.tolist()))


@pytest.fixture(scope="module")
def ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes reports of one run."""
    folder = tmp_path_factory.mktemp("ranks")
    config = deterministic_config(data, folder / "run")
    return run_in_processes(train_run, config, folder, num_processes=2)


def test_two_processes_are_one(data: Path, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = train_run(WORKER, deterministic_config(data, tmp_path / "single"))

    assert len(expected["image_ids"]) == 4
    assert ranks[1]["targets"][0] == [0]
    assert ranks[0]["targets"][0] > [0]
    for step, image_ids in enumerate(expected["image_ids"]):
        assert image_ids == [i for rank in ranks for i in rank["image_ids"][step]]

    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name
    assert_same_within_rounding(ranks[0], expected)
    assert ranks[0]["metrics"] == pytest.approx(expected["metrics"], abs=1e-3)
    assert ranks[1]["metrics"] is None


def test_every_rank_names_the_bad_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["bad_rank_error"] for rank in ranks)
    assert first == second
    assert "the loss of step 2 is not finite (rank 1: image ids [21])" in first


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with worker_from_environment("cpu") as worker:
        assert worker == WORKER
        assert worker.is_main
        assert not torch.distributed.is_initialized()


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not: start several processes with torchrun"):
        worker_from_environment("cpu").__enter__()


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", 1) == torch.device("cuda", 1)
    assert resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="the machine has 2: start fewer processes"):
        resolve_device("auto", 2)
