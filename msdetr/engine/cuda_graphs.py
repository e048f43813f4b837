"""The training step as CUDA graphs: recorded once per shape, then replayed without the host.

Two functions are recorded: forward and backward of a micro-batch, one graph per shape, and the
update, one graph in all. They meet in the gradients, which lie in one buffer at a fixed address, so
that micro-batches of different shapes add up in it. All graphs share one pool of memory: what one
leaves there, the next may overwrite, so that results are copied out at once.

Between several processes the buffer is averaged by one all-reduce between the graphs instead of
DDP's buckets, which would be captured with each shape and could not differ between ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdetr.engine.distributed import Worker
from msdetr.structures import Batch, ImageBatch, Targets
from msdetr.supervision.criterion import LossOutput

T = TypeVar("T")
Replay = Callable[[], None]


class Recorder(Protocol):
    """Records functions that read and write tensors at fixed addresses."""

    def __call__(self, function: Callable[[], T], /) -> tuple[Replay, T]:
        """What runs the function again, and its result, which is valid after that."""


_WARM_UP_RUNS = 2


class _MicroBatch(NamedTuple):
    """A recorded forward and backward pass."""

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
            # A dense layout of any order (channels_last) fills as many elements as it has.
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()

    def average_over_ranks(self, worker: Worker) -> None:
        """Replace the gradients by their mean over all processes."""
        if worker.world_size > 1:
            dist.all_reduce(self.flat)
            self.flat.div_(worker.world_size)


class StepGraphs:
    """Replays a step's two functions. They are called for real until they can be recorded."""

    def __init__(
        self,
        forward_backward: Callable[[Batch, Tensor], LossOutput],
        update: Callable[[], Tensor],
        parameters: Sequence[nn.Parameter],
        worker: Worker,
        generator: torch.Generator,
        *,
        record: Recorder | None = None,
    ) -> None:
        """Take the functions.

        Args:
            forward_backward: adds the gradients of a micro-batch to those of the parameters.
            update: moves the weights, and sets the gradients to zero in place.
            parameters: all that are trained.
            worker: this process.
            generator: what `forward_backward` draws from besides the device's default.
            record: how functions are recorded; default: as a CUDA graph.
        """
        self.gradients = GradientBuffer(parameters)
        self._forward_backward = forward_backward
        self._update = update
        self._worker = worker
        self._generator = generator
        self._record: Recorder = record or CudaRecorder(worker.device, generator)
        self._micro_batches: dict[tuple[torch.Size, ...], _MicroBatch] = {}
        self._updates = 0
        self._recorded_update: tuple[Replay, Tensor] | None = None

    @property
    def num_shapes(self) -> int:
        """Shapes recorded so far."""
        return len(self._micro_batches)

    def forward_backward(self, batch: Batch, num_targets: Tensor) -> LossOutput:
        """As the recorded function."""
        values = [*batch.images, *batch.targets, num_targets]
        key = tuple(value.shape for value in values)
        if key not in self._micro_batches:
            self._micro_batches[key] = self._record_micro_batch(batch, values)
        recorded = self._micro_batches[key]
        for tensor, value in zip(recorded.inputs, values, strict=True):
            tensor.copy_(value)
        recorded.replay()
        total, terms = recorded.losses
        return LossOutput(total.clone(), {name: term.clone() for name, term in terms.items()})

    def update(self) -> Tensor:
        """As the recorded function, with the gradients averaged over ranks before it."""
        self.gradients.average_over_ranks(self._worker)
        self._updates += 1
        if self._updates == 1:  # The optimizer makes its state.
            return self._update()
        if self._recorded_update is None:
            self._recorded_update = self._record(self._update)
        replay, grad_norm = self._recorded_update
        replay()
        return grad_norm.clone()

    def _record_micro_batch(self, batch: Batch, values: list[Tensor]) -> _MicroBatch:
        inputs = [value.clone() for value in values]
        own = Batch(
            images=ImageBatch(*inputs[:2]),
            targets=Targets(*inputs[2:5]),
            image_ids=batch.image_ids,
            original_sizes=batch.original_sizes,
        )

        def run() -> LossOutput:
            return self._forward_backward(own, inputs[5])

        # What is compiled, allocated or chosen at first use cannot be while it is recorded. The
        # runs leave no trace: neither in the gradients nor in what is drawn next.
        gradients = self.gradients.flat.clone()
        drawn = self._generator.get_state()
        devices = [self._worker.device] if self._worker.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for _ in range(_WARM_UP_RUNS):
                run()
            replay, losses = self._record(run)
        self._generator.set_state(drawn)
        self.gradients.flat.copy_(gradients)
        return _MicroBatch(inputs, replay, losses)


class CudaRecorder:
    """Records functions as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], T], /) -> tuple[Replay, T]:
        """What replays the function, and its result."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        self._stream.wait_stream(torch.cuda.current_stream())
        # A Triton kernel that is collected unloads its module, which ends a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Threads of the loader may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = function()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result
