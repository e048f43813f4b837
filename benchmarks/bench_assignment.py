"""Assignment of predictions to targets: `python -m benchmarks.bench_assignment`.

One-to-many and one-to-one assignment of six decoder layers, and one-to-one assignment of the
encoder's anchors, on predictions half of which lie near a target. `published` restates the
published algorithm, as the loop over layers, images and targets that it is; it draws by given
priorities, which all share, and leaves out what the published code checks on the way. On a CPU,
`reference_compiled` is the reference as it runs in a compiled criterion: by Inductor in one graph,
for the shapes of each case anew. That takes long, so it runs only where it is named.

Before an implementation is timed, its assignment is compared with the reference's on two images:
the same number of queries per target, and the same scores or total cost. One that is wrong is
reported as wrong. Then implementations take turns call by call, so that what else the machine does
hits all; `speedup` is over `published` in the same run. A duration is from the call to its end on
the device; `device_us`, on a GPU, is the device's share of it, where a call can be captured.

`launches` are kernels, fills and copies, on a CPU as in `benchmarks.launches`. `host_waits` are
reads and blocking copies, counted by torch on a GPU, and on a CPU as in `benchmarks.step_syncs`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import launches
from benchmarks.bench_train_step import NUM_CLASSES, Worker
from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.device_time import Call, graph_seconds, percentiles_us, work_on
from benchmarks.step_syncs import pretended_device, pretending
from msdetr.boxes import box_iou, cxcywh_to_xyxy, pairwise_generalized_iou, pairwise_iou
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import AssignmentConfig
from msdetr.engine.device import resolve_device
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.linear_assignment import linear_assignment
from msdetr.ops.matching_cost import FOCAL_ALPHA, FOCAL_GAMMA, matching_cost
from msdetr.ops.one_to_many import OneToMany, one_to_many
from msdetr.structures import Targets

Task = Literal["one_to_many", "one_to_one", "encoder"]

OURS = "msdetr"
REFERENCE = "reference"
COMPILED = "reference_compiled"
PUBLISHED = "published"
DECODER_LAYERS = 6
GPU_ANCHORS = 22223
"""Tokens of an image of 800 x 1333 pixels on four levels."""
CPU_ANCHORS = 2223
LEAST_SPEEDUP = 10.0
"""Of the one-to-many reference over the published loop, for `--check`."""
CONFIG = AssignmentConfig()

_MEASURED = ("p20_us", "p50_us", "p80_us", "device_us", "launches", "host_waits", "speedup")
"""What a row of an implementation that was not timed lacks."""

_COLUMNS = {
    "task": "",
    "implementation": "",
    "batch": "",
    "queries": "",
    "targets": "",
    "p20_us": ".0f",
    "p50_us": ".0f",
    "p80_us": ".0f",
    "device_us": ".1f",
    "launches": "",
    "host_waits": "",
    "speedup": ".2f",
    "status": "",
}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    task: Task
    batch: int
    queries: int
    """Predictions per image and layer: of the encoder, its anchors."""
    targets: int
    """Per image."""

    @property
    def layers(self) -> int:
        """Layers that are assigned at once."""
        return 1 if self.task == "encoder" else DECODER_LAYERS

    def small(self) -> Case:
        """The same with two images, for comparisons."""
        return Case(self.task, min(self.batch, 2), self.queries, self.targets)


class Inputs(NamedTuple):
    """Predictions and targets of a case."""

    task: Task
    logits: Tensor
    """[N, B, Q, K]"""
    boxes: Tensor
    """[N, B, Q, 4]"""
    targets: Targets
    image_targets: tuple[tuple[Tensor, Tensor], ...]
    """Labels [T'] and boxes [T', 4] of each image, as the published code has them."""
    priority: Tensor
    """[N, B, Q]"""

    @property
    def cost_class(self) -> float:
        """Weight of the class in one-to-one costs."""
        return CONFIG.encoder_cost_class if self.task == "encoder" else CONFIG.cost_class

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        moved: Inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self)
        return moved


def image_targets(targets: Targets) -> tuple[tuple[Tensor, Tensor], ...]:
    """Labels and boxes of each image, without empty slots."""
    return tuple(
        (labels[:count], boxes[:count])
        for labels, boxes, count in zip(
            targets.labels, targets.boxes, targets.count.tolist(), strict=True
        )
    )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs on the CPU. Half of the predictions are near a target, with a likely class."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.layers, case.batch, case.queries)
    rand = functools.partial(torch.rand, generator=generator)

    def random_boxes(*leading: int) -> Tensor:
        sides = rand(*leading, 2) * 0.45 + 0.05
        return torch.cat((sides / 2 + rand(*leading, 2) * (1.0 - sides), sides), dim=-1)

    labels = torch.zeros(case.batch, case.targets, dtype=torch.int64)
    if case.task != "encoder":
        labels = torch.randint(NUM_CLASSES, labels.shape, generator=generator)
    target_boxes = random_boxes(case.batch, case.targets)
    boxes = random_boxes(*shape)
    logits = torch.randn((*shape, NUM_CLASSES), generator=generator) - 4.0
    if case.targets:
        image = torch.arange(case.batch)[:, None]
        chosen = torch.randint(case.targets, shape, generator=generator)
        near = target_boxes[image, chosen]
        noise = torch.randn(near.shape, generator=generator)
        near = near + 0.15 * noise * near[..., 2:].repeat(1, 1, 1, 2)
        near[..., 2:].clamp_(min=0.01)
        is_near = rand(*shape, 1) < 0.5
        boxes = torch.where(is_near, near, boxes)
        logits.scatter_add_(3, labels[image, chosen][..., None], 4.0 * is_near)
    targets = Targets(labels, target_boxes, torch.full((case.batch,), case.targets))
    return Inputs(case.task, logits, boxes, targets, image_targets(targets), rand(*shape))


_BACKGROUND = -1

Pairs = list[list[tuple[Tensor, Tensor]]]
"""Queries and targets [M] of the pairs, per layer and image."""
Dense = tuple[Tensor, Tensor]
"""[N, B, T, k] or [N * B, T]: query of each place, and whether there is one."""


def dense_one_to_many(inputs: Inputs, impl: Impl) -> OneToMany:
    """Ours."""
    return one_to_many(
        inputs.logits,
        inputs.boxes,
        inputs.targets,
        inputs.priority,
        k=CONFIG.one_to_many_k,
        threshold=CONFIG.one_to_many_threshold,
        positive_fraction=CONFIG.positive_fraction,
        cost_box=CONFIG.one_to_many_cost_box,
        cost_class=CONFIG.one_to_many_cost_class,
        impl=impl,
    )


def compiled_one_to_many(inputs: Inputs) -> OneToMany:
    """The reference, compiled in one graph for the shapes of the inputs."""
    return _compiled(inputs.logits.shape, inputs.targets.labels.shape)(inputs, "reference")


@functools.lru_cache(maxsize=1)
def _compiled(*shapes: torch.Size) -> Callable[[Inputs, Impl], OneToMany]:
    torch._dynamo.reset()  # A function is compiled for a few shapes only.
    return torch.compile(dense_one_to_many, fullgraph=True, dynamic=False)


def dense_cost(inputs: Inputs, impl: Impl) -> Tensor:
    """[N, B, Q, T], ours."""
    return matching_cost(
        inputs.logits,
        inputs.boxes,
        inputs.targets,
        cost_class=inputs.cost_class,
        cost_bbox=CONFIG.cost_bbox,
        cost_giou=CONFIG.cost_giou,
        impl=impl,
    )


def dense_one_to_one(inputs: Inputs, impl: Impl) -> Dense:
    """Ours."""
    cost = dense_cost(inputs, impl)
    return linear_assignment(cost.flatten(0, 1), inputs.targets.count.repeat(len(cost)), impl=impl)


def published_one_to_many(
    inputs: Inputs,
    *,
    k: int = CONFIG.one_to_many_k,
    threshold: float = CONFIG.one_to_many_threshold,
) -> Pairs:
    """One image after the other; pairs are in ascending order of their score, as published."""
    return [
        [
            _published_image(logits, boxes, priority, targets, k, threshold)
            for logits, boxes, priority, targets in zip(*layer, inputs.image_targets, strict=True)
        ]
        for layer in zip(inputs.logits, inputs.boxes, inputs.priority, strict=True)
    ]


def _published_image(
    logits: Tensor,
    boxes: Tensor,
    priority: Tensor,
    targets: tuple[Tensor, Tensor],
    k: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    labels, target_boxes = targets
    num_queries = len(boxes)
    if not len(labels):
        return labels, labels
    iou = pairwise_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    probability = logits.sigmoid()[:, labels]
    score = (
        CONFIG.one_to_many_cost_box * iou + CONFIG.one_to_many_cost_class * probability
    ).T  # [T, Q]

    best_score, best_target = score.max(dim=0)
    positive = best_score >= threshold
    positive[score.argmax(dim=1)] = True
    query_class = labels[best_target]
    query_class[~positive] = _BACKGROUND
    candidates = (query_class != _BACKGROUND).nonzero()[:, 0]
    others = (query_class == _BACKGROUND).nonzero()[:, 0]
    limit = int(CONFIG.positive_fraction * num_queries)
    drawn = candidates[priority[candidates].argsort()[:limit]]
    rest = others[torch.randperm(len(others), device=others.device)[: num_queries - len(drawn)]]
    sample = torch.cat((drawn, rest))
    kept = sample[query_class[sample] != _BACKGROUND]

    served, counts = best_target[kept].unique(return_counts=True)
    top_scores, top_queries = score[served].topk(min(k, num_queries), dim=1)
    scores, queries, owners = [], [], []
    for target, count, target_scores, target_queries in zip(
        served, counts, top_scores, top_queries, strict=True
    ):
        scores.append(target_scores[:count])
        queries.append(target_queries[:count])
        owners.append(target.expand(len(queries[-1])))
    if not queries:
        return served, served
    order = torch.cat(scores).argsort()
    return torch.cat(queries)[order], torch.cat(owners)[order]


def published_one_to_one(inputs: Inputs) -> Pairs:
    """One layer after the other; costs are of all predictions for the targets of all images."""
    labels, target_boxes = (torch.cat(parts) for parts in zip(*inputs.image_targets, strict=True))
    counts = [len(image_labels) for image_labels, _ in inputs.image_targets]
    pairs = []
    for logits, boxes in zip(inputs.logits, inputs.boxes, strict=True):
        probability, boxes = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
        positive = (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
        negative = probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
        class_cost = (FOCAL_ALPHA * positive)[:, labels] - ((1 - FOCAL_ALPHA) * negative)[:, labels]
        l1 = torch.cdist(boxes, target_boxes, p=1)
        giou = pairwise_generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        cost = CONFIG.cost_bbox * l1 + inputs.cost_class * class_cost - CONFIG.cost_giou * giou
        of_images = cost.unflatten(0, (len(counts), -1)).cpu().split(counts, dim=-1)
        pairs.append([_solve(images[image]) for image, images in enumerate(of_images)])
    return pairs


def scipy_per_problem(inputs: Inputs) -> Pairs:
    """Our costs, and SciPy with a copy of its own for every problem."""
    counts = [len(labels) for labels, _ in inputs.image_targets]
    return [
        [_solve(problem[:, :count].cpu()) for problem, count in zip(layer, counts, strict=True)]
        for layer in dense_cost(inputs, "auto")
    ]


def _solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)


def torch_linear_assignment(inputs: Inputs) -> Dense:
    """Our costs, and the kernel of the package of that name."""
    from torch_linear_assignment import batch_linear_assignment  # type: ignore[import-not-found]

    # It knows no counts: empty slots cost nothing anywhere.
    cost = dense_cost(inputs, "auto").transpose(2, 3)
    cost = cost.masked_fill(~inputs.targets.mask[:, :, None], 0.0).flatten(0, 1)
    query: Tensor = batch_linear_assignment(cost)
    return query, (query >= 0) & inputs.targets.mask.repeat(len(inputs.logits), 1)


@dataclass(frozen=True)
class Implementation:
    """A way to compute some of the tasks."""

    name: str
    runs: Mapping[Task, Callable[[Inputs], Any]]
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device, or None."""
    compiled: bool = False
    """Compiled for each case: it runs only where named, and its operators are not counted."""
    mixes_images: bool = False
    """Whether one-to-one costs are of predictions and the targets of all images, by layer."""

    def gigabytes(self, case: Case) -> float:
        """About what a call holds at once."""
        mixed = self.mixes_images and case.task != "one_to_many"
        pairs = case.batch * case.queries * case.targets * (case.batch if mixed else case.layers)
        return _BYTES_PER_PAIR * pairs / 2**30


_BYTES_PER_PAIR = 48


def _both(
    one_to_many_run: Callable[[Inputs], Any] | None, one_to_one_run: Callable[[Inputs], Any]
) -> dict[Task, Callable[[Inputs], Any]]:
    runs: dict[Task, Callable[[Inputs], Any]] = {
        "one_to_one": one_to_one_run,
        "encoder": one_to_one_run,
    }
    if one_to_many_run is not None:
        runs["one_to_many"] = one_to_many_run
    return runs


def _no_kernel(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "kernels are timed on a GPU only"
    try:
        resolve_impl("one_to_many", "triton", device)
    except NotImplementedError as error:
        return str(error)
    return None


def _no_torch_linear_assignment(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernel needs a GPU"
    if importlib.util.find_spec("torch_linear_assignment") is None:
        return "not installed"
    return None


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            OURS,
            _both(
                functools.partial(dense_one_to_many, impl="triton"),
                functools.partial(dense_one_to_one, impl="triton"),
            ),
            _no_kernel,
        ),
        Implementation(
            REFERENCE,
            _both(
                functools.partial(dense_one_to_many, impl="reference"),
                functools.partial(dense_one_to_one, impl="reference"),
            ),
        ),
        Implementation(COMPILED, {"one_to_many": compiled_one_to_many}, compiled=True),
        Implementation(
            PUBLISHED, _both(published_one_to_many, published_one_to_one), mixes_images=True
        ),
        Implementation("scipy", _both(None, scipy_per_problem)),
        Implementation(
            "torch-linear-assignment",
            _both(None, torch_linear_assignment),
            _no_torch_linear_assignment,
        ),
    )
}


def taken_pairs(result: Pairs | Dense | OneToMany, inputs: Inputs) -> Tensor:
    """[N, B, T, Q] bool on the CPU, the pairs of a result."""
    layers, batch, queries, _ = inputs.logits.shape
    slots = inputs.targets.labels.shape[1]
    taken = torch.zeros(layers, batch, slots, queries, dtype=torch.bool)
    if isinstance(result, list):
        for layer, images in enumerate(result):
            for image, (query, target) in enumerate(images):
                taken[layer, image, target.cpu(), query.cpu()] = True
        return taken
    query_index, mask = (x.cpu().view(layers, batch, slots, -1) for x in result[:2])
    places = torch.zeros(taken.shape, dtype=torch.int64)
    places.scatter_add_(3, query_index.clamp(min=0), mask.long())
    return places > 0


def pair_values(inputs: Inputs) -> Tensor:
    """[N, B, T, Q] float64, scores or costs."""
    exact = inputs._replace(logits=inputs.logits.double(), boxes=inputs.boxes.double())
    if inputs.task != "one_to_many":
        return dense_cost(exact, "reference").transpose(2, 3)
    boxes = cxcywh_to_xyxy(exact.boxes)[:, :, None]
    target_boxes = cxcywh_to_xyxy(exact.targets.boxes.double())[:, :, None]
    index = exact.targets.labels[None, :, None].expand(*exact.logits.shape[:3], -1)
    probability = exact.logits.gather(3, index).sigmoid().transpose(2, 3)
    return (
        CONFIG.one_to_many_cost_box * box_iou(boxes, target_boxes)
        + CONFIG.one_to_many_cost_class * probability
    )


def what_is_wrong(result: Pairs | Dense | OneToMany, inputs: Inputs) -> str | None:
    """How a result differs from the reference's beyond ties, or None."""
    expected = taken_pairs(IMPLEMENTATIONS[REFERENCE].runs[inputs.task](inputs), inputs)
    taken, values = taken_pairs(result, inputs), pair_values(inputs).cpu()
    if not torch.equal(taken.sum(3), expected.sum(3)):
        return "other numbers of queries per target"
    # Per target where the order of equals cannot matter elsewhere, else per problem.
    over = (3,) if inputs.task == "one_to_many" else (2, 3)
    total, wanted = ((values * pairs).sum(over) for pairs in (taken, expected))
    if not torch.allclose(total, wanted, rtol=1e-5, atol=1e-5):
        return f"values differ by up to {float((total - wanted).abs().max()):.2g}"
    if inputs.task != "one_to_many" and bool((taken.sum(2) > 1).any()):
        return "queries that serve several targets"
    return None


def time_in_turns(
    calls: Mapping[str, Call], device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    """Durations of each call in seconds, until the device is done; calls take turns."""

    def timed(call: Call) -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    durations: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if repetition:  # the first warms up
                durations[name].append(seconds)
    return durations


def count_on_pretended_device(case: Case, name: str) -> tuple[int, int]:
    """Launches and waits of a call on a pretended device, which this process keeps."""
    with pretending():
        inputs = make_inputs(case).to(pretended_device())
    with pretending() as tally:
        IMPLEMENTATIONS[name].runs[case.task](inputs)
    return tally.operations + tally.launches, tally.waits.total()


def count_on_gpu(call: Call) -> tuple[int, int]:
    """Launches and waits of a call on a GPU."""
    call()
    num_launches = launches.count_on_gpu(call)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return num_launches, sum("synchroniz" in str(warning.message) for warning in caught)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time assignment: ours, the reference, the published algorithm, and what else is installed."""

    tasks: tuple[Task, ...] = ("one_to_many", "one_to_one", "encoder")
    """What is assigned."""
    batches: tuple[int, ...] = (2, 8, 16, 32)
    """Images per call."""
    queries: tuple[int, ...] = (300, 900)
    """Queries per image, in the decoder's tasks."""
    targets: tuple[int, ...] = (7, 20, 60, 100)
    """Targets per image."""
    anchors: int | None = None
    """Predictions per image in the encoder's task; by default those of 800 x 1333 pixels on a GPU,
    and a tenth on a CPU."""
    implementations: tuple[str, ...] = ()
    """By name; empty: all that can run here, but `reference_compiled`."""
    repetitions: int = 10
    """Durations taken of each call."""
    memory: float | None = None
    """GiB that a call may need, about; what needs more is left out. By default 4 on a CPU, and 24
    on a GPU."""
    time_budget: float | None = None
    """Seconds after which nothing more is begun; the most typical cases come first."""
    check: bool = False
    """Only compare the one-to-many reference with the published loop, at batch 16, 300 queries and
    7 targets (COCO has 7.3 on average); exit with 1 if it is not 10 times as fast. Compiled code
    does not count."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        for name in self.implementations:
            if name not in IMPLEMENTATIONS:
                raise ValueError(f"implementation {name!r}: known are {', '.join(IMPLEMENTATIONS)}")
        for name in ("batches", "queries"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(value < 0 for value in self.targets):
            raise ValueError(f"targets must not be negative, got {self.targets}")
        if self.anchors is not None and self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, got {self.anchors}")
        if self.repetitions < 2:
            raise ValueError(f"repetitions must be at least 2, got {self.repetitions}")


CHECKED = Case("one_to_many", 16, 300, 7)


def plan(options: Options, device: torch.device) -> list[Case]:
    """All cases, the most typical first."""
    if options.check:
        return [CHECKED]
    anchors = options.anchors or (GPU_ANCHORS if device.type == "cuda" else CPU_ANCHORS)
    cases = [
        Case(task, batch, queries, targets)
        for task in options.tasks
        for batch, queries, targets in itertools.product(
            options.batches,
            (anchors,) if task == "encoder" else options.queries,
            options.targets,
        )
    ]
    return sorted(
        cases,
        key=lambda case: (case.batch != 16) + (case.queries == 900) + (case.targets != 20),
    )


def choose_implementations(options: Options, device: torch.device) -> list[Implementation]:
    """Those that the options name, or all that can run here.

    Raises:
        ValueError: one that is named cannot run here.
    """
    names = (REFERENCE, PUBLISHED) if options.check else options.implementations
    found = []
    for name in names or IMPLEMENTATIONS:
        if IMPLEMENTATIONS[name].compiled and not names:
            continue
        reason = IMPLEMENTATIONS[name].unavailable(device)
        if reason is None:
            found.append(IMPLEMENTATIONS[name])
        elif names:
            raise ValueError(f"{name} cannot run here: {reason}")
        else:
            print(f"without {name}: {reason}")
    return found


def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    options: Options,
    device: torch.device,
    counter: Callable[[Case, str], tuple[int, int]] | None,
) -> list[Row]:
    """A row per implementation, without where it was measured.

    `counter` counts launches and waits on a CPU; None leaves them out.
    """
    memory = options.memory or (24.0 if device.type == "cuda" else 4.0)
    status = {}
    small = make_inputs(case.small()).to(device)
    for implementation in implementations:
        if case.task not in implementation.runs:
            continue
        needed = implementation.gigabytes(case)
        if needed > memory:
            status[implementation.name] = f"left out: needs about {needed:.1f} GiB"
            continue
        wrong = what_is_wrong(implementation.runs[case.task](small), small)
        status[implementation.name] = "ok" if wrong is None else f"wrong: {wrong}"
    inputs = make_inputs(case).to(device)
    calls: dict[str, Call] = {
        name: functools.partial(IMPLEMENTATIONS[name].runs[case.task], inputs)
        for name, found in status.items()
        if found == "ok"
    }
    durations = time_in_turns(calls, device, options.repetitions)
    medians = {name: statistics.median(seconds) for name, seconds in durations.items()}
    rows = []
    for name, found in status.items():
        row: Row = {
            "benchmark": "assignment",
            "implementation": name,
            "task": case.task,
            "batch": case.batch,
            "queries": case.queries,
            "targets": case.targets,
            "layers": case.layers,
            **dict.fromkeys(_MEASURED),
            "repetitions": options.repetitions,
            "status": found,
        }
        if found == "ok":
            row |= percentiles_us(durations[name])
            if PUBLISHED in medians:
                row["speedup"] = medians[PUBLISHED] / medians[name]
            if device.type == "cuda":
                row["launches"], row["host_waits"] = count_on_gpu(calls[name])
                row["device_us"] = _device_us(calls[name]) if not row["host_waits"] else None
            elif counter is not None and not IMPLEMENTATIONS[name].compiled:
                row["launches"], row["host_waits"] = counter(case, name)
        rows.append(row)
    return rows


def _device_us(call: Call) -> float | None:
    try:
        return statistics.median(graph_seconds([call], replays=10)) * 1e6
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def measure(
    options: Options, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[list[Row]]:
    """The rows of each case, as they are measured."""
    begin = clock()
    device = resolve_device(options.device)
    circumstances = environment(device)
    # A pretended device stays with its process.
    with work_on(device), torch.no_grad(), Worker("counter") as worker:

        def counter(case: Case, name: str) -> tuple[int, int]:
            return worker.call(count_on_pretended_device, case, name)

        implementations = choose_implementations(options, device)
        cases = plan(options, device)
        for done, case in enumerate(cases):
            if options.time_budget is not None and clock() - begin > options.time_budget:
                print(f"time budget used up: {len(cases) - done} of {len(cases)} left out")
                return
            rows = measure_case(
                case, implementations, options, device, None if options.check else counter
            )
            yield [{**row, **circumstances} for row in rows]


def _print(rows: Sequence[Row]) -> None:
    cells = [
        {
            name: "-" if row[name] is None else format(row[name], spec)
            for name, spec in _COLUMNS.items()
        }
        for row in rows
    ]
    print_table(cells, dict.fromkeys(_COLUMNS, ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; the exit status: 1 if one of ours is wrong or `--check` fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rows: list[Row] = []
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.bench_assignment")
        for new in measure(options):
            rows += new
            if options.output is not None:
                write_rows(options.output, rows)
    _print(rows)
    failed = [row for row in rows if row["status"].startswith("wrong")]
    if options.check:
        slow = [
            row
            for row in rows
            if row["implementation"] == REFERENCE and not (row["speedup"] or 0.0) >= LEAST_SPEEDUP
        ]
        print(
            f"required: one-to-many at batch {CHECKED.batch}, {CHECKED.queries} queries and "
            f"{CHECKED.targets} targets, the reference (eager) at least {LEAST_SPEEDUP:g} times "
            f"as fast as the published loop, by medians of {options.repetitions} calls in turn"
        )
        for row in slow:
            print(f"the reference is {row['speedup']:.1f} times as fast, not {LEAST_SPEEDUP:g}")
        failed += slow
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
