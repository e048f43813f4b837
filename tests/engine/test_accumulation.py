from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import assert_same_within_rounding, deterministic_config, tiny_config
from engine.processes import train_run

from msdetr.config import TrainConfig
from msdetr.data.sampler import rank_batch_size
from msdetr.engine.distributed import Worker
from msdetr.engine.run import build_trainer
from msdetr.structures import Batch, TargetCount
from msdetr.supervision.criterion import LossOutput, add_losses

WORKER = Worker(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without micro-batches."""
    return train_run(WORKER, deterministic_config(shapes, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("num_parts", [2, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(
    shapes: Path, tmp_path: Path, whole: dict[str, Any], num_parts: int
) -> None:
    config = deterministic_config(shapes, tmp_path, accumulation_steps=num_parts)
    parts = train_run(WORKER, config)
    assert parts["image_ids"] == whole["image_ids"]
    counts = parts["targets"]
    assert all(len(step) == num_parts for step in counts)
    assert [sum(step) for step in counts] == [count for (count,) in whole["targets"]]
    # Counts differ, so that dividing by a micro-batch's own targets would fail.
    assert any(len(set(step)) > 1 for step in counts)
    assert_same_within_rounding(parts, whole)


def test_losses_are_divided_by_the_targets_of_all_micro_batches(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ThirdOverRanks:
        """As if the mean over the ranks were a third of this rank's number."""

        def __init__(self, value: torch.Tensor, worker: Worker) -> None:
            self.value = value

        def wait(self) -> torch.Tensor:
            return self.value / 3

    monkeypatch.setattr("msdetr.engine.trainer.MeanOverRanks", ThirdOverRanks)
    train = TrainConfig(batch_size=4, accumulation_steps=2, max_steps=1, eval_every=0)
    trainer = build_trainer(tiny_config(shapes, tmp_path, train=train), WORKER)
    calls: list[tuple[int, TargetCount]] = []

    def record(batch: Batch, num_targets: TargetCount) -> LossOutput:
        calls.append((int(batch.targets.count.sum()), num_targets))
        return LossOutput(trainer.model.level_embed.sum(), {})

    monkeypatch.setattr(trainer, "forward_backward", record)
    monkeypatch.setattr(trainer, "update", lambda: torch.zeros(()))
    trainer.train()
    (first, count), (second, same) = calls
    assert 0 < first < first + second
    assert count is same
    assert count.local == first + second
    assert count.mean == count.local / 3


def test_resume_is_exact(shapes: Path, tmp_path: Path) -> None:
    # With dropout, augmentation and random positives, which differ between micro-batches.
    def weights(name: str, *max_steps: int) -> dict[str, torch.Tensor]:
        for last_step in max_steps:
            options = {"epochs": 2, "batch_size": 4, "accumulation_steps": 2, "eval_every": 0}
            train = TrainConfig(**options, max_steps=last_step)
            config = tiny_config(shapes, tmp_path / name, train=train, resume="auto")
            trainer = build_trainer(config, WORKER)
            trainer.train()
        return trainer.model.state_dict()

    straight, resumed = weights("straight", 4), weights("resumed", 1, 4)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_losses_add_up() -> None:
    parts = [
        LossOutput(torch.tensor(float(i)), {"a": torch.tensor([1.0, i]), "b": torch.tensor([2.0])})
        for i in (1, 2, 3)
    ]
    total, terms = add_losses(parts)
    assert total == 6
    assert {name: term.tolist() for name, term in terms.items()} == {"a": [3.0, 6.0], "b": [6.0]}
    assert add_losses(parts[:1]) is parts[0]


def test_batch_size_must_fit_the_micro_batches() -> None:
    with pytest.raises(ValueError, match=r"\(4\).*divisible by 8 \(2 processes x 4 micro-batches"):
        rank_batch_size(4, world_size=2, accumulation_steps=4)
