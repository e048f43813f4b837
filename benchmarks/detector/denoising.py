"""What denoising takes of a training step: `python -m benchmarks.detector denoising`.

The parts that only denoising has are called on their own, forward and backward, in turns with the
whole step: making the set from the targets, self-attention with and without it, and its pairs and
losses. The rest that denoising costs is the same work as for other queries (cross-attention,
feed-forward networks, heads); the benchmark `supervision` measures all of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from benchmarks.cli import require_at_least
from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.detector.cases import Case
from benchmarks.detector.comparison import Setup
from benchmarks.detector.train import OurStep
from benchmarks.device_time import percentiles_us, time_in_turns
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device
from msdetr.engine.trainer import Trainer
from msdetr.model.decoder import DecoderLayer
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.query_sets import QuerySets
from msdetr.structures import Branch, Predictions, Targets
from msdetr.supervision.losses import LOSS_TERMS, loss_inputs
from msdetr.supervision.matchers import MatchContext


@dataclass(frozen=True, kw_only=True)
class Options(Case):
    """Time the parts of a training step that only denoising has, beside the step."""

    preset: str = "ms-cdn-deformable-detr-r50"
    """Recipe with denoising queries: a preset, or `PRESET+dn`, `PRESET+cdn`."""
    repetitions: int = 5
    """Measured calls of each part, and of the step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "repetitions")
        if self.config.model.denoising == "none":
            raise ValueError(f"preset {self.preset!r} has no denoising queries")


def making(denoising: DenoisingQueries, targets: Targets) -> None:
    """The set of a batch from new draws, and the gradient of the label embedding."""
    made = denoising(targets, denoising.draw(targets))
    torch.autograd.grad(made.content.sum(), list(denoising.parameters()))


def self_attention(
    layers: Sequence[DecoderLayer], sets: QuerySets, batch: int
) -> Callable[[], None]:
    """Both passes of the self-attention of all layers, on random queries."""
    weight = layers[0].self_attn.in_proj_weight
    shape = (batch, sets.num_queries, weight.shape[1])
    x, query_pos = (torch.randn(shape, device=weight.device, requires_grad=True) for _ in range(2))

    def call() -> None:
        for layer in layers:
            output = layer.self_attn(x, query_pos, sets)
            torch.autograd.grad(output.sum(), [x, query_pos, *layer.self_attn.parameters()])

    return call


def losses(trainer: Trainer, sets: QuerySets, targets: Targets) -> Callable[[], None]:
    """Pairs and losses of the denoising set of all layers, on random predictions."""
    criterion, model = trainer.criterion, trainer.model.config
    query_set = sets.sets[0]
    objective = next(one for one in criterion.objectives if one.branch == query_set.branch)
    shape = (model.num_decoder_layers, len(targets.count), query_set.num_queries)
    logits, boxes = (
        torch.rand(*shape, width, device=targets.labels.device, requires_grad=True)
        for width in (cast(int, model.num_classes), 4)
    )

    def call() -> None:
        branch = Branch(Predictions(logits, boxes), num_groups=query_set.num_groups)
        branch = branch.groups_as_images()
        repeated = targets.repeated(query_set.num_groups)
        assignment = objective.matcher(branch, repeated, MatchContext())
        inputs = loss_inputs(
            branch.predictions, repeated, assignment, criterion.loss, impl=criterion.impl
        )
        total = [
            weight * LOSS_TERMS[term](inputs).sum() for term, weight in objective.weights.items()
        ]
        torch.autograd.grad(torch.stack(total).sum(), [logits, boxes])

    return call


def parts(options: Options, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the step is the last one."""
    step = OurStep(Setup("eager", options, device, None, Path("no weights")))
    model, targets = step.trainer.model, step.batch.targets
    assert model.denoising is not None
    denoising = model.denoising
    primary = model.query_selection.sets
    sets = primary.preceded_by(denoising.query_set(targets.labels.shape[1]))
    layers = cast(Sequence[DecoderLayer], model.decoder.layers)
    return {
        "making the set": lambda: making(denoising, targets),
        "self-attention": self_attention(layers, sets, options.batch),
        "self-attention without the set": self_attention(layers, primary, options.batch),
        "pairs and losses": losses(step.trainer, sets, targets),
        "step": step.call,
    }


def measure(options: Options, device: torch.device) -> list[Row]:
    """A row per part."""
    calls = parts(options, device)
    durations = time_in_turns(calls, device, options.repetitions)
    step = statistics.median(durations["step"])
    return [
        {
            "benchmark": "denoising",
            "preset": options.preset,
            "dtype": options.dtype,
            "batch": options.batch,
            "height": options.height,
            "width": options.width,
            "num_targets": options.num_targets,
            "part": part,
            **percentiles_us(seconds),
            "share": statistics.median(seconds) / step,
            "repetitions": len(seconds),
            **environment(device),
        }
        for part, seconds in durations.items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.detector denoising")
        rows = measure(options, resolve_device(options.device))
    if options.output is not None:
        write_rows(options.output, rows)
    print_table(rows, "preset dtype batch part p20_us:.0f p50_us:.0f p80_us:.0f share:.4f")
    return 0
