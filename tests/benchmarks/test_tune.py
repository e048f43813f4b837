"""Tuning of the deformable attention kernels, without a GPU and without its times."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.attention import tune
from benchmarks.attention.cases import SHAPES, Case
from benchmarks.attention.tune import Options, Work, candidates, fastest, using, write_table
from msdetr.kernels.ms_deform_attn import configs
from msdetr.kernels.ms_deform_attn import launch as launchers
from msdetr.kernels.ms_deform_attn.configs import (
    DirectConfig,
    WindowConfig,
    default_windows,
    tile_config,
    value_config,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMALL_TILE = DirectConfig(block_q=16, tile_x=4, split_d=8, num_warps=1)
ROW = {
    "architecture": "sm_90",
    "kernel": "forward",
    "dtype": "bfloat16",
    "head_dim": 32,
    "queries": "grid",
    "config": dataclasses.asdict(SMALL_TILE),
    "p50_us": 1.0,
    "device": "some GPU",
    "triton": "3.9.0",
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty table in place of the project's, on an H100."""
    path = tmp_path / "table.json"
    path.write_text("[]\n")
    monkeypatch.setattr(configs, "TABLE", path)
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    configs.forget()
    yield path
    monkeypatch.undo()
    configs.forget()


@pytest.fixture
def work() -> Work:
    return Work([Case("tiny", SHAPES["tiny"], 1, torch.float32, 1.0)], DEVICE)


def in_use(kernel: str, *, can_window: bool = True) -> DirectConfig | WindowConfig:
    """The configuration for an encoder of 8 images in bfloat16."""
    if kernel == "windows":
        return value_config(
            torch.bfloat16, 32, 10**6, num_points=4, is_grid=True, can_window=can_window
        )
    return tile_config(kernel, torch.bfloat16, 32, 10**6, is_grid=True)


class PretendedWork:
    """Results and, with `timer`, times that depend on the configuration in use."""

    def __init__(self, results: dict[int, float], seconds: dict[int, float]) -> None:
        self.results, self.seconds = results, seconds

    def calls(self, kernel: str) -> list[list[Any]]:
        def call() -> Tensor:
            block_q = in_use(kernel).block_q
            if block_q not in self.results:
                raise RuntimeError("out of resources")
            return torch.full((3,), self.results[block_q])

        return [[call, call], [call, call]]

    def timer(self, calls: Any) -> list[float]:
        return [self.seconds[in_use("forward").block_q]]


def direct(block_q: int) -> DirectConfig:
    return dataclasses.replace(SMALL_TILE, block_q=block_q)


def test_the_fastest_right_candidate_wins(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = in_use("forward").block_q
    # 16 is wrong, 32 cannot run, 128 is the fastest of the others.
    pretended = PretendedWork(
        results={16: 1.1, 128: 1.0005, 256: 1.0, default: 1.0},
        seconds={16: 0.1, 32: 0.1, 128: 0.5, 256: 0.6, default: 0.9},
    )
    choices = [direct(size) for size in (default, 16, 32, 128, 256)]
    assert fastest("forward", choices, pretended, pretended.timer) == (direct(128), 0.5)
    printed = capsys.readouterr().out
    assert "its result is off by 1.0e-01" in printed
    assert "RuntimeError: out of resources" in printed
    assert in_use("forward").block_q == default
    with pytest.raises(ValueError, match="no configuration of forward works"):
        fastest("forward", [direct(16), direct(32)], pretended, pretended.timer)
    # The time is the mean over spreads of the medians.
    times = iter([[3.0, 1.0, 2.0], [6.0]])
    winner = fastest("forward", [direct(default)], pretended, lambda _: next(times))
    assert winner.seconds == 4.0


class RecordingKernel:
    """Replaces a kernel, and keeps the tile and the options of its launches."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            tile = arguments[-1]
            self.launches.append({**tile._asdict(), **options})

        return launch


def test_an_override_reaches_the_launch(
    table: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = RecordingKernel()
    monkeypatch.setattr(launchers, "forward_kernel", kernel)
    ((launch, _),) = work.calls("forward")
    launch()
    with using("forward", SMALL_TILE):
        launch()
    launch()
    before, forced, after = kernel.launches
    assert before == after != forced
    names = ("BLOCK_Q", "TILE_X", "SPLIT_D", "num_warps")
    assert [forced[name] for name in names] == [16, 4, 8, 1]


def test_overrides_nest(table: Path) -> None:
    with configs.override({"value": dataclasses.asdict(SMALL_TILE)}):
        assert in_use("windows") == default_windows(32)
        with using("windows", None):
            assert in_use("windows") == SMALL_TILE
        other = dataclasses.replace(default_windows(32), side=8)
        with using("windows", other):
            assert in_use("windows") == other
            assert in_use("windows", can_window=False) == SMALL_TILE
        assert in_use("windows") == default_windows(32)
    assert in_use("value") != SMALL_TILE


def test_the_table_is_used_once_written(table: Path) -> None:
    assert in_use("forward") != SMALL_TILE
    write_table(table, [ROW, {**ROW, "architecture": "sm_80"}, {**ROW, "dtype": "float32"}])
    assert in_use("forward") == SMALL_TILE
    windows = dataclasses.replace(default_windows(32), side=32, block_y=4)
    write_table(table, [{**ROW, "kernel": "windows", "config": dataclasses.asdict(windows)}])
    assert in_use("windows") == windows
    # Without windows: the table's direct configuration. Rows of other cases are kept.
    no_windows = {**ROW, "kernel": "windows", "config": {}}
    write_table(table, [no_windows, {**ROW, "kernel": "value"}, {**ROW, "p50_us": 2.0}])
    assert in_use("windows") == SMALL_TILE
    rows = json.loads(table.read_text())
    assert [row["p50_us"] for row in rows if row["kernel"] == "forward"] == [1.0, 2.0, 1.0]
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("kernel", "every"),
    [("forward", 12), ("points", 16), ("value", 12), ("windows", 13), ("lists", 1)],
)
def test_kernels_run_with_the_candidates(kernel: tune.Kernel, every: int) -> None:
    """Some candidates of each kernel; `fastest` compares their results."""
    shape = "tiny-decoder" if kernel == "lists" else "tiny"
    work = Work([Case(shape, SHAPES[shape], 1, torch.float32, 1.0)], DEVICE)
    choices = candidates(kernel, torch.float32, 16, "grid")[::every]
    timed: list[Any] = []

    def timer(calls: Any, timed: list[Any] = timed) -> list[float]:
        timed.append(calls)
        return [float(-len(timed))]

    # A candidate is timed if its result is right.
    assert fastest(kernel, choices, work, timer).config == choices[-1]
    assert len(timed) == len(choices) >= 2


def test_rows_of_a_run(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, windows = [direct(16), direct(32)], [None, default_windows(16)]
    monkeypatch.setattr(tune, "_WORK", dict.fromkeys(("grid", "few", "many"), ("tiny", 1)))
    monkeypatch.setattr(
        tune,
        "candidates",
        lambda kernel, *_: windows if kernel in ("windows", "lists") else small,
    )
    used: dict[str, Any] = {}

    def pretended(kernel: str, choices: Any, work: Work, timer: Any) -> tune.Winner:
        used.setdefault(kernel, in_use("windows", can_window=False))
        return tune.Winner(choices[choices is small], 1e-3)

    monkeypatch.setattr(tune, "fastest", pretended)
    options = Options(queries=("grid", "few"), dtypes=("bfloat16",))
    rows = list(tune.tune(options, DEVICE, lambda calls: [1.0]))
    assert [(row["kernel"], row["queries"]) for row in rows] == [
        *((kernel, "grid") for kernel in ("forward", "points", "value", "windows", "lists")),
        *((kernel, "few") for kernel in ("forward", "points", "value", "lists")),
    ]
    assert (rows[2]["config"], rows[3]["config"]) == (dataclasses.asdict(direct(32)), {})
    assert rows[3].keys() == ROW.keys()
    # Windows and lists compete with the direct configuration that was just chosen.
    assert used["windows"] == used["lists"] == direct(32) != used["value"]


def test_each_kernel_gets_its_share_of_the_time(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "_WORK", dict.fromkeys(("grid", "few"), ("tiny", 1)))
    monkeypatch.setattr(tune, "candidates", lambda *_: [direct(size) for size in (16, 32, 64, 128)])
    now = 0.0
    measured: list[str] = []

    def pretended(kernel: str, choices: Any, work: Work, timer: Any) -> tune.Winner:
        nonlocal now
        for config in choices:
            now += 10.0
            measured.append(kernel)
            winner = tune.Winner(config, 1e-3)
        return winner

    monkeypatch.setattr(tune, "fastest", pretended)
    options = Options(
        queries=("few", "grid"),
        kernels=("value", "lists", "windows"),
        dtypes=("bfloat16",),
        time_budget=110.0,
    )
    assert len(list(tune.tune(options, DEVICE, lambda calls: [1.0], clock=lambda: now))) == 5
    # Of 110 s, 22 are for the first. A candidate that has begun ends, and two are measured anyway.
    groups = [(kernel, len(list(same))) for kernel, same in itertools.groupby(measured)]
    assert groups == [("value", 3), ("lists", 3), ("value", 2), ("lists", 2), ("windows", 2)]
    assert "no time for 1 of 4" in capsys.readouterr().out


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(tune, "_WORK", {"grid": ("tiny", 1)})
    choices = candidates("forward", torch.bfloat16, 16, "grid")[:3]
    monkeypatch.setattr(tune, "candidates", lambda *_: choices)
    arguments = ["--queries", "grid", "--dtypes", "bfloat16", "--kernels", "forward"]
    assert tune.main([*arguments, "--repetitions", "3", "--table", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert row["architecture"] == configs.architecture()
    assert DirectConfig(**row["config"]) in choices
    assert row["p50_us"] > 0
