"""A run reads each annotation file once, however often it evaluates."""

from __future__ import annotations

import builtins
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import tiny_config, write_shapes

from msdetr.cli import evaluate
from msdetr.config import TrainConfig
from msdetr.engine.distributed import Worker
from msdetr.engine.run import build_trainer
from msdetr.evaluation.coco_eval import CocoEvaluator


def test_annotation_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    num_evaluations = 0
    real_open, real_summarize = io.open, CocoEvaluator.summarize

    def counted_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened[Path(file).name if isinstance(file, str | Path) else ""] += 1
        return real_open(file, *args, **kwargs)

    def counted_summarize(evaluator: CocoEvaluator) -> object:
        nonlocal num_evaluations
        num_evaluations += 1
        return real_summarize(evaluator)

    root = write_shapes(tmp_path / "data", num_train=4, num_val=2)
    train = TrainConfig(epochs=2, batch_size=4, eval_every=1)
    config = tiny_config(root, tmp_path / "run", train=train)
    for module in (builtins, io):  # paths use the latter
        monkeypatch.setattr(module, "open", counted_open)
    monkeypatch.setattr(CocoEvaluator, "summarize", counted_summarize)
    build_trainer(config, Worker(device=torch.device("cpu"))).train()
    assert num_evaluations == 2
    assert opened["instances_train2017.json"] == opened["instances_val2017.json"] == 1

    weights = config.output / "weights.safetensors"
    evaluate.main(["--checkpoint", str(weights), "--data.root", str(root), "--device", "cpu"])
    assert opened["instances_val2017.json"] == 2


def test_errors_of_both_splits_end_a_run_before_it_starts(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "data", num_train=4, num_val=2)
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}2017.json"
        file.write_text(file.read_text().replace('"bbox": [', '"bbox": [NaN, '))
    train = TrainConfig(epochs=1, batch_size=4, eval_every=1)
    config = tiny_config(root, tmp_path / "run", train=train)
    with pytest.raises(ValueError, match=r"(?s)instances_train2017.*instances_val2017"):
        build_trainer(config, Worker(device=torch.device("cpu")))
    assert not config.output.exists()
