"""Counts waits of the host for a GPU in a training step: `python -m benchmarks.detector syncs`.

The step is `Trainer.train_step` itself, on random images and targets. On a GPU it runs with torch's
synchronisation check set to "error". Without one it runs on a pretended device (`pretended`), where
assignment and focal loss are the Triton kernels in Triton's interpreter. Attention is the
reference, which takes seconds where the interpreter takes minutes.

The published code (`--published DIR`) runs with its PyTorch attention. That reads the device in
`ms_deform_attn_func.py`, which its CUDA extension does not do. Its reads for the log are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import msdetr
from benchmarks import pretended  # first: it selects Triton's interpreter
from benchmarks.common import print_table
from benchmarks.detector.cases import Case, random_batch, require_recipe
from benchmarks.detector.comparison import Setup
from benchmarks.detector.train import PublishedStep, build_trainer
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import CompileConfig
from msdetr.engine.prefetch import on_device
from msdetr.engine.trainer import Trainer
from msdetr.structures import Batch

Step = Callable[[], object]

PACKAGE = Path(msdetr.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Options(Case):
    """Count what makes the host wait for a GPU in one training step."""

    height: int = 128
    """Image height in pixels."""
    width: int = 160
    """Image width in pixels."""
    accumulation_steps: int = 1
    """Micro-batches of the step, each of `batch` images."""
    activation_checkpointing: Literal["none", "encoder", "all"] = "none"
    """Parts whose activations are computed again in the backward pass."""
    device: Literal["auto", "cuda", "pretend"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one, and else pretends."""
    impl: Literal["auto", "reference"] = "auto"
    """Implementation of assignment and losses; `reference` counts the waits of the reference."""
    more_presets: tuple[str, ...] = ()
    """Further recipes, whose steps are counted too."""
    published: Path | None = None
    """Folder of the published code; its step is then counted as well, on the pretended device."""
    check: bool = False
    """Exit with 1 if the host waits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.more_presets:
            require_recipe(name)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, and there is none")
        if self.device == "pretend" and torch.cuda.is_available():
            raise ValueError("to pretend a device, hide the GPU: CUDA_VISIBLE_DEVICES=''")
        if self.published is not None and self.on_cuda:
            raise ValueError("the published code is counted on the pretended device only")
        if self.published is not None and not (self.published / "models").is_dir():
            raise ValueError(f"published: {self.published} has no package `models`")

    @property
    def on_cuda(self) -> bool:
        """Whether the step runs on a GPU."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())


def build_step(options: Options, device: torch.device) -> Step:
    """A step of the trainer with EMA weights, on batches of the host."""
    config = options.config
    config = replace(
        config,
        train=replace(
            config.train,
            batch_size=options.batch * options.accumulation_steps,
            accumulation_steps=options.accumulation_steps,
            activation_checkpointing=options.activation_checkpointing,
            ema_decay=0.9999,
        ),
        compile=CompileConfig(mode="off"),
    )
    trainer = build_trainer(config, device)
    trainer.criterion.impl = options.impl
    if pretended.is_pretended(device) and options.impl == "auto":
        trainer.criterion.impl = "triton"
    batch = random_batch(options)
    if device.type == "cuda":  # as the loader does it
        batch = tree_map(Tensor.pin_memory, batch)
    micro_batches = [batch] * options.accumulation_steps
    return functools.partial(_take_step, trainer, micro_batches)


def _take_step(trainer: Trainer, micro_batches: Sequence[Batch]) -> None:
    trainer.train_step(on_device(micro_batches, trainer.worker.device))


def build_published_step(options: Options, device: torch.device) -> Step:
    """A step of the published code, on a batch of the device."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        setup = Setup("published", options, device, options.published, weights)
        return PublishedStep(setup).call


def count_pretended(
    build: Callable[[Options, torch.device], Step], options: Options, folder: Path
) -> pretended.Tally:
    """Operations of a step on the pretended device; callers are lines of `folder`."""
    with pretended.pretending(folder):
        step = build(options, pretended.pretended_device())
    with pretended.pretending(folder) as tally:
        step()
    return tally


def triton_launches(case: Case) -> int:
    """Launches of Triton kernels in a step of a case, without those of attention.

    For a process of its own without a GPU, which stays on the pretended device.
    """
    options = Options(**{**dataclasses.asdict(case), "device": "pretend"})
    return count_pretended(build_step, options, PACKAGE).launches


def first_wait_on_cuda(step: Step) -> pretended.Wait | None:
    """The first wait of a step on a GPU, or None. A step before it compiles kernels."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        lines = [
            f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}:{line}"
            for path, line in _traceback_lines(error)
            if path.is_relative_to(PACKAGE)
        ]
        return pretended.Wait(lines[-1] if lines else "elsewhere", str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _traceback_lines(error: BaseException) -> Iterator[tuple[Path, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield Path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno
        traceback = traceback.tb_next


def _report(whose: str, tally: pretended.Tally) -> None:
    total = tally.waits.total()
    print(
        f"{whose}: {total} of {tally.operations} operations make the host wait for the device "
        f"({tally.launches} launches of Triton kernels)"
    )
    rows = [
        {"count": count, "caller": wait.where, "operation": wait.operation}
        for wait, count in sorted(tally.waits.items())
    ]
    if rows:
        print_table(rows, "count caller operation")


def _step_waits(options: Options) -> bool:
    """Whether the step of the preset waits; prints what it finds."""
    if options.on_cuda:
        wait = first_wait_on_cuda(build_step(options, torch.device("cuda", 0)))
        found = "never waits for the GPU" if wait is None else f"waits first: {wait}"
        print(f"step of {options.preset}: {found}")
        return wait is not None
    tally = count_pretended(build_step, options, PACKAGE)
    _report(f"step of {options.preset}", tally)
    return bool(tally.waits)


def main(arguments: Sequence[str]) -> int:
    """Count and print; the exit status is 1 if `--check` fails."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector syncs")
        presets = (options.preset, *options.more_presets)
        waits = [_step_waits(replace(options, preset=name)) for name in presets]
        if options.published is not None:
            _report(
                "step of the published code, with PyTorch attention",
                count_pretended(build_published_step, options, options.published),
            )
    return 1 if options.check and any(waits) else 0
