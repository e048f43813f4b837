"""Tuning of the deformable attention kernels, without a GPU and without its times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.attention import tune as tune
from benchmarks.device_time import Timing
from benchmarks.attention.cases import DTYPES, SHAPES, Case
from benchmarks.attention.tune import Options, Work, candidates, fastest, using, write_table
from msdetr.kernels import ms_deform_attn as launchers
from msdetr.kernels import ms_deform_attn_configs as configs
from msdetr.kernels.ms_deform_attn_configs import (
    FEW_ROWS,
    DirectConfig,
    WindowConfig,
    default_config,
    default_windows,
    tile_config,
    value_config,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DIRECT = ("forward", "points", "value")
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
    """An empty table in the place of the project's, on an H100."""
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


def is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("head_dim", [16, 20, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("queries", ["grid", "few", "many"])
@pytest.mark.parametrize("kernel", DIRECT)
def test_direct_candidates_can_be_launched(
    kernel: str, queries: str, dtype: torch.dtype, head_dim: int
) -> None:
    found = candidates(kernel, dtype, head_dim, queries)
    assert found[0] == default_config(kernel, dtype, head_dim, queries)
    assert 8 <= len(found) <= 48
    assert len(set(found)) == len(found)
    for config in found:
        assert all(map(is_power_of_2, (config.block_q, config.split_d, config.num_warps)))
        assert config.split_d < 2 * head_dim
        assert config.num_warps <= 8
        if queries == "grid":
            assert config.tile_x == 0 or config.block_q % config.tile_x == 0
        else:
            assert config.tile_x == 0


def test_window_candidates_can_be_launched() -> None:
    none, default, *others = candidates("windows", torch.bfloat16, 32, "grid")
    assert none is None
    assert default == default_windows(32)
    assert 10 <= len(others) <= 48
    assert len({none, default, *others}) == 2 + len(others)
    for config in others:
        sides = (config.side, config.coarse_side, config.block_y, config.num_warps)
        assert all(map(is_power_of_2, sides))
        assert config.block_y <= min(config.side, config.coarse_side)
        # The tensor cores' tiles have 16 rows at least.
        assert config.block_y * config.coarse_side >= 16


@pytest.mark.parametrize("queries", ["grid", "few", "many"])
def test_cases_are_of_their_kind(queries: str, table: Path) -> None:
    name, batch = tune._WORK[queries]
    shape = SHAPES[name]
    assert (shape.num_queries is None) == (queries == "grid")
    if shape.num_queries is not None:
        num_rows = batch * shape.num_heads * shape.num_queries
        assert ("few" if num_rows < FEW_ROWS else "many") == queries


def in_use(kernel: str) -> DirectConfig | WindowConfig:
    """What would be launched for an encoder of 8 images in bfloat16."""
    if kernel == "windows":
        return value_config(torch.bfloat16, 32, 10**6, num_points=4, is_grid=True, can_window=True)
    return tile_config(kernel, torch.bfloat16, 32, 10**6, is_grid=True)


class PretendedWork:
    """Results and, with `pretended_timer`, times that depend on what would be launched."""

    def __init__(self, results: dict[int, float], seconds: dict[int, float]) -> None:
        self.results, self.seconds = results, seconds

    def calls(self, kernel: str) -> list[list[Any]]:
        def call() -> Tensor:
            block_q = in_use(kernel).block_q
            if block_q not in self.results:
                raise RuntimeError("out of resources")
            return torch.full((3,), self.results[block_q])

        return [[call, call]]

    def timer(self, calls: Any) -> Timing:
        return Timing("none", [self.seconds[in_use("forward").block_q]])


def direct(block_q: int) -> DirectConfig:
    return dataclasses.replace(SMALL_TILE, block_q=block_q)


def test_fastest_right_candidate_wins(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = in_use("forward").block_q
    # 16 is wrong, 32 cannot run, 128 is the fastest of the rest.
    pretended = PretendedWork(
        results={16: 1.1, 128: 1.0005, 256: 1.0, default: 1.0},
        seconds={16: 0.1, 32: 0.1, 128: 0.5, 256: 0.6, default: 0.9},
    )
    choices = [direct(size) for size in (default, 16, 32, 128, 256)]
    winner = fastest("forward", choices, pretended, pretended.timer)
    assert winner == (direct(128), 0.5)
    printed = capsys.readouterr().out
    assert "its result is off by 1.0e-01" in printed
    assert "RuntimeError: out of resources" in printed
    assert in_use("forward").block_q == default
    with pytest.raises(ValueError, match="no configuration of forward works"):
        fastest("forward", [direct(16), direct(32)], pretended, pretended.timer)


def test_time_is_the_mean_over_spreads(table: Path) -> None:
    class TwoSpreads(PretendedWork):
        def calls(self, kernel: str) -> list[list[Any]]:
            return super().calls(kernel) * 2

    default = in_use("forward").block_q
    pretended = TwoSpreads({default: 1.0}, {})
    times = iter([[3.0, 1.0, 2.0], [6.0]])
    winner = fastest("forward", [direct(default)], pretended, lambda _: Timing("", next(times)))
    assert winner.seconds == 4.0


class RecordingKernel:
    """Stands in for a kernel, and notes the constants that it is launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.launches.append(constants)


def test_override_reaches_the_launch(
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
    assert before == after
    assert before["BLOCK_Q"] != 16
    assert (forced["BLOCK_Q"], forced["TILE_X"], forced["SPLIT_D"], forced["num_warps"]) == (
        16,
        4,
        8,
        1,
    )


def test_overrides_nest(table: Path) -> None:
    before = in_use("windows")
    assert before == default_windows(32)
    with configs.override({"value": dataclasses.asdict(SMALL_TILE)}):
        assert in_use("windows") == default_windows(32)
        with using("windows", None):
            assert in_use("windows") == SMALL_TILE
        other = dataclasses.replace(default_windows(32), side=8)
        with using("windows", other):
            assert in_use("windows") == other
        assert in_use("windows") == default_windows(32)
    assert in_use("value") != SMALL_TILE


def test_windows_are_not_forced_where_they_are_impossible(table: Path) -> None:
    with using("windows", default_windows(32)):
        found = value_config(
            torch.bfloat16, 32, 10**6, num_points=4, is_grid=True, can_window=False
        )
    assert isinstance(found, DirectConfig)


def test_table_is_used_once_written(table: Path) -> None:
    assert in_use("forward") != SMALL_TILE
    write_table(table, [ROW])
    assert in_use("forward") == SMALL_TILE
    assert json.loads(table.read_text()) == [ROW]

    windows = dataclasses.replace(default_windows(32), side=32, block_y=4)
    write_table(table, [{**ROW, "kernel": "windows", "config": dataclasses.asdict(windows)}])
    assert in_use("windows") == windows
    assert in_use("forward") == SMALL_TILE
    # No windows: the table's way without.
    write_table(
        table,
        [{**ROW, "kernel": "windows", "config": {}}, {**ROW, "kernel": "value"}],
    )
    assert in_use("windows") == SMALL_TILE
    assert len(json.loads(table.read_text())) == 3


def test_rows_for_other_cases_stay(table: Path) -> None:
    others = [{**ROW, "architecture": "sm_80"}, {**ROW, "dtype": "float32"}]
    write_table(table, [ROW, *others])
    write_table(table, [{**ROW, "p50_us": 2.0}])
    written = json.loads(table.read_text())
    assert [(row["architecture"], row["dtype"], row["p50_us"]) for row in written] == [
        ("sm_80", "bfloat16", 1.0),
        ("sm_90", "bfloat16", 2.0),
        ("sm_90", "float32", 1.0),
    ]


def test_new_table_file(tmp_path: Path, table: Path) -> None:
    write_table(tmp_path / "new" / "table.json", [ROW])
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == [ROW]


def test_kernels_run_with_the_candidates(work: Work) -> None:
    """Some of each kernel, whose results `fastest` compares."""
    chosen = {
        "forward": candidates("forward", torch.float32, 16, "grid")[1::12],
        "points": candidates("points", torch.float32, 16, "grid")[2::16],
        "value": candidates("value", torch.float32, 16, "grid")[1::12],
        "windows": candidates("windows", torch.float32, 16, "grid")[::13],
    }
    for kernel, choices in chosen.items():
        assert len(choices) >= 2
        seen: list[Any] = []

        def timer(calls: Any, seen: list[Any] = seen) -> Timing:
            seen.append(calls)
            return Timing("none", [float(-len(seen))])

        winner = fastest(kernel, choices, work, timer)
        # Every one was right, so that it was timed.
        assert len(seen) == len(choices)
        assert winner.config == choices[-1]


def test_rows_of_a_run(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [direct(16), direct(32)]
    windows = [None, default_windows(16)]
    monkeypatch.setattr(tune, "_WORK", dict.fromkeys(("grid", "few", "many"), ("tiny", 1)))
    monkeypatch.setattr(
        tune, "candidates", lambda kernel, *_: windows if kernel == "windows" else small
    )
    seen: list[tuple[str, Any]] = []

    def pretended(kernel: str, choices: Any, work: Work, timer: Any) -> tune.Winner:
        # Windows lose against the way without, which is the winner of just now.
        found = value_config(
            work.case.dtype, 16, 10**6, num_points=4, is_grid=True, can_window=False
        )
        seen.append((kernel, found))
        return tune.Winner(choices[0] if kernel == "windows" else choices[1], 1e-3)

    monkeypatch.setattr(tune, "fastest", pretended)
    options = Options(queries=("grid", "few"), dtypes=("bfloat16",))
    rows = list(tune.tune(options, DEVICE, lambda calls: Timing("none", [1.0])))
    assert [(row["kernel"], row["queries"]) for row in rows] == [
        ("forward", "grid"),
        ("points", "grid"),
        ("value", "grid"),
        ("windows", "grid"),
        ("forward", "few"),
        ("points", "few"),
        ("value", "few"),
    ]
    assert rows[2]["config"] == dataclasses.asdict(direct(32))
    assert rows[3]["config"] == {}
    assert rows[3].keys() == ROW.keys()
    assert rows[3]["p50_us"] == pytest.approx(1000.0)
    assert dict(seen[:4])["windows"] == direct(32)
    assert dict(seen[:3])["value"] != direct(32)


def test_time_budget_ends_in_good_order(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "_WORK", {"grid": ("tiny", 1)})
    monkeypatch.setattr(tune, "fastest", lambda *_: tune.Winner(direct(16), 1.0))
    times = iter([0.0, 1.0, 11.0])
    options = Options(queries=("grid",), dtypes=("float32",), time_budget=10.0)
    rows = list(tune.tune(options, DEVICE, lambda _: Timing("", []), clock=lambda: next(times)))
    assert [row["kernel"] for row in rows] == ["forward"]
    assert "time budget used up" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        tune.main([])
    assert exit_.value.code == 2
    assert "measured on a GPU, and there is none here" in capsys.readouterr().err


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
