from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from engine.helpers import (
    BATCH_SIZE,
    RELATIVES,
    SEED,
    TINY_MODEL,
    assert_same_within_rounding,
    deterministic_config,
    write_shapes,
)
from engine.processes import Tasks, do_tasks, loaded_tensors, run_in_processes, train_run

from msdetr.config import CompileConfig, RunConfig
from msdetr.data.sampler import epoch_permutation, step_positions
from msdetr.engine.checkpoint import OPTIMIZER, find_checkpoints, load_checkpoint
from msdetr.engine.device import resolve_device
from msdetr.engine.distributed import Worker, worker_from_environment
from msdetr.engine.run import build_trainer
from msdetr.engine.tensor_files import read_tensors
from msdetr.weights import load_weights

WORKER = Worker(device=torch.device("cpu"))
NUM_TRAIN = 12
_KINDS = ("ddp", "ddp-parts", "fsdp", "fsdp-parts", "ddp-compiled", "fsdp-compiled")
_RELATIVE_KINDS = {
    "ddp-ms-hybrid": "ms-hybrid",
    "fsdp-hybrid-parts": "hybrid",
    "ddp-group-parts": "group",
    "fsdp-ms-group": "ms-group",
    "ddp-ms-contrastive-parts": "ms-contrastive",
    "fsdp-dino": "dino",
    "ddp-deta": "deta",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose second step has no target on rank 1 of 2."""
    positions = step_positions(1, batch_size=BATCH_SIZE, rank=1, world_size=2)
    empty = epoch_permutation(SEED, 0, NUM_TRAIN)[list(positions)]
    root = tmp_path_factory.mktemp("distributed") / "data"
    return write_shapes(root, num_train=NUM_TRAIN, num_val=5, without_targets=set(empty.tolist()))


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of the runs of this module, and their folder."""

    folder: Path
    single: dict[str, Any]
    """The run of one process."""
    singles: dict[str, dict[str, Any]]
    """Those of the relatives."""
    ranks: list[dict[str, Any]]


def run_config(data: Path, folder: Path, name: str) -> RunConfig:
    """A run of one kind: `ddp` or `fsdp`, with micro-batches and activation checkpointing if the
    name ends with `parts`."""
    train: dict[str, Any] = {"eval_every": 2, "ema_decay": 0.9, "ema_warmup_steps": 2}
    if name.endswith("parts"):
        train |= {"accumulation_steps": 2, "activation_checkpointing": "all"}
    if name == "fsdp":
        train |= {"checkpoint_every": 2, "eval_every": 1}  # Training continues after an evaluation.
    model = RELATIVES.get(_RELATIVE_KINDS.get(name, name), TINY_MODEL)
    if model is not TINY_MODEL:
        train["max_steps"] = 2
    config = deterministic_config(data, folder / name, model, **train)
    mode: Literal["on", "off"] = "on" if name.endswith("compiled") else "off"
    config = dataclasses.replace(config, compile=CompileConfig(mode=mode))
    return dataclasses.replace(config, parallel="fsdp" if name.startswith("fsdp") else "ddp")


def bfloat16_config(data: Path, folder: Path, kind: Literal["ddp", "fsdp"]) -> RunConfig:
    """One step."""
    config = deterministic_config(
        data, folder / f"{kind}-bfloat16", precision="bfloat16", max_steps=1
    )
    return dataclasses.replace(config, parallel=kind)


def resumed(config: RunConfig, output: Path, checkpoint: Path) -> RunConfig:
    return dataclasses.replace(config, output=output, resume=str(checkpoint))


@pytest.fixture(scope="module")
def results(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    single = train_run(WORKER, run_config(data, folder, "single"))
    write_file_of_earlier_version(folder)
    singles = {
        name: train_run(WORKER, run_config(data, folder, name))
        for name in set(_RELATIVE_KINDS.values())
    }
    configs = {name: run_config(data, folder, name) for name in (*_KINDS, *_RELATIVE_KINDS)}
    halfway = folder / "fsdp" / "checkpoints" / "step-00000002"
    configs |= {f"{kind}-bfloat16": bfloat16_config(data, folder, kind) for kind in ("ddp", "fsdp")}
    configs["fsdp resumed"] = resumed(configs["fsdp"], folder / "fsdp resumed", halfway)
    loaded = {
        f"{source} in {target}": resumed(configs[target], folder / f"{source} {target}", path)
        for source, target, path in (
            ("single", "ddp", last_checkpoint(folder, "single")),
            ("single", "fsdp", last_checkpoint(folder, "single")),
            ("ddp", "fsdp", last_checkpoint(folder, "ddp")),
            ("fsdp", "ddp", last_checkpoint(folder, "fsdp")),
            ("file", "fsdp", folder / "file.pt"),
        )
    }
    tasks = Tasks(configs, loaded)
    return Results(
        folder, single, singles, run_in_processes(do_tasks, tasks, folder, num_processes=2)
    )


def last_checkpoint(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints" / "step-00000004"


def write_file_of_earlier_version(folder: Path) -> None:
    checkpoint = load_checkpoint(last_checkpoint(folder, "single"))
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(checkpoint.tensors, OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        states.setdefault(parameter, {})[key] = tensor
    content = {"model": checkpoint.weights(ema=False), "optimizer": states}
    torch.save(content | vars(checkpoint.progress), folder / "file.pt")


@pytest.mark.parametrize("name", [*_KINDS, *_RELATIVE_KINDS])
def test_two_processes_are_one(results: Results, name: str) -> None:
    first, second = (rank[name] for rank in results.ranks)
    expected = results.single
    if name in _RELATIVE_KINDS:
        expected = results.singles[_RELATIVE_KINDS[name]]
    assert len(expected["image_ids"]) == (2 if name in _RELATIVE_KINDS else 4)
    assert sum(second["targets"][1]) == 0
    assert sum(first["targets"][1]) > 0
    for step, image_ids in enumerate(expected["image_ids"]):
        assert image_ids == first["image_ids"][step] + second["image_ids"][step]
    for tensor, value in first["tensors"].items():
        assert torch.equal(value, second["tensors"][tensor]), tensor
    assert_same_within_rounding(first, expected)
    assert sorted(expected["scores"]) == list(range(100, 105))
    assert second["scores"] == {}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_per_step(results: Results, kind: str) -> None:
    for rank in results.ranks:
        whole, parts = (rank[name]["collectives"] for name in (kind, f"{kind}-parts"))
        assert sum(whole.values()) > 1  # One of them exchanges the number of targets.
        assert parts == whole


def test_compiled_runs_are_compiled(results: Results) -> None:
    *others, ddp, fsdp = (results.ranks[0][name]["num_graphs"] for name in _KINDS)
    assert not any(others)
    assert fsdp > ddp > 10


def test_a_rank_holds_its_shards_only(results: Results) -> None:
    whole, shards = (results.ranks[0][name]["num_local"] for name in ("ddp", "fsdp"))
    assert whole / 2 <= shards < 0.6 * whole  # Some numbers of rows are odd.


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("single", "ddp"),
        ("single", "fsdp"),
        ("ddp", "fsdp"),
        ("fsdp", "ddp"),
    ],
)
def test_checkpoints_go_from_any_run_to_any_other(
    results: Results, source: str, target: str
) -> None:
    run = results.single if source == "single" else results.ranks[0][source]
    for rank in results.ranks:
        assert_equal(rank[f"{source} in {target}"], run["tensors"])


@pytest.mark.parametrize("source", ["ddp", "fsdp"])
def test_a_single_process_reads_what_several_wrote(
    results: Results, data: Path, tmp_path: Path, source: str
) -> None:
    last = last_checkpoint(results.folder, source)
    config = resumed(run_config(data, tmp_path, "single"), tmp_path / "run", last)
    expected = results.ranks[0][source]["tensors"]
    assert_equal(loaded_tensors(WORKER, config), expected)
    exported = load_weights(results.folder / source / "weights.safetensors").state_dict
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected.get(f"average.{name}", expected[f"model.{name}"]))


def test_shards_take_files_of_earlier_versions(results: Results) -> None:
    run = results.single["tensors"]
    for rank in results.ranks:
        loaded = rank["file in fsdp"]
        ema = {name for name in loaded if name.startswith("average.")}
        assert ema
        assert_equal(
            {name: x for name, x in loaded.items() if name not in ema},
            {name: x for name, x in run.items() if name not in ema},
        )
        for name in ema:  # The file has none: they start from the weights.
            weight = loaded[name.replace("average.", "model.", 1)]
            assert torch.equal(loaded[name], weight), name


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert {name.split(".")[0] for name in actual} >= {"model", "optimizer"}
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_every_rank_names_the_bad_rank(results: Results) -> None:
    first, second = (rank["bad loss"] for rank in results.ranks)
    assert first == second
    assert "the loss of step 2 is not finite (rank 1: image ids [21])" in first


def test_every_rank_ends_where_one_cannot_write(results: Results) -> None:
    first, second = (rank["full disk"] for rank in results.ranks)
    assert first == second
    assert "rank 1: no space left on device" in first
    steps = [step for step, _ in find_checkpoints(results.folder / "ddp")]
    assert steps == [3, 4]


def test_shards_compute_in_the_precision_of_copies(results: Results) -> None:
    ddp, fsdp = (results.ranks[0][f"{kind}-bfloat16"] for kind in ("ddp", "fsdp"))
    assert {tensor.dtype for tensor in fsdp["tensors"].values()} == {torch.float32}
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-6)
    assert fsdp["losses"][0] != results.single["losses"][0]  # float32
    for name, gradient in ddp["gradients"].items():
        difference = (gradient - fsdp["gradients"][name]).norm()
        assert difference <= 1e-2 * gradient.norm() + 1e-6, name


def test_resume_is_exact_with_shards(results: Results) -> None:
    for rank in results.ranks:
        assert len(rank["fsdp resumed"]["image_ids"]) == 2
        assert_equal(rank["fsdp resumed"]["tensors"], rank["fsdp"]["tensors"])


def test_four_processes_with_shards(results: Results, data: Path, tmp_path: Path) -> None:
    # The last ranks have no shard of parameters with fewer rows than ranks.
    config = run_config(data, tmp_path, "fsdp")
    ranks = run_in_processes(train_run, config, tmp_path, num_processes=4)
    assert_same_within_rounding(ranks[0], results.single)
    last = last_checkpoint(tmp_path, "fsdp")
    loaded = resumed(run_config(data, tmp_path, "single"), tmp_path / "run", last)
    assert_equal(loaded_tensors(WORKER, loaded), ranks[3]["tensors"])


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with worker_from_environment("cpu") as worker:
        assert worker == WORKER
        assert worker.is_main
        assert not torch.distributed.is_initialized()


def test_one_process_has_nothing_to_shard(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = build_trainer(run_config(data, tmp_path, "fsdp"), WORKER)
    assert "parallel fsdp changes nothing" in caplog.text
    assert trainer.distributed_model is trainer.model


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not: start several processes with torchrun"):
        worker_from_environment("cpu").__enter__()


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", 1) == torch.device("cuda", 1)
    assert resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="the machine has 2: start fewer processes"):
        resolve_device("auto", 2)
