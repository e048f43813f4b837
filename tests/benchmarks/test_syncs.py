"""Which operations count as waits, and that a training step has none.

The pretended device stays in a process for good, so everything that needs it runs in another
process: this file as a script, which writes its observations.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.detector.syncs import Options, build_step, main
from benchmarks.pretended import pretended_device, pretending
from msdetr.config import AssignmentConfig
from msdetr.ops.linear_assignment import linear_assignment
from msdetr.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "tiny", "--batch", "2", "--height", "64", "--width", "64", "--num-targets", "3"]
RELATIVES: dict[str, dict[str, Any]] = {
    "tiny-hybrid": {"extra_queries": "hybrid", "num_hybrid_queries": 20},
    "tiny-group": {
        "extra_queries": "group",
        "num_groups": 2,
        "num_queries": 20,
        "proposal_score": "best_class",
    },
    "tiny-dn": {"denoising": "dn", "denoising_groups": 2},
    "tiny-cdn": {"denoising": "contrastive", "denoising_groups": 2},
    "tiny-dino": {
        "denoising": "contrastive",
        "denoising_groups": 2,
        "query_position": "box",
        "head_sharing": "decoder",
        "decoder_norm": True,
        "proposal_score": "best_class",
        "one_to_many": "none",
        "one_to_many_ffn": False,
    },
    "tiny-deta": {"proposal_nms_iou_threshold": 0.9, "proposal_content": True},
}
ASSIGNMENTS = {"tiny-deta": AssignmentConfig(decoder_match="iou", encoder_match="iou")}
"""The others have that of `tiny`."""

x: Tensor
"""[1, 2, 3, 4] on the device, and the same on the host."""
host: Tensor


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()


def _assign_by_mask() -> None:
    x.clone()[x > 2] = torch.zeros(2, device=x.device)


def _assign_from_host() -> None:
    x.clone()[:] = host


def _index_by_bytes() -> None:
    x[(x > 2).to(torch.uint8)]


def _if() -> None:
    if x.sum() > 3:
        pass


def _read_in_backward() -> None:
    _ReadsInBackward.apply(x.clone().requires_grad_()).sum().backward()


READ = "_local_scalar_dense: values are read"
PLANTED: dict[str, tuple[Callable[[], object], str]] = {
    "item": (lambda: x[0].item(), READ),
    "int": (lambda: int(x[0]), READ),
    "bool": (lambda: bool(x[0]), READ),
    "if": (_if, READ),
    "is_nonzero": (lambda: torch.is_nonzero(x[0]), READ),
    "python index": (lambda: [1, 2, 3][x[0].long()], READ),
    "slice": (lambda: x[: x[1].long()], READ),
    "in backward": (_read_in_backward, READ),
    "allclose": (lambda: torch.allclose(x, x), "allclose: values are read"),
    "equal": (lambda: torch.equal(x, x + 1), "equal: values are read"),
    "tolist": (lambda: x.tolist(), "_to_copy: to the host"),
    "numpy": (lambda: x.cpu().numpy(), "_to_copy: to the host"),
    "copy_": (lambda: host.clone().copy_(x), "copy_: to the host"),
    "to device": (lambda: host.to(x.device), "_to_copy: from the host"),
    "tensor": (lambda: torch.tensor([1, 2], device=x.device), "_to_copy: from the host"),
    "new_tensor": (lambda: x.new_tensor([1, 2]), "_to_copy: from the host"),
    "assign from host": (_assign_from_host, "copy_: from the host"),
    "nonzero": (lambda: x.nonzero(), "nonzero: values are read"),
    "where": (lambda: torch.where(x > 2), "nonzero: values are read"),
    "unique": (lambda: x.unique(), "_unique2: values are read"),
    "unique_consecutive": (
        lambda: x.unique_consecutive(),
        "unique_consecutive: values are read",
    ),
    "masked_select": (lambda: x.masked_select(x > 2), "masked_select: values are read"),
    "bincount": (lambda: x.long().bincount(), "bincount: values are read"),
    "index by mask": (lambda: x[x > 2], "index: a mask as index"),
    "index by bytes": (_index_by_bytes, "index: a mask as index"),
    "index by list": (lambda: x[[0, 2]], "_to_copy: from the host"),
    "index from host": (lambda: x[torch.tensor([0, 2])], "index: an index from the host"),
    "assign by mask": (_assign_by_mask, "index_put_: a mask as index"),
    "repeat_interleave": (
        lambda: torch.repeat_interleave(x, x.long()),
        "repeat_interleave: values are read",
    ),
}
"""Each waits once."""


def _clean() -> object:
    """The operations of a step: computing, drawing, gradients, an update, reading the host."""
    y = host.to(x.device, non_blocking=True)
    y = torch.where(y > 2, y, 0.0).masked_fill(y > 3, 1.0) + torch.full((), 2.0, device=x.device)
    order = y.argsort()
    y = y.gather(0, order).scatter(0, order, x)
    y = y[order] + torch.repeat_interleave(x[:2], x[:2].long(), output_size=3).sum()
    y = y + torch.rand(4, device=x.device, generator=torch.Generator(x.device))
    y = y + x.topk(2).values.sum() + torch.arange(4, device=x.device)
    layer = torch.nn.Linear(4, 2).to(x.device, non_blocking=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    F.dropout(layer(y), 0.5).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1, foreach=True)
    optimizer.step()
    return host[host > 2].tolist(), host.sum().item(), host.numpy(), host.unique()


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "no error"


def _reference_assignment() -> object:
    count = torch.full((2,), 2, device=x.device)
    return linear_assignment(x.repeat(2, 3, 1), count, impl="reference")


def _losses(device: torch.device) -> dict[str, float]:
    step = build_step(Options(preset="tiny", height=64, width=64, impl="reference"), device)
    step()
    row = step.args[0].meter.read()
    return {name: value for name, value in row.items() if "per_second" not in name}


def _observe() -> dict[str, Any]:
    """Everything that needs the pretended device."""
    global x, host
    here = Path(__file__).parent
    device = pretended_device()
    host = torch.arange(1.0, 5.0)
    seen: dict[str, Any] = {"planted": {}}
    for name, (call, _) in PLANTED.items():
        with pretending(here) as tally:
            x = host.to(device, non_blocking=True)
            call()
        seen["planted"][name] = [
            (wait.where, wait.operation, count) for wait, count in tally.waits.items()
        ]
    with pretending(here) as tally:
        x = host.to(device, non_blocking=True)
        _clean()
    seen["clean"] = [tally.waits.total(), tally.operations]
    with pretending(here, ROOT / "msdetr") as tally:
        x = host.to(device, non_blocking=True)
        _reference_assignment()
    seen["reference assignment"] = {
        wait.where.rpartition(":")[0] + " " + wait.operation: count
        for wait, count in tally.waits.items()
    }
    with pretending(here):
        x = host.to(device, non_blocking=True)
        seen["numpy"] = _error_of(lambda: x.numpy())
        seen["mixed"] = _error_of(lambda: x + host)
        seen["losses"] = [_losses(torch.device("cpu")), _losses(device)]
    tiny = PRESETS["tiny"]
    for name, change in RELATIVES.items():
        model = replace(tiny.config.model, **change)
        assignment = ASSIGNMENTS.get(name, tiny.config.assignment)
        config = replace(tiny.config, model=model, assignment=assignment)
        PRESETS[name] = replace(tiny, config=config)
    for impl, more in (("auto", RELATIVES), ("reference", ())):
        output = io.StringIO()
        arguments = [*TINY, "--device", "pretend", "--check", "--impl", impl]
        with contextlib.redirect_stdout(output):
            status = main([*arguments, "--more-presets", *more])
        seen[f"check {impl}"] = [status, output.getvalue()]
    return seen


def _run_without_gpu(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("syncs") / "seen.json"
    _run_without_gpu(__file__, str(path))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_counted(seen: dict[str, Any], name: str) -> None:
    ((where, operation, count),) = seen["planted"][name]
    assert where.startswith("benchmarks/test_syncs.py:")
    assert operation == f"aten.{PLANTED[name][1]}"
    assert count == 1


def test_operations_that_do_not_wait_are_not_counted(seen: dict[str, Any]) -> None:
    waits, operations = seen["clean"]
    assert operations > 30
    assert waits == 0


def test_operators_of_the_project_are_followed(seen: dict[str, Any]) -> None:
    assert seen["reference assignment"] == {
        "msdetr/ops/linear_assignment.py aten._to_copy: to the host": 1,
        "msdetr/ops/linear_assignment.py aten._to_copy: from the host": 1,
    }


def test_operations_that_a_gpu_refuses_are_refused(seen: dict[str, Any]) -> None:
    assert seen["numpy"] != "no error"
    assert "of the device and of the host" in seen["mixed"]


def test_the_pretended_step_computes_what_the_cpu_does(seen: dict[str, Any]) -> None:
    cpu, pretended = seen["losses"]
    assert cpu["loss"] > 0
    assert pretended == pytest.approx(cpu, rel=1e-4)


def test_the_step_never_waits(seen: dict[str, Any]) -> None:
    status, output = seen["check auto"]
    assert status == 0, output
    for name in ("tiny", *RELATIVES):
        assert f"step of {name}: 0 of " in output
    assert "(0 launches" not in output


def test_the_step_with_the_reference_waits(seen: dict[str, Any]) -> None:
    status, output = seen["check reference"]
    assert status == 1
    assert "msdetr/ops/linear_assignment.py" in output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--preset", "huge"], "known are ms-detr-r50-300"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--published", "no/such/folder"], "has no package `models`"),
        pytest.param(
            ["--device", "cuda"],
            "there is none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.skipif(
    "MSDETR_PUBLISHED" not in os.environ,
    reason="set MSDETR_PUBLISHED to a checkout of the published code",
)
def test_the_published_step_waits() -> None:
    published = ["--published", os.environ["MSDETR_PUBLISHED"]]
    output = _run_without_gpu(
        "-m", "benchmarks.detector", "syncs", "--batch", "1", "--impl", "reference", *published
    )
    assert "step of ms-detr-r50-300: 4 of " in output
    ours, theirs = output.split("step of the published code")
    assert "msdetr/ops/linear_assignment.py" in ours
    assert "models/matcher_o2m.py" in theirs


@pytest.mark.gpu
def test_the_step_never_waits_on_a_gpu() -> None:
    assert main([*TINY, "--device", "cuda", "--check"]) == 0


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_observe()))
