from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import TINY_MODEL
from safetensors.torch import load_file
from torch import Tensor

from msdetr.config import ModelConfig, RunConfig, TrainConfig, config_to_dict
from msdetr.engine import checkpoint as checkpoint_module
from msdetr.engine.checkpoint import (
    Checkpoint,
    Progress,
    changed_fields,
    check_resumable,
    checkpoint_path,
    find_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from msdetr.engine.distributed import Worker
from msdetr.engine.tensor_files import TensorFolder, TensorsInMemory, read_tensors, write_tensors

WORKER = Worker(device=torch.device("cpu"))
LABEL_MAP = {"category_ids": [1], "labels": [0], "names": ["a"], "num_classes": 1}


def make_progress(step: int, model: ModelConfig = TINY_MODEL) -> Progress:
    return Progress(
        step=step,
        epoch=step // 10,
        steps_per_epoch=10,
        config=config_to_dict(RunConfig(model=model)),
        label_map=LABEL_MAP,
        world_size=1,
    )


def make_tensors(step: int) -> dict[str, Tensor]:
    return {
        "model.weight": torch.full((3,), float(step)),
        "model.scale": torch.full((2,), 0.5),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.weight.exp_avg": torch.arange(3.0),
    }


def save(run_folder: Path, step: int, *, keep: int = 3, **tensors: Tensor) -> Path:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return save_checkpoint(
        make_tensors(step) | named, make_progress(step), run_folder, WORKER, keep=keep
    )


def write_file(path: Path, **changes: object) -> None:
    """A checkpoint in the format of earlier versions."""
    content = {
        "model": {"weight": torch.full((3,), 7.0)},
        "optimizer": {"weight": {"step": torch.tensor(7.0), "exp_avg": torch.arange(3.0)}},
        **vars(make_progress(7)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 1234)
    assert path == tmp_path / "checkpoints" / "step-00001234"
    loaded = load_checkpoint(path)
    assert loaded.progress == make_progress(1234)
    assert loaded.progress.run_config == RunConfig(model=TINY_MODEL)
    expected = make_tensors(1234)
    index = loaded.tensors.index
    assert {name: x.shape for name, x in index.items()} == {n: x.shape for n, x in expected.items()}
    targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    loaded.tensors.load(targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in expected.items())
    assert not loaded.has_ema
    weights = loaded.weights()
    assert weights.keys() == {"weight", "scale"}
    assert torch.equal(weights["weight"], expected["model.weight"])


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = sorted(file.name for file in path.iterdir())
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert files == ["checkpoint.json", shard]
    assert load_file(path / shard).keys() == make_tensors(1).keys()
    listed = json.loads((path / "checkpoint.json").read_text())["files"]
    assert listed == {shard: (path / shard).stat().st_size}


def test_ema_weights(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 1, average__weight=torch.full((3,), 9.0)))
    assert checkpoint.has_ema
    assert checkpoint.weights()["weight"].tolist() == [9.0] * 3
    assert checkpoint.weights()["scale"].tolist() == [0.5] * 2  # has no EMA
    assert checkpoint.weights(ema=False)["weight"].tolist() == [1.0] * 3


def test_files_of_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000007.pt"
    write_file(path)
    save(tmp_path, 3)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [3, 7]
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.path, newest.progress) == (path, make_progress(7))
    assert newest.weights()["weight"].tolist() == [7.0] * 3
    targets = {"optimizer.weight.exp_avg": torch.zeros(3), "optimizer.weight.step": torch.zeros(())}
    newest.tensors.load(targets)
    assert targets["optimizer.weight.exp_avg"].tolist() == [0.0, 1.0, 2.0]
    assert targets["optimizer.weight.step"] == 7
    save(tmp_path, 8, keep=1)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [8]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [15, 20]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_unreadable_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 5, keep=1)
    checkpoint_path(tmp_path, 30).mkdir()
    save(tmp_path, 6, keep=1)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [6, 30]
    # The run reaches that step again, and replaces the unreadable checkpoint.
    save(tmp_path, 30, keep=1)
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.progress.step == 30


@pytest.mark.parametrize("fails", ["write_tensors", "write_and_sync"])
def test_a_failing_write_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save(tmp_path, 1, keep=1)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, fails, fail)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2, keep=1)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [1]
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.progress.step == 1
    save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_that_is_not_shared_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(tensors: dict[str, Tensor], folder: Path, worker: Worker) -> None:
        write_tensors(dict(list(tensors.items())[:2]), folder, worker)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_half)
    with pytest.raises(OSError, match="a disk that all machines share"):
        save(tmp_path, 1)
    assert find_checkpoints(tmp_path) == []


SLOW_WRITE = """
import sys, time
from pathlib import Path
import torch
from msdetr.engine import checkpoint
from msdetr.engine.checkpoint import Progress, save_checkpoint
from msdetr.engine.distributed import Worker

def stall(*_):
    print("writing", flush=True)
    time.sleep(60)

setattr(checkpoint, sys.argv[2], stall)
progress = Progress(
    step=2, epoch=0, steps_per_epoch=10, config={}, label_map={}, world_size=1
)
tensors = {"model.weight": torch.zeros(3)}
save_checkpoint(tensors, progress, Path(sys.argv[1]), Worker(device=torch.device("cpu")), keep=1)
"""


@pytest.mark.parametrize("stalls", ["write_tensors", "_finish"])
def test_killed_while_writing(tmp_path: Path, stalls: str) -> None:
    save(tmp_path, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, str(tmp_path), stalls],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    folder = tmp_path / "checkpoints"
    assert list(folder.glob("*.partial"))
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.progress.step == 1
    save(tmp_path, 3)
    assert not list(folder.glob("*.partial"))


def damage(path: Path, kind: str) -> None:
    (shard,) = path.glob("*.safetensors")
    metadata = path / "checkpoint.json"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif kind == "garbage":
        shard.write_bytes(b"g" * shard.stat().st_size)
    elif kind == "missing":
        shard.unlink()
    elif kind == "no metadata":
        metadata.unlink()
    elif kind == "half metadata":
        metadata.write_text(metadata.read_text()[:30])
    elif kind == "foreign metadata":
        metadata.write_text("{}")
    else:
        metadata.write_text(metadata.read_text().replace("checkpoint 2", "checkpoint 3"))


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "garbage",
        "missing",
        "no metadata",
        "half metadata",
        "foreign metadata",
        "future",
    ],
)
def test_fallback_to_the_previous_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path, kind)
    with caplog.at_level(logging.WARNING):
        newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.progress.step == 1
    assert "SKIPPING THE CHECKPOINT OF STEP 2" in caplog.text
    with pytest.raises(ValueError, match=path.name):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "foreign"])
def test_damaged_files_of_earlier_versions(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoints" / "step-00000007.pt"
    write_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "foreign":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"garbage" * 100)
    with pytest.raises(ValueError, match=path.name):
        load_checkpoint(path)


def test_no_checkpoint_and_no_readable_checkpoint(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    damage(save(tmp_path, 1), "missing")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        load_newest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "bad.pt", epoch=Malicious())
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    # The index that other formats of torch.distributed.checkpoint unpickle.
    path = save(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Malicious()))
    assert load_checkpoint(path).weights()["weight"].tolist() == [1.0] * 3
    assert not (tmp_path / "executed").exists()


def test_listed_files_stay_in_the_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"12345")
    content = json.loads((path / "checkpoint.json").read_text())
    content["files"]["../../outside"] = 5
    (path / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside is missing"):
        load_checkpoint(path)


def test_tensor_files_keep_values_dtypes_and_layout(tmp_path: Path) -> None:
    tensors = {
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "nothing": torch.zeros(0, 4),
    }
    write_tensors(tensors, tmp_path, WORKER)
    sources = TensorFolder(tmp_path), TensorsInMemory(tensors)
    for source in sources:
        read = read_tensors(source, "")
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
        target = torch.zeros_like(tensors["image"])
        source.load({"image": target})
        assert target.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(target, tensors["image"])
    assert read_tensors(sources[0], "im").keys() == {"age"}
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match=f"could not read {tmp_path}"):
        sources[0].load({"half": torch.zeros(7)})


def resumable(config: RunConfig, **changes: object) -> None:
    arguments: dict[str, Any] = {"steps_per_epoch": 10, "label_map": LABEL_MAP} | changes
    checkpoint = Checkpoint(Path("x"), make_progress(1), TensorsInMemory({}))
    check_resumable(checkpoint, config, **arguments)


def test_resuming_with_another_model_names_the_fields() -> None:
    model = dataclasses.replace(TINY_MODEL, hidden_dim=32, num_queries=9)
    with pytest.raises(ValueError, match=r"model\.hidden_dim was 16, is 32; model\.num_queries"):
        resumable(RunConfig(model=model))
    resumable(RunConfig(model=dataclasses.replace(TINY_MODEL, backbone_weights="elsewhere.pth")))


def test_resuming_with_other_data_is_refused() -> None:
    config = RunConfig(model=TINY_MODEL)
    with pytest.raises(ValueError, match="an epoch was 10 steps and is now 11"):
        resumable(config, steps_per_epoch=11)
    with pytest.raises(ValueError, match="other classes"):
        resumable(config, label_map={**LABEL_MAP, "names": ["b"]})


def test_other_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        resumable(RunConfig(model=TINY_MODEL, seed=7, train=TrainConfig(epochs=3), resume="auto"))
    assert "seed = 7 (was 42)" in caplog.text
    assert "train.epochs = 3 (was 12)" in caplog.text
    assert "resume =" not in caplog.text


def test_fields_that_an_earlier_version_lacked_are_no_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = make_progress(1)
    del progress.config["train"]["accumulation_steps"]
    checkpoint = Checkpoint(Path("x"), progress, TensorsInMemory({}))
    with caplog.at_level(logging.INFO):
        config = RunConfig(model=TINY_MODEL)
        check_resumable(checkpoint, config, steps_per_epoch=10, label_map=LABEL_MAP)
    assert caplog.text == ""


def test_changed_fields() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None}
    now = {"a": {"b": 2, "c": [1]}, "d": 3}
    assert changed_fields(before, now) == [("a.b", 1, 2), ("d", None, 3)]
