"""The benchmark of assignment: what it compares with, and that it refuses what is wrong."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import bench_assignment
from benchmarks.bench_assignment import (
    CONFIG,
    IMPLEMENTATIONS,
    Case,
    Inputs,
    Options,
    Pairs,
    choose_implementations,
    dense_one_to_many,
    dense_one_to_one,
    image_targets,
    main,
    make_inputs,
    plan,
    published_one_to_many,
    published_one_to_one,
    taken_pairs,
    time_in_turns,
    torch_linear_assignment,
    what_is_wrong,
)
from msdetr.assignment.one_to_many import assign_one_to_many
from msdetr.structures import Predictions
from parity.golden import GoldenCase, find_cases

GOLDEN = Path(__file__).parent / "golden"
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


def golden_inputs(case: GoldenCase, task: str) -> Inputs:
    targets = case.targets()
    logits, boxes = case.tensor("pred_logits")[None], case.tensor("pred_boxes")[None]
    priority = (
        case.tensor("priority")[None] if "priority" in case.arrays else torch.rand(logits.shape[:3])
    )
    return Inputs(task, logits, boxes, targets, image_targets(targets), priority)


def golden_pairs(case: GoldenCase, inputs: Inputs) -> Tensor:
    pairs = [
        torch.from_numpy(case.arrays[f"pairs{image}"]).unbind(1)
        for image in range(len(inputs.image_targets))
    ]
    return taken_pairs([pairs], inputs)


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2m_",)), ids=lambda case: case.name)
def test_the_restated_one_to_many_is_the_published_one(case: GoldenCase) -> None:
    inputs = golden_inputs(case, "one_to_many")
    result = published_one_to_many(inputs, k=case.info["k"], threshold=case.info["threshold"])
    assert torch.equal(taken_pairs(result, inputs), golden_pairs(case, inputs))

    assert torch.equal(last_class(result, inputs)[0], case.tensor("target_class"))


def last_class(pairs: Pairs, inputs: Inputs) -> Tensor:
    """[N, B, Q], the class of the last pair of each query, -1 for none."""
    target_class = torch.full(inputs.logits.shape[:3], -1)
    for layer, images in enumerate(pairs):
        for image, (queries, targets) in enumerate(images):
            labels = inputs.image_targets[image][0]
            for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
                target_class[layer, image, query] = labels[target]
    return target_class


def test_the_restated_pairs_are_in_ascending_order_of_score() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 12, 8))
    pairs = published_one_to_many(inputs)
    served = taken_pairs(pairs, inputs).sum(2)
    assert served.max() > 1
    expected = assign_one_to_many(
        Predictions(inputs.logits, inputs.boxes),
        inputs.targets,
        CONFIG,
        priority=inputs.priority,
        impl="reference",
    )
    assert torch.equal(last_class(pairs, inputs), expected.target_class)


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2o_",)), ids=lambda case: case.name)
def test_the_restated_one_to_one_is_the_published_one(case: GoldenCase) -> None:
    weights = case.info["cost"]
    assert (weights["class_"], weights["bbox"], weights["giou"]) == (
        CONFIG.cost_class,
        CONFIG.cost_bbox,
        CONFIG.cost_giou,
    )
    inputs = golden_inputs(case, "one_to_one")
    taken = taken_pairs(published_one_to_one(inputs), inputs)
    assert torch.equal(taken, golden_pairs(case, inputs))


def ragged_inputs(task: str) -> Inputs:
    """Three images with 5, 0 and 2 targets."""
    inputs = make_inputs(Case(task, 3, 30, 5))
    targets = inputs.targets._replace(count=torch.tensor([5, 0, 2]))
    return inputs._replace(targets=targets, image_targets=image_targets(targets))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ("reference", "published", "scipy")
        for task in IMPLEMENTATIONS[name].runs
    ],
)
def test_all_agree_on_ragged_images(name: str, task: str) -> None:
    inputs = ragged_inputs(task)
    assert what_is_wrong(IMPLEMENTATIONS[name].runs[task](inputs), inputs) is None


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced as for Inductor, and then run as they are."""
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    bench_assignment._compiled.cache_clear()
    yield
    bench_assignment._compiled.cache_clear()


@pytest.mark.usefixtures("_quick_compiler")
def test_the_compiled_reference_agrees_and_is_one_graph() -> None:
    run = IMPLEMENTATIONS["reference_compiled"].runs["one_to_many"]
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (1, 3):  # more shapes than a function is compiled for
            inputs = make_inputs(Case("one_to_many", batch, 20, 5))
            assert what_is_wrong(run(inputs), inputs) is None


@pytest.mark.usefixtures("_quick_compiler")
def test_the_compiled_reference_runs_where_it_is_named() -> None:
    assert "reference_compiled" not in [x.name for x in choose_implementations(Options(), CPU)]
    options = Options(
        tasks=("one_to_many",),
        batches=(2,),
        queries=(12,),
        targets=(3,),
        implementations=("reference_compiled", "published"),
        repetitions=2,
        device="cpu",
    )
    (rows,) = bench_assignment.measure(options)
    assert [row["implementation"] for row in rows] == ["reference_compiled", "published"]
    assert rows[0]["speedup"] > 0
    assert rows[0]["launches"] is None
    assert rows[1]["launches"] > 100


def test_the_draw_is_exercised() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 300, 20))
    kept = dense_one_to_many(inputs, "reference").mask.sum((2, 3))
    assert kept.max() == int(CONFIG.positive_fraction * 300)


def test_a_missing_pair_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 30, 5))
    pairs = dense_one_to_many(inputs, "reference")
    mask = pairs.mask.clone()
    mask[3, 1, 2, 0] = False
    wrong = what_is_wrong(pairs._replace(mask=mask), inputs)
    assert wrong == "other numbers of queries per target"


def test_a_worse_query_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 30, 5))
    pairs = dense_one_to_many(inputs, "reference")
    query_index = pairs.query_index.clone()
    taken = taken_pairs(pairs, inputs)[3, 1, 2]
    query_index[3, 1, 2, 0] = int((~taken).nonzero()[0, 0])
    wrong = what_is_wrong(pairs._replace(query_index=query_index), inputs)
    assert wrong is not None
    assert "values differ" in wrong


def test_a_costlier_assignment_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_one", 2, 30, 5))
    query, mask = dense_one_to_one(inputs, "reference")
    query = query.clone()
    query[4, 0] = next(index for index in range(30) if index not in query[4].tolist())
    wrong = what_is_wrong((query, mask), inputs)
    assert wrong is not None
    assert "values differ" in wrong


def test_a_query_with_two_targets_is_wrong_where_it_must_have_one() -> None:
    inputs = make_inputs(Case("one_to_one", 1, 8, 2))
    # Queries are all the same, so that no assignment costs more than another.
    logits, boxes = (x[:, :, :1].expand_as(x) for x in (inputs.logits, inputs.boxes))
    inputs = inputs._replace(logits=logits, boxes=boxes)
    query, mask = dense_one_to_one(inputs, "reference")
    assert what_is_wrong((query, mask), inputs) is None
    both = query[:, :1].expand(-1, 2)
    assert what_is_wrong((both, mask), inputs) == "queries that serve several targets"


def test_torch_linear_assignment_is_given_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_linear_assignment(cost: Tensor) -> Tensor:
        """As the package: [P, workers, tasks], the task of each worker."""
        assert cost.shape == (18, 5, 30)
        return torch.stack(
            [torch.from_numpy(linear_sum_assignment(problem.numpy())[1]) for problem in cost]
        )

    package: Any = ModuleType("torch_linear_assignment")
    package.batch_linear_assignment = batch_linear_assignment
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", package)
    inputs = ragged_inputs("one_to_one")
    assert what_is_wrong(torch_linear_assignment(inputs), inputs) is None


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

    wrong = bench_assignment.Implementation("scipy", {"encoder": first_queries})
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
