from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine.helpers import TINY_MODEL

from msdetr.config import ModelConfig, RunConfig, TrainConfig, config_to_dict
from msdetr.engine.checkpoint import (
    Checkpoint,
    changed_fields,
    check_resumable,
    checkpoint_path,
    find_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    write_atomically,
)

LABEL_MAP = {"category_ids": [1], "labels": [0], "names": ["a"], "num_classes": 1}


def make_checkpoint(step: int, model: ModelConfig = TINY_MODEL) -> Checkpoint:
    return Checkpoint(
        model={"weight": torch.full((3,), float(step))},
        optimizer={"weight": {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(3)}},
        step=step,
        epoch=step // 10,
        steps_per_epoch=10,
        config=config_to_dict(RunConfig(model=model)),
        label_map=LABEL_MAP,
        world_size=1,
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = make_checkpoint(1234)
    path = save_checkpoint(saved, tmp_path, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00001234.pt"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.model["weight"], saved.model["weight"])
    assert loaded.optimizer["weight"]["step"] == 1234
    for name in ("step", "epoch", "steps_per_epoch", "config", "label_map", "world_size"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.run_config == RunConfig(model=TINY_MODEL)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(make_checkpoint(step), tmp_path, keep=2)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [15, 20]


def test_unreadable_later_files_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save_checkpoint(make_checkpoint(5), tmp_path, keep=1)
    checkpoint_path(tmp_path, 30).write_bytes(b"half a file")
    save_checkpoint(make_checkpoint(6), tmp_path, keep=1)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [6, 30]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pt"
    write_atomically(path, {"value": 1})

    def fail(payload: object, file: object) -> None:
        file.write(b"the first half")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, {"value": 2})
    assert torch.load(path, weights_only=True) == {"value": 1}


def test_killed_while_writing(tmp_path: Path) -> None:
    save_checkpoint(make_checkpoint(1), tmp_path, keep=3)
    script = (
        "import sys, torch; from pathlib import Path;"
        "from msdetr.engine.checkpoint import write_atomically\n"
        "class Slow:\n"
        "    def __reduce__(self):\n"
        "        print('writing', flush=True); import time; time.sleep(60)\n"
        "write_atomically(Path(sys.argv[1]), {'a': torch.zeros(1000), 'b': Slow()})\n"
    )
    path = checkpoint_path(tmp_path, 2)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(path.parent.glob("*.partial"))
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest[1].step == 1
    save_checkpoint(make_checkpoint(3), tmp_path, keep=3)
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "foreign"])
def test_fallback_to_the_previous_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    save_checkpoint(make_checkpoint(1), tmp_path, keep=3)
    path = save_checkpoint(make_checkpoint(2), tmp_path, keep=3)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"garbage" * 100)
    with caplog.at_level(logging.WARNING):
        newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest[1].step == 1
    assert "PASSING OVER THE CHECKPOINT OF STEP 2" in caplog.text
    with pytest.raises(ValueError, match=path.name):
        load_checkpoint(path)


def test_no_checkpoint_and_no_readable_checkpoint(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    save_checkpoint(make_checkpoint(1), tmp_path, keep=1).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        load_newest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**vars(make_checkpoint(1)), "epoch": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def resumable(config: RunConfig, **changes: object) -> None:
    arguments = {"steps_per_epoch": 10, "label_map": LABEL_MAP} | changes
    check_resumable(make_checkpoint(1), config, **arguments)  # type: ignore[arg-type]


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


def test_changed_fields() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None}
    now = {"a": {"b": 2, "c": [1]}, "d": 3}
    assert changed_fields(before, now) == [("a.b", 1, 2), ("d", None, 3)]
