"""The benchmark of assignment: its comparison with the reference, its check, and its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.assignment import measure
from benchmarks.assignment.cases import CONFIG, Case, Inputs, image_targets, make_inputs
from benchmarks.assignment.comparison import find_difference, taken_pairs
from benchmarks.assignment.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    dense_one_to_many,
    dense_one_to_one,
)
from benchmarks.assignment.measure import Options, choose_implementations, main, plan
from benchmarks.assignment.published import Pairs, published_one_to_many, published_one_to_one
from parity.golden import GoldenCase, find_cases

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ["--batches", "2", "--queries", "12", "--targets", "3", "--anchors", "20"]
TINY += ["--hybrid-queries", "15", "--repetitions", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ("reference", "published", "scipy")
        for task in IMPLEMENTATIONS[name].runs
    ],
)
def test_all_agree_on_ragged_images(name: str, task: str) -> None:
    inputs = make_inputs(Case(task, 3, 30, 5))
    targets = inputs.targets._replace(count=torch.tensor([5, 0, 2]))
    inputs = inputs._replace(targets=targets, image_targets=image_targets(targets))
    assert find_difference(IMPLEMENTATIONS[name].runs[task](inputs), inputs) is None


def test_the_inputs_exercise_the_draw() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 300, 20))
    kept = dense_one_to_many(inputs, "reference").mask.sum((2, 3))
    assert kept.max() == int(CONFIG.positive_fraction * 300)


def test_wrong_one_to_many_pairs_are_found() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 30, 5))
    pairs = dense_one_to_many(inputs, "reference")
    mask, query_index = pairs.mask.clone(), pairs.query_index.clone()
    mask[3, 1, 2, 0] = False
    missing = find_difference(pairs._replace(mask=mask), inputs)
    assert missing == "other numbers of queries per target"
    query_index[3, 1, 2, 0] = int((~taken_pairs(pairs, inputs)[3, 1, 2]).nonzero()[0, 0])
    worse = find_difference(pairs._replace(query_index=query_index), inputs)
    assert "values differ" in str(worse)


def test_wrong_one_to_one_pairs_are_found() -> None:
    inputs = make_inputs(Case("one_to_one", 2, 30, 5))
    query, mask = dense_one_to_one(inputs, "reference")
    query = query.clone()
    used = query[2, 0].flatten().tolist()
    query[2, 0, 0] = next(index for index in range(30) if index not in used)
    assert "values differ" in str(find_difference((query, mask), inputs))

    # Queries are all the same, so that no assignment costs more than another.
    inputs = make_inputs(Case("one_to_one", 1, 8, 2))
    logits, boxes = (x[:, :, :1].expand_as(x) for x in (inputs.logits, inputs.boxes))
    inputs = inputs._replace(logits=logits, boxes=boxes)
    query, mask = dense_one_to_one(inputs, "reference")
    both = query[:, :, :1].expand(-1, -1, 2, -1)
    assert find_difference((both, mask), inputs) == "queries that serve several targets"


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


def last_class(pairs: Pairs, inputs: Inputs) -> Tensor:
    """[N, B, Q], the class of the last pair of each query, -1 for none."""
    target_class = torch.full(inputs.logits.shape[:3], -1)
    for layer, images in enumerate(pairs):
        for image, (queries, targets) in enumerate(images):
            labels = inputs.image_targets[image][0][targets]
            for query, label in zip(queries, labels, strict=True):
                target_class[layer, image, query] = label
    return target_class


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2m_",)), ids=lambda case: case.name)
def test_the_restated_one_to_many_is_the_published_one(case: GoldenCase) -> None:
    inputs = golden_inputs(case, "one_to_many")
    result = published_one_to_many(inputs, k=case.info["k"], threshold=case.info["threshold"])
    assert torch.equal(taken_pairs(result, inputs), golden_pairs(case, inputs))
    assert torch.equal(last_class(result, inputs)[0], case.tensor("target_class"))


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2o_",)), ids=lambda case: case.name)
def test_the_restated_one_to_one_is_the_published_one(case: GoldenCase) -> None:
    weights = case.info["cost"]
    assert (weights["class_"], weights["bbox"], weights["giou"]) == (
        CONFIG.cost_class,
        CONFIG.cost_bbox,
        CONFIG.cost_giou,
    )
    inputs = golden_inputs(case, "one_to_one")
    assert torch.equal(
        taken_pairs(published_one_to_one(inputs), inputs), golden_pairs(case, inputs)
    )


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    assert main([*TINY, "--output", str(path)]) == 0
    rows = {(row["task"], row["implementation"]): row for row in json.loads(path.read_text())}
    peers = ("reference", "published", "scipy")
    assert rows.keys() == {
        ("one_to_many", "chunked"),
        ("one_to_many", "reference"),
        ("one_to_many", "published"),
        *((task, name) for task in ("one_to_one", "hybrid", "encoder") for name in peers),
    }
    for (task, name), row in rows.items():
        assert row["status"] == "ok"
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["layers"] == (1 if task == "encoder" else 6)
        assert row["queries"] == {"encoder": 20, "hybrid": 15}.get(task, 12)
        assert row["speedup"] == 1.0 or name != "published"
        assert row["launches"] is None if name == "chunked" else row["launches"] > 10
    assert rows["one_to_many", "reference"]["host_waits"] == 0
    assert rows["one_to_many", "published"]["host_waits"] > 6 * 2 * 3
    assert rows["one_to_one", "reference"]["host_waits"] == 2
    assert rows["one_to_one", "scipy"]["host_waits"] == 6 * 2


@pytest.mark.parametrize(("minimum", "status"), [(0.0, 0), (1e9, 1)])
def test_a_slow_version_fails_the_check(
    minimum: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure.MIN_SPEEDUP == 10.0
    assert plan(Options(check=True), CPU) == [Case("one_to_many", 16, 300, 7)]
    names = [chosen.name for chosen in choose_implementations(Options(check=True), CPU)]
    assert names == ["chunked", "published"]
    monkeypatch.setattr(measure, "CHECKED", Case("one_to_many", 2, 12, 3))
    monkeypatch.setattr(measure, "MIN_SPEEDUP", minimum)
    assert main(["--check", "--repetitions", "2", "--device", "cpu"]) == status


def test_a_wrong_implementation_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_queries(inputs: Inputs) -> tuple[Tensor, Tensor]:
        query, mask = dense_one_to_one(inputs, "reference")
        return torch.arange(query.shape[2])[:, None].expand_as(query), mask

    wrong = Implementation(name="scipy", one_to_one=first_queries)
    monkeypatch.setitem(IMPLEMENTATIONS, "scipy", wrong)
    arguments = [*TINY, "--tasks", "encoder", "--implementations", "scipy", "published"]
    assert main(arguments) == 1
    assert "wrong: values differ" in capsys.readouterr().out

    def fails(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(IMPLEMENTATIONS, "scipy", Implementation(name="scipy", one_to_one=fails))
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no kernel\n" in printed
    assert "ok\n" in printed


@pytest.mark.gpu
def test_rows_of_kernels(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main([*TINY[:-1], "cuda", "--output", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text()) if row["implementation"] == "msdetr"]
    assert {row["task"] for row in rows} == {"one_to_many", "one_to_one", "hybrid", "encoder"}
    for row in rows:
        assert (row["status"], row["host_waits"]) == ("ok", 0)
        assert row["device_us"] > 0
