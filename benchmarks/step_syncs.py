"""What makes the host wait for a GPU in one training step: `python -m benchmarks.step_syncs`.

The step is `Trainer.train_step` itself, on random images and targets. On a GPU it runs with
torch's synchronisation check set to "error". Without one it runs on a pretended device: a Python
backend of torch (PrivateUse1) that keeps its tensors on the host and computes there, so that values
are real, while all code sees a device that is not the CPU. What would wait reaches the dispatcher
as such: reads of values, results whose shape depends on values, masks as indices, copies to the
host, and copies from it that are not asked to be asynchronous. (`numpy()` of a tensor there is an
error, as on a GPU.) Each is counted by the innermost line of the package that led to it.

On the pretended device, assignment and focal loss are the Triton kernels, in Triton's interpreter:
their launchers are looked into, their kernels are not, as a kernel cannot wait. Attention is the
reference, which takes seconds where the interpreter takes minutes.

The published code (`--published DIR`) runs on its PyTorch attention, whose own reads, in
`ms_deform_attn_func.py`, its CUDA extension would spare. Its reads for the log are left out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast
from unittest import mock

import torch

# Triton reads it when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import msdetr
from benchmarks.common import print_table
from benchmarks.comparison import Setup
from benchmarks.detector_cases import Case, random_batch
from benchmarks.launches import CPU_KEYS, OUR_OPERATORS, interpreted_launches, is_launch
from benchmarks.train_steps import PublishedStep, build_trainer
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import CompileConfig
from msdetr.engine.prefetch import on_device
from msdetr.engine.trainer import Trainer
from msdetr.structures import Batch

Step = Callable[[], object]

PACKAGE = Path(msdetr.__file__).parent
_PRETEND = "pretend"

_READS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
"""Operators that wait whatever their arguments; those that torch tags so are found by their tag."""
_READ_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = frozenset(
    {
        "_index_put_impl_",
        "_unsafe_index",
        "_unsafe_index_put",
        "index",
        "index_put",
        "index_put_",
    }
)


@dataclass(frozen=True, order=True)
class Wait:
    """One way to make the host wait."""

    where: str
    """FILE:LINE of the caller."""
    operation: str
    """What it called, and why that waits."""


@dataclass
class Tally:
    """What a step did on the pretended device."""

    waits: Counter[Wait]
    """How often it would have waited."""
    operations: int = 0
    """Operators that would do something on the device: not views, nor uninitialised tensors."""
    launches: int = 0
    """Launches of Triton kernels."""


class PretendTensor(torch.Tensor):
    """A tensor of the pretended device."""

    host: Tensor
    """What it really is."""

    @staticmethod
    def __new__(cls, host: Tensor) -> PretendTensor:
        """Wrap a tensor of the host, which it shares its memory with."""
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=pretended_device(),
        )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """As torch does it for a GPU, and refuses to for subclasses: from a copy on the host."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast(Tensor, memo.setdefault(id(self), self.detach().clone()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: outside of `pretending` nothing counts."""
        raise RuntimeError(f"{operator} on the pretended device, outside of `pretending`")


@functools.cache
def pretended_device() -> torch.device:
    """The device, which this process has from the first call on."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(_PRETEND, Module())
    return torch.device(_PRETEND, 0)


class _Call:
    """A call of an operator, some of whose arguments may be on the pretended device."""

    def __init__(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.operator = operator
        self.args = args
        self.kwargs = kwargs
        self.name = operator.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.from_device = any(isinstance(tensor, PretendTensor) for tensor in self.tensors)
        self.names_device = any(map(_is_pretended, leaves))

    def argument(self, position: int, name: str) -> Any:
        """An argument that may be given either way, or None."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name)

    @property
    def to_device(self) -> bool:
        """Whether the result is on the device."""
        if self.kwargs.get("device") is not None:
            return self.names_device
        return self.from_device

    def why_it_waits(self) -> str | None:
        """What makes the host wait, or None.

        Raises:
            RuntimeError: a GPU would refuse the call.
        """
        if self.name == "_to_copy":
            return self._why_a_copy_waits(self.args[0], self.to_device)
        if self.name == "copy_":
            return self._why_a_copy_waits(self.args[1], isinstance(self.args[0], PretendTensor))
        if not self.from_device:
            return None
        if self.name in _INDEXING:
            indices = [index for index in self.args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "a mask as index"
            if not all(isinstance(index, PretendTensor) for index in indices):
                return "an index from the host"
            return None
        if self.name == "repeat_interleave" and self.kwargs.get("output_size") is not None:
            return None
        if self.name in _READS or _READ_TAGS.intersection(self.operator.tags):
            return "values are read"
        if any(tensor.ndim and not isinstance(tensor, PretendTensor) for tensor in self.tensors):
            raise RuntimeError(f"{self.operator} got tensors of the device and of the host")
        return None

    def _why_a_copy_waits(self, source: Tensor, to_device: bool) -> str | None:
        from_device = isinstance(source, PretendTensor)
        if from_device and not to_device:
            return "to the host"
        non_blocking = self.argument(2, "non_blocking") or False
        if to_device and not from_device and not non_blocking:
            return "from the host"
        return None

    def compute(self) -> Any:
        """The result, computed on the host."""
        # What an operator writes in place, it returns as the same object.
        known = {id(_on_host(tensor)): tensor for tensor in self.tensors}

        def from_host(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in known:
                return known[id(leaf)]
            return PretendTensor(leaf) if self.to_device else leaf

        args, kwargs = tree_map(_on_host, (self.args, self.kwargs))
        return tree_map(from_host, self.operator(*args, **kwargs))


def _is_pretended(leaf: object) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == _PRETEND


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, PretendTensor):
        return leaf.host
    return torch.device("cpu") if _is_pretended(leaf) else leaf


class _PretendMode(TorchDispatchMode):
    """Computes on the host what is asked of the pretended device, and counts."""

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__()
        self.tally = Tally(Counter())
        self._folders = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call = _Call(operator, args, kwargs or {})
        if not (call.from_device or call.names_device):
            return call.compute()
        if operator.namespace == OUR_OPERATORS:
            # Its implementation is Python that could wait, so it runs with this mode on.
            with self:
                return operator.redispatch(CPU_KEYS, *call.args, **call.kwargs)
        # Below autograd, operators that are made of others arrive as they are.
        with self:
            result = operator.decompose(*call.args, **call.kwargs)
        if result is not NotImplemented:
            return result
        self.tally.operations += is_launch(operator)
        reason = call.why_it_waits()
        if reason is not None:
            self.tally.waits[Wait(self._caller(), f"{operator.overloadpacket}: {reason}")] += 1
        return call.compute()

    def count_kernel(self, name: str) -> None:
        """Hear of the launch of a Triton kernel."""
        self.tally.launches += 1

    def _caller(self) -> str:
        """FILE:LINE of the innermost frame in one of the folders."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            path = frame.f_code.co_filename
            for folder in self._folders:
                if path.startswith(folder):
                    relative = Path(path).relative_to(Path(folder).parent)
                    return f"{relative.as_posix()}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"


@contextlib.contextmanager
def pretending(*folders: Path) -> Iterator[Tally]:
    """Compute what is on `pretended_device()`, and count what would wait.

    Args:
        folders: whose lines are named as callers.
    """
    pretended_device()
    mode = _PretendMode(folders)
    make_generator = torch.Generator

    def generator(device: Any = "cpu") -> torch.Generator:
        """One on the host: that is where a GPU's generator keeps its state as well."""
        return make_generator("cpu" if _is_pretended(torch.device(device)) else device)

    lifted = torch._C._only_lift_cpu_tensors()
    # `torch.tensor(..., device=...)` then is a copy from the host, which the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(torch, "Generator", generator),
            interpreted_launches(mode.count_kernel, _on_host),
            torch.autograd.set_multithreading_enabled(False),  # or callers would be unknown
            mode,
        ):
            yield mode.tally
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count what makes the host wait for a GPU in one training step."""

    preset: str = "ms-detr-r50-300"
    """Recipe, by name."""
    batch: int = 2
    """Images of a micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches of the step."""
    activation_checkpointing: Literal["none", "encoder", "all"] = "none"
    """What is computed again in the backward pass."""
    height: int = 128
    """Image height in pixels."""
    width: int = 160
    """Image width in pixels."""
    num_targets: int = 7
    """Boxes per image."""
    device: Literal["auto", "cuda", "pretend"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one, and else pretends."""
    impl: Literal["auto", "reference"] = "auto"
    """Of assignment and losses; `reference` shows what the reference would wait for."""
    published: Path | None = None
    """Folder of the published code, whose step is then counted as well, on the pretended device."""
    check: bool = False
    """Exit with 1 if something waits."""
    seed: int = 0
    """Seed of weights, images, targets and dropout."""

    def __post_init__(self) -> None:
        self.case  # noqa: B018 # it checks what it holds
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

    @property
    def case(self) -> Case:
        """The step, as the benchmark of its speed takes it."""
        return Case(
            preset=self.preset,
            batch=self.batch,
            height=self.height,
            width=self.width,
            num_targets=self.num_targets,
            seed=self.seed,
        )


def build_step(options: Options, device: torch.device) -> Step:
    """A step of the trainer that averages its weights, on batches of the host."""
    config = options.case.config
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
    if _is_pretended(device) and options.impl == "auto":
        trainer.criterion.impl = "triton"
    batch = random_batch(options.case)
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
        setup = Setup("published", options.case, device, options.published, weights)
        return PublishedStep(setup).call


def count_pretended(
    build: Callable[[Options, torch.device], Step], options: Options, folder: Path
) -> Tally:
    """What a step does on the pretended device; callers are lines of `folder`."""
    with pretending(folder):
        step = build(options, pretended_device())
    with pretending(folder) as tally:
        step()
    return tally


def first_wait_on_cuda(step: Step) -> Wait | None:
    """What waits first in a step on a GPU, or None. Takes a step before, which compiles kernels."""
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
        return Wait(lines[-1] if lines else "elsewhere", str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _traceback_lines(error: BaseException) -> Iterator[tuple[Path, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield Path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno
        traceback = traceback.tb_next


def _report(whose: str, tally: Tally) -> None:
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
        print_table(rows, {"count": "", "caller": "", "operation": ""})


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.step_syncs")
        if options.on_cuda:
            wait = first_wait_on_cuda(build_step(options, torch.device("cuda", 0)))
            found = wait is not None
            print("the step never waits for the GPU" if wait is None else f"first wait: {wait}")
        else:
            tally = count_pretended(build_step, options, PACKAGE)
            found = bool(tally.waits)
            _report(f"step of {options.preset}", tally)
        if options.published is not None:
            _report(
                "step of the published code, with PyTorch attention",
                count_pretended(build_published_step, options, options.published),
            )
    return 1 if options.check and found else 0


if __name__ == "__main__":
    raise SystemExit(main())
