"""The benchmark of assignment: what it times, what it refuses, and the rows that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.assignment import measure
from benchmarks.assignment.cases import Case, Inputs
from benchmarks.assignment.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    dense_one_to_one,
)
from benchmarks.assignment.measure import (
    Options,
    choose_implementations,
    main,
    plan,
    time_in_turns,
)

CPU = torch.device("cpu")
TINY = ["--batches", "2", "--queries", "12", "--targets", "3", "--anchors", "20"]
TINY += ["--repetitions", "2", "--device", "cpu"]
ROW_FIELDS = {
    "benchmark": str,
    "implementation": str,
    "task": str,
    "batch": int,
    "queries": int,
    "targets": int,
    "layers": int,
    "p20_us": float,
    "p50_us": float,
    "p80_us": float,
    "device_us": type(None),
    "launches": int,
    "host_waits": int,
    "speedup": float,
    "repetitions": int,
    "status": str,
    "device": str,
    "torch": str,
    "triton": (str, type(None)),
    "commit": str,
    "threads": int,
}


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    durations = time_in_turns(calls, CPU, repetitions=2)
    assert order == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in durations.items()} == {"a": 2, "b": 2}


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.json"
    assert main([*TINY, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {(row["task"], row["implementation"]) for row in rows} == {
        ("one_to_many", "reference"),
        ("one_to_many", "published"),
        *(
            (task, name)
            for task in ("one_to_one", "encoder")
            for name in ("reference", "published", "scipy")
        ),
    }
    for row in rows:
        assert row.keys() == ROW_FIELDS.keys()
        for name, kind in ROW_FIELDS.items():
            assert isinstance(row[name], kind), name
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["status"] == "ok"
        assert row["launches"] > 10
        is_encoder = row["task"] == "encoder"
        assert (row["layers"], row["queries"]) == ((1, 20) if is_encoder else (6, 12))
        if row["implementation"] == "published":
            assert row["speedup"] == 1.0
    waits = {(row["task"], row["implementation"]): row["host_waits"] for row in rows}
    assert waits["one_to_many", "reference"] == 0
    assert waits["one_to_many", "published"] > 6 * 2 * 3
    assert waits["one_to_one", "reference"] == 2
    assert waits["one_to_one", "published"] == 6
    assert waits["one_to_one", "scipy"] == 6 * 2
    assert "host_waits" in capsys.readouterr().out


@pytest.mark.parametrize(("least", "status"), [(0.0, 0), (1e9, 1)])
def test_check_compares_with_what_is_asked(
    least: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_assignment, "CHECKED", Case("one_to_many", 2, 12, 3))
    monkeypatch.setattr(bench_assignment, "LEAST_SPEEDUP", least)
    assert main(["--check", "--repetitions", "2", "--device", "cpu"]) == status
    printed = capsys.readouterr().out
    assert ("times as fast, not" in printed) == bool(status)
    assert "required: one-to-many at batch 2, 12 queries and 3 targets" in printed


def test_what_the_check_requires() -> None:
    assert bench_assignment.LEAST_SPEEDUP == 10.0
    assert plan(Options(check=True), CPU) == [Case("one_to_many", 16, 300, 7)]
    names = [found.name for found in choose_implementations(Options(check=True), CPU)]
    assert names == ["reference", "published"]


def test_one_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_queries(inputs: Inputs) -> tuple[Tensor, Tensor]:
        query, mask = dense_one_to_one(inputs, "reference")
        return torch.arange(query.shape[1]).expand_as(query), mask

    wrong = Implementation(name="scipy", one_to_one=first_queries)
    monkeypatch.setitem(IMPLEMENTATIONS, "scipy", wrong)
    assert main([*TINY, "--tasks", "encoder", "--implementations", "scipy"]) == 1
    assert "wrong: values differ" in capsys.readouterr().out


def test_what_needs_too_much_memory_is_left_out() -> None:
    case = Case("encoder", 32, 22223, 100)
    assert IMPLEMENTATIONS["published"].gigabytes(case) > 50
    assert IMPLEMENTATIONS["reference"].gigabytes(case) < 4
    assert IMPLEMENTATIONS["published"].gigabytes(Case("one_to_many", 32, 900, 100)) < 1
    assert main([*TINY, "--tasks", "encoder", "--memory", "1e-9"]) == 0


def test_typical_cases_come_first() -> None:
    cases = plan(Options(), CPU)
    assert len(cases) == len(set(cases)) == 2 * 4 * 2 * 4 + 4 * 4
    assert cases[:3] == [
        Case("one_to_many", 16, 300, 20),
        Case("one_to_one", 16, 300, 20),
        Case("encoder", 16, 2223, 20),
    ]
    assert plan(Options(), torch.device("cuda"))[2] == Case("encoder", 16, 22223, 20)


def test_kernels_are_not_timed_on_a_cpu() -> None:
    names = [found.name for found in choose_implementations(Options(), CPU)]
    assert names == ["reference", "published", "scipy"]
    with pytest.raises(ValueError, match="on a GPU only"):
        choose_implementations(Options(implementations=("msdetr",)), CPU)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--implementations", "nobody"], "known are msdetr, reference"),
        (["--batches", "0"], "batches must be at least 1"),
        (["--targets", "-1"], "targets must not be negative"),
        (["--anchors", "0"], "anchors must be at least 1"),
        (["--repetitions", "1"], "repetitions must be at least 2"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.gpu
def test_rows_of_kernels(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main([*TINY[:-1], "cuda", "--output", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text()) if row["implementation"] == "msdetr"]
    assert {row["task"] for row in rows} == {"one_to_many", "one_to_one", "encoder"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["host_waits"] == 0
        assert row["device_us"] > 0
