"""What each supervision costs, and how query sets attend, at sizes that take seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import table
from benchmarks.detector import denoising, query_sets, supervision
from benchmarks.detector.cases import Case, recipe
from benchmarks.detector.flops import detector_flops
from benchmarks.detector.query_sets import check_agreement, denoising_forms, forms
from benchmarks.detector.supervision import (
    check_comparable,
    groups_of,
    merged,
    over_baseline,
    pairs,
    too_slow,
)
from msdetr.config import RunConfig
from msdetr.model.query_sets import QuerySet

BASELINE = "deformable-detr-pp-r50-300"
SMALL = ["--height", "64", "--width", "64", "--batches", "1", "--device", "cpu"]


def test_a_recipe_is_a_preset_perhaps_with_denoising() -> None:
    model = recipe("tiny").model
    noised = recipe("tiny+dn").model
    assert (noised.denoising, noised.denoising_groups) == ("dn", 5)
    assert recipe("tiny+cdn").model.denoising == "contrastive"
    assert replace(recipe("tiny+cdn").model, denoising="none") == model
    with pytest.raises(ValueError, match="denoising 'group': known are dn, cdn"):
        Case(preset="tiny+group")
    with pytest.raises(ValueError, match="preset 'tinny'"):
        Case(preset="tinny+dn")


def step_row(preset: str, seconds: float, batch: int = 2) -> dict[str, Any]:
    case = {"implementation": "eager", "dtype": "float32", "batch": batch}
    return {**case, "preset": preset, "seconds_p50": seconds}


def test_pairs_of_recipes_write_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "rows.json"
    arguments = [*SMALL, "--presets", "tiny", "deformable-detr-r50", "--warmup", "0"]
    arguments += ["--steps", "1", "--output", str(path), "--check"]
    assert supervision.main(arguments) == 1
    assert "ms-detr-pp-r50-300 was not compared" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert [row["preset"] for row in rows] == ["tiny", "deformable-detr-r50"]
    assert [row["baseline"] for row in rows] == ["tiny", "tiny"]
    assert rows[0]["time_over_baseline"] == 1.0
    assert rows[1]["time_over_baseline"] == rows[1]["seconds_p50"] / rows[0]["seconds_p50"]
    assert rows[1]["time_over_baseline"] > 1.5
    assert rows[1]["peak_memory_mb"] > rows[0]["peak_memory_mb"] > 100
    assert rows[0]["triton_launches"] > rows[1]["triton_launches"] > 0

    monkeypatch.setattr(supervision, "with_launches", lambda measured, options: measured)
    arguments[arguments.index("deformable-detr-r50")] = "tiny+cdn"
    assert supervision.main([*arguments, "--merge"]) == 1
    stored = json.loads(path.read_text())
    assert stored[:2] == rows
    (row,) = stored[2:]  # the baseline of the commit is there already
    assert row["preset"] == "tiny+cdn"
    assert row["time_over_baseline"] == row["seconds_p50"] / row["baseline_seconds_p50"] > 1.0


def machine_rows(commit: str, *presets: str) -> list[dict[str, Any]]:
    where = {"commit": commit, "device": "a CPU", "height": 480, "width": 640}
    measured = (step_row(name, 2.0) for name in (BASELINE, *presets))
    return [{**row, **where} for row in over_baseline(measured, BASELINE)]


@pytest.mark.parametrize(
    ("presets", "expected"),
    [
        (["new"], ["one:base", "one:a", "one:b", "two:base", "two:new"]),
        (["b"], ["one:base", "one:a", "two:base", "two:b"]),
        (["a", "b"], ["two:base", "two:a", "two:b"]),
    ],
)
def test_rows_of_other_recipes_stay_with_their_baseline(
    presets: list[str], expected: list[str]
) -> None:
    rows = merged(machine_rows("one", "a", "b"), machine_rows("two", *presets))
    names = [f"{row['commit']}:{row['preset'].replace(BASELINE, 'base')}" for row in rows]
    assert names == expected


def test_rows_of_one_commit_share_a_baseline() -> None:
    rows = merged(machine_rows("one", "a"), machine_rows("one", "b"))
    assert [row["preset"] for row in rows] == [BASELINE, "a", "b"]


def test_rows_of_another_machine_are_not_merged() -> None:
    rows = machine_rows("one", "a")
    check_comparable(rows)
    with pytest.raises(ValueError, match="cannot be merged: device is a CPU and another CPU"):
        check_comparable([*rows, {**rows[0], "device": "another CPU"}])


def test_the_baseline_is_in_each_pair() -> None:
    names = ("tiny", "deformable-detr-r50", "ms-detr-r50-300")
    cases = [Case(preset=name, batch=batch) for name in names for batch in (1, 2)]
    paired = [
        [(case.preset, case.batch) for _, case in pair]
        for pair in pairs(groups_of(cases, ["eager"]))
    ]
    assert paired == [[("tiny", b), (name, b)] for b in (1, 2) for name in names[1:]]


def test_times_are_compared_within_a_pair() -> None:
    measured = [
        *(step_row(BASELINE, 2.0), step_row("ms-detr-pp-r50-300", 2.1)),
        *(step_row(BASELINE, 4.0), step_row("h-deformable-detr-r50", 5.0)),
        step_row("h-deformable-detr-r50", 5.0, batch=8),
    ]
    rows = list(over_baseline(measured, BASELINE))
    assert [row["time_over_baseline"] for row in rows] == [1.0, 1.05, 1.25, None]
    assert [row["seconds_p50"] for row in rows] == [2.0, 2.1, 5.0, 5.0]
    assert too_slow(rows) == []
    assert too_slow(over_baseline([step_row("ms-detr-pp-r50-300", 2.1)], BASELINE)) == [
        "ms-detr-pp-r50-300 was not compared with the baseline"
    ]
    (failure,) = too_slow([{**rows[1], "time_over_baseline": 1.07}])
    assert failure == "ms-detr-pp-r50-300 takes 1.070 of the baseline's time, not 1.06"


@pytest.mark.parametrize("presets", [["tiny"], ["tiny", "tiny"]])
def test_a_comparison_needs_two_recipes(
    presets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        supervision.main([*SMALL, "--presets", *presets])
    assert "give a baseline" in capsys.readouterr().err.replace("\n", " ")


def test_the_table_shows_the_published_cost() -> None:
    where = {"device": "a CPU", "torch": "2", "triton": "3", "commit": "abc"}
    where |= {"height": 480, "width": 640, "peak_memory_mb": 3072.0}
    measured = [step_row(BASELINE, 2.0), step_row("h-deformable-detr-r50", 2.5)]
    rows = [{**row, **where} for row in over_baseline(measured, BASELINE)]
    text = table.tables(table.SECTIONS["supervision"], rows)
    assert "**implementation eager, height 480, width 640" in text
    assert f"| {BASELINE} | 2 s | +0.0% | - | 3.0 GiB |" in text
    assert "| h-deformable-detr-r50 | 2.5 s | +25.0% | +31% | 3.0 GiB |" in text
    counted = [{**row, "triton_launches": 7} for row in rows]
    assert "3.0 GiB | 7 |" in table.tables(table.SECTIONS["supervision"], counted)


def test_extra_queries_take_operations_in_training_only() -> None:
    (without, hybrid, group), (expected, *inference) = (
        [
            detector_flops(Case(preset=name, batch=1, height=288, width=352), training=training)
            for name in (BASELINE, "h-deformable-detr-r50", "group-deformable-detr-r50")
        ]
        for training in (True, False)
    )
    assert 1.1 * without < hybrid < group
    # A group projects the proposals that it selects twice.
    assert inference == [expected, pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("sizes", [(3, 7), (4, 4, 4)])
def test_all_forms_attend_within_a_set(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, sum(sizes), 5, requires_grad=True) for _ in range(3)]
    calls = forms(inputs, sizes)
    assert len(calls) == 2 + (len(set(sizes)) == 1)
    check_agreement(calls, tolerance=1e-5)
    query, key, value = (x[:, :, : sizes[0]] for x in inputs)
    expected = (query @ key.transpose(2, 3) / 5**0.5).softmax(3) @ value
    torch.testing.assert_close(calls["mask"]()[0][:, :, : sizes[0]], expected)


def test_forms_that_differ_are_refused() -> None:
    calls = {"one": lambda: [torch.ones(2)], "other": lambda: [torch.tensor([1.0, 1.1])]}
    with pytest.raises(ValueError, match=r"'other' differs from the first form by 1\.0e-01"):
        check_agreement(calls, tolerance=1e-2)


def test_forms_write_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_queries": 6, "num_hybrid_queries": 10, "num_groups": 3, "denoising_queries": 12}

    def small_recipe(name: str) -> RunConfig:
        config = recipe(name)
        return replace(config, model=replace(config.model, **small))

    monkeypatch.setattr(query_sets, "recipe", small_recipe)
    path = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--repetitions", "3", "--num-slots", "4"]
    assert query_sets.main([*arguments, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    sizes = ["6+10"] * 2 + ["3x6"] * 3 + ["5x4+6"] * 3 + ["3x8+6"] * 3
    assert [row["sets"] for row in rows] == sizes
    for sets in set(sizes):
        assert min(row["over_fastest"] for row in rows if row["sets"] == sets) == 1.0


def test_all_forms_hide_other_groups_from_denoising_queries() -> None:
    torch.manual_seed(0)
    noised = QuerySet("denoising", group_size=2, num_groups=2, sees_primary=True)
    inputs = [torch.randn(2, 3, 4 + 5, 6, requires_grad=True) for _ in range(3)]
    calls = denoising_forms(inputs, noised)
    assert len(calls) == 3
    check_agreement(calls, tolerance=1e-5)
    second = [2, 3, *range(4, 9)]
    query, key, value = inputs
    weights = (query[:, :, 2:4] @ key[:, :, second].transpose(2, 3) / 6**0.5).softmax(3)
    output, *_ = calls["keys per group"]()
    torch.testing.assert_close(output[:, :, 2:4], weights @ value[:, :, second])
    primary = (x[:, :, 4:] for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(*primary)
    torch.testing.assert_close(output[:, :, 4:], expected)


@pytest.mark.parametrize("name", ["tiny+dn", "tiny+cdn"])
def test_parts_of_denoising_write_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--preset", name, "--device", "cpu", "--height", "64", "--width", "64"]
    arguments += ["--batch", "1", "--repetitions", "1", "--output", str(path)]
    assert denoising.main(arguments) == 0
    rows = {row["part"]: row for row in json.loads(path.read_text())}
    assert rows["step"]["share"] == 1.0
    small = ("making the set", "self-attention", "pairs and losses")
    assert all(0.0 < rows[part]["share"] < 1.0 for part in small)


def test_a_recipe_without_denoising_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        denoising.main(["--preset", "tiny"])
    assert "has no denoising queries" in capsys.readouterr().err.replace("\n", " ")
