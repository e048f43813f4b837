"""The steps of `make gpu` can run, fit into their time, and do not stop each other."""

from __future__ import annotations

import fcntl
import json
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.assignment import measure as assignment
from benchmarks.attention import measure as attention
from benchmarks.attention import tune
from benchmarks.detector import inference, profile, query_sets, supervision, syncs, train
from benchmarks.gpu import driver as driver_module
from benchmarks.gpu.__main__ import main as gpu_main
from benchmarks.gpu.driver import ROOT, Driver, install
from benchmarks.gpu.steps import ATTENTION_KERNELS, COMMANDS, Step
from benchmarks.gpu.wheelhouse import needed, project_requirements, requirements_of
from msdetr.cli.demo import DemoOptions
from msdetr.cli.options import parse_options, parse_preset

STEPS = [step for steps, _ in COMMANDS.values() for step in steps]
OPTIONS: dict[str, Any] = {
    "benchmarks.attention": attention.Options,
    "benchmarks.attention tune": tune.Options,
    "benchmarks.assignment": assignment.Options,
    "benchmarks.detector train": train.Options,
    "benchmarks.detector inference": inference.Options,
    "benchmarks.detector profile": profile.Options,
    "benchmarks.detector query_sets": query_sets.Options,
    "benchmarks.detector supervision": supervision.Options,
    "benchmarks.detector syncs": syncs.Options,
    "msdetr.cli.main demo": DemoOptions,
}


def words_of(step: Step, tmp_path: Path, *, rehearse: bool = False) -> list[str]:
    (tmp_path / "published" / "models").mkdir(parents=True, exist_ok=True)
    published = tmp_path / "published"
    driver = Driver("run", tmp_path / "out", tmp_path, 1, published=published, rehearse=rehearse)
    return driver.words(step, step.seconds)


def check_tests(words: list[str]) -> None:
    """Every test file, class and function that pytest is to run or to ignore exists."""
    named = [word.split("::") for word in words if word.startswith("tests/")]
    assert named or "-m" in words
    for file, *names in named:
        text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        assert (ROOT / file).exists(), file
        for name in names:
            assert re.search(rf"^ *(?:class|def) {name}\b", text, re.MULTILINE), (file, name)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_commands_are_valid(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words = words_of(step, tmp_path)
    rehearsed = words_of(step, tmp_path, rehearse=True)
    assert rehearsed[0] == sys.executable
    # Of repeated options the last counts.
    assert "--device" not in rehearsed or {"cpu", "pretend", "--help"} & set(rehearsed)
    words = words[words.index(sys.executable) + 1 :]
    if words[0] == "train.py":
        parse_preset(words[1:], prog="train.py")
    elif words[:2] == ["-m", "pytest"]:
        check_tests(words[2:])
    else:
        name = " ".join(words[1:3])
        if name not in OPTIONS:
            name = words[1]
        options = parse_options(OPTIONS[name], words[1 + len(name.split()) :], prog=name)
        written = (getattr(options, name, None) for name in ("output", "trace", "table"))
        files = {
            path.name for path in written if path is not None and path.parent == tmp_path / "out"
        }
        assert step.program or files == set(step.outputs)
        if step.program is None and hasattr(options, "time_budget"):
            assert 5 <= options.time_budget == step.seconds - step.reserve


def test_times_and_files() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    for steps, seconds in COMMANDS.values():
        assert sum(step.seconds for step in steps) <= seconds
        files = [name for step in steps for name in step.outputs]
        assert len(set(files)) == len(files)
    kernels = "".join(path.read_text() for path in (ROOT / "msdetr" / "kernels").glob("**/*.py"))
    for name in ATTENTION_KERNELS:
        assert f"def {name}(" in kernels
    page = (ROOT / "docs" / "gpu-todo.md").read_text()
    assert [step.name for step in STEPS if f"`{step.name}`" not in page] == []


def script(text: str, **changes: Any) -> Step:
    return Step(**{"name": text, "seconds": 5, "rehearsal": "", **changes, "command": text})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Runs steps whose commands are statements of Python; returns the rows of the report."""
    monkeypatch.setattr(driver_module, "GRACE", 2.0)
    monkeypatch.setattr(driver_module, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(Step, "program", None)
    monkeypatch.setattr(
        Driver,
        "words",
        lambda self, step, limit: [
            sys.executable,
            "-c",
            step.command.replace("OUT", str(tmp_path)),
        ],
    )

    def run_steps(*steps: Step, seconds: float, status: int) -> list[dict[str, Any]]:
        assert Driver("run", tmp_path, tmp_path / "work", seconds).run(steps) == status
        rows: list[dict[str, Any]] = json.loads((tmp_path / "gpu_run.json").read_text())
        return rows

    return run_steps


def test_a_failure_does_not_stop_the_others(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = run(
        script("raise SystemExit(3)"),
        script("print('written'); open('OUT/rows.json', 'w')", outputs=("rows.json",)),
        script("pass", outputs=("absent.json",)),
        script("{published}"),
        seconds=60,
        status=1,
    )
    assert [row["status"] for row in rows] == [
        "failed: exit status 3",
        "ok",
        "failed: it wrote no absent.json",
        "skipped: the folder of the published code was not given",
    ]
    assert "\nwritten\n" in (tmp_path / "gpu_run.log").read_text()
    # The time of later steps is reserved, except for the one that is skipped.
    assert [row["limit"] for row in rows][:1] == [50]


def test_a_step_that_exceeds_its_time_ends_with_its_children(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    # It holds a lock until it ends, and ignores the interrupt.
    child = (
        "import fcntl, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "file = open('OUT/lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(60)"
    )
    begin = time.monotonic()
    rows = run(
        script(
            "import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "try: time.sleep(60)\n"
            "except KeyboardInterrupt: print('interrupted', flush=True)",
            seconds=12,
        ),
        script("print('next')"),
        seconds=17,
        status=1,
    )
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - begin < 30
    assert [row["status"] for row in rows[:2]] == ["stopped after 12 s", "ok"]
    assert "\ninterrupted\n" in (tmp_path / "gpu_run.log").read_text()


def test_spare_time_goes_to_steps_that_take_it(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = run(script("pass", takes_spare=False), script("1"), seconds=60, status=0)
    assert rows[0]["limit"] == 5
    assert rows[1]["limit"] > 40


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "--only", "attenton"], 2, "invalid choice: 'attenton' (choose from "),
        (["run"], 1, "nothing can run here: RuntimeError: "),
    ],
)
def test_refusals(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["gpu", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(gpu_main())
    assert ended.value.code == status
    assert message in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_no_step_begins_without_time(run: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = run(script("pass"), seconds=0.5, status=0)
    assert (row["status"], row["seconds"]) == ("skipped: no time left", 0.0)


def write_wheel(folder: Path, name: str, *requirements: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_those_that_the_machine_lacks(tmp_path: Path) -> None:
    names = needed(project_requirements(), ("torch", "torchvision", "numpy", "Pillow"))
    assert {"hotcoco", "tyro", "pytest", "pytest-xdist", "scipy"} <= names.keys()
    assert not {"torch", "numpy", "pillow"} & names.keys()
    assert names["hotcoco"] == "hotcoco==1.3.0"
    wheel = write_wheel(
        tmp_path,
        "some",
        "torch>=2",
        'tomli; python_version < "3.11"',
        "typeguard>=4",
        'x; extra == "y"',
    )
    assert needed(requirements_of(wheel), ("torch",)) == {"typeguard": "typeguard>=4"}


@pytest.mark.parametrize("with_broken", [False, True])
def test_only_missing_packages_are_installed(
    with_broken: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path, "torch")
    write_wheel(tmp_path, "not_there_yet", "torch>=99")
    if with_broken:
        (tmp_path / "broken-1.0-py3-none-any.whl").write_text("")
    install(tmp_path, tmp_path / "packages")
    assert (tmp_path / "packages" / "not_there_yet.py").is_file()
    assert not list((tmp_path / "packages").glob("torch*"))
    assert ("not installed: broken-1.0" in capfd.readouterr().out) == with_broken
