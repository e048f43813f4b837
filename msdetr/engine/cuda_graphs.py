"""The training step as CUDA graphs: captured once per shape, then replayed without host work.

Two functions are captured: forward and backward of a micro-batch, with one graph per shape, and the
update, with one graph. They share the gradients, which lie in one buffer at a fixed address, so
that micro-batches of different shapes accumulate in it. All graphs share one memory pool. A replay
may overwrite the results of another graph, so that results are copied at once.

With several processes, one all-reduce between the graphs averages the buffer. DDP's buckets would
be captured with each shape, and ranks could not have different shapes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdetr.engine.distributed import Worker
from msdetr.structures import Batch, ImageBatch, TargetCount, Targets
from msdetr.supervision.criterion import LossOutput

T = TypeVar("T")
Replay = Callable[[], None]


class Capture(Protocol):
    """Captures functions that read and write tensors at fixed addresses."""

    def __call__(self, function: Callable[[], T], /) -> tuple[Replay, T]:
        """A function that replays the captured one, and the result, which each replay writes."""


_WARM_UP_RUNS = 2


class _MicroBatch(NamedTuple):
    """A captured forward and backward pass."""

    inputs: list[Tensor]
    replay: Replay
    losses: LossOutput


class GradientBuffer:
    """The gradients of all parameters in one tensor, each laid out as its parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter a gradient of zeros in the buffer."""
        total = sum(parameter.numel() for parameter in parameters)
        self.flat = torch.zeros(total, dtype=torch.float32, device=parameters[0].device)
        offset = 0
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                raise ValueError(f"gradients are float32, a parameter is {parameter.dtype}")
            # A dense layout in any order of dimensions (channels_last) takes `numel` elements.
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()

    def average_over_ranks(self, worker: Worker) -> None:
        """Replace the gradients by their mean over all processes."""
        if worker.world_size > 1:
            dist.all_reduce(self.flat)
            self.flat.div_(worker.world_size)


class StepGraphs:
    """Replays the two functions of a step. The first call of each shape captures it."""

    def __init__(
        self,
        forward_backward: Callable[[Batch, TargetCount], LossOutput],
        update: Callable[[], Tensor],
        parameters: Sequence[nn.Parameter],
        worker: Worker,
        generator: torch.Generator,
        *,
        capture: Capture | None = None,
    ) -> None:
        """Store the functions.

        Args:
            forward_backward: adds the gradients of a micro-batch to those of the parameters.
            update: updates the weights, and sets the gradients to zero in place.
            parameters: all trained parameters.
            worker: this process.
            generator: used by `forward_backward`, besides the device's default generator.
            capture: how functions are captured; default: as a CUDA graph.
        """
        self.gradients = GradientBuffer(parameters)
        self._forward_backward = forward_backward
        self._update = update
        self._worker = worker
        self._generator = generator
        self._capture: Capture = capture or CudaCapture(worker.device, generator)
        self._micro_batches: dict[tuple[torch.Size, ...], _MicroBatch] = {}
        self._updates = 0
        self._captured_update: tuple[Replay, Tensor] | None = None

    def forward_backward(self, batch: Batch, num_targets: TargetCount) -> LossOutput:
        """Replay the function of the same name."""
        values = [*batch.images, *batch.targets, *num_targets]
        key = tuple(value.shape for value in values)
        if key not in self._micro_batches:
            self._micro_batches[key] = self._capture_micro_batch(batch, values)
        captured = self._micro_batches[key]
        for tensor, value in zip(captured.inputs, values, strict=True):
            tensor.copy_(value)
        captured.replay()
        total, terms = captured.losses
        return LossOutput(total.clone(), {name: term.clone() for name, term in terms.items()})

    def update(self) -> Tensor:
        """Average the gradients over ranks, then replay the function of the same name."""
        self.gradients.average_over_ranks(self._worker)
        self._updates += 1
        if self._updates == 1:  # The optimizer creates its state.
            return self._update()
        if self._captured_update is None:
            self._captured_update = self._capture(self._update)
        replay, grad_norm = self._captured_update
        replay()
        return grad_norm.clone()

    def _capture_micro_batch(self, batch: Batch, values: list[Tensor]) -> _MicroBatch:
        inputs = [value.clone() for value in values]
        own = Batch(
            images=ImageBatch(*inputs[:2]),
            targets=Targets(*inputs[2:5]),
            image_ids=batch.image_ids,
            original_sizes=batch.original_sizes,
        )

        def run() -> LossOutput:
            return self._forward_backward(own, TargetCount(*inputs[5:]))

        # The first calls compile code, allocate memory and choose algorithms, which a capture does
        # not allow. They must change neither the gradients nor the random numbers that follow.
        gradients = self.gradients.flat.clone()
        generator_state = self._generator.get_state()
        devices = [self._worker.device] if self._worker.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for _ in range(_WARM_UP_RUNS):
                run()
            replay, losses = self._capture(run)
        self._generator.set_state(generator_state)
        self.gradients.flat.copy_(gradients)
        return _MicroBatch(inputs, replay, losses)


class CudaCapture:
    """Captures functions as CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], T], /) -> tuple[Replay, T]:
        """A function that replays the captured one, and the result, which each replay writes."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        self._stream.wait_stream(torch.cuda.current_stream())
        # Garbage collection of a Triton kernel unloads its module, which would end the capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Threads of the loader may call CUDA during the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = function()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result
