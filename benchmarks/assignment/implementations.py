"""The implementations of assignment that are measured against each other.

- `msdetr`: ours, by Triton's kernels.
- `chunked`: ours, by the tuned CPU version that `impl="auto"` takes on a CPU; one-to-many alone.
- `reference`: ours, by the references of the ops.
- `published`: the published algorithm (`published_assignment`).
- `scipy`: one-to-one, by our costs and SciPy with a copy for every problem.

One-to-one includes targets with copies, which `published` and `scipy` repeat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.assignment.cases import CONFIG, Case, Inputs, Task
from benchmarks.assignment.published import (
    Pairs,
    published_one_to_many,
    published_one_to_one,
    solve,
)
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.linear_assignment import linear_assignment_of_layers
from msdetr.ops.matching_cost import matching_cost
from msdetr.ops.one_to_many import OneToMany, one_to_many

CHUNKED = "chunked"
REFERENCE = "reference"
PUBLISHED = "published"

Dense = tuple[Tensor, Tensor]
"""[N, B, T, k]: query of each place, and whether there is one."""
Result = Pairs | Dense | OneToMany
Run = Callable[[Inputs], Result]


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
        iou_weight=CONFIG.one_to_many_iou_weight,
        class_weight=CONFIG.one_to_many_class_score_weight,
        impl=impl,
    )


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
    cost, count = dense_cost(inputs, impl), inputs.targets.count
    return linear_assignment_of_layers(cost, count, None, copies=inputs.copies, impl=impl)[:2]


def scipy_per_problem(inputs: Inputs) -> Pairs:
    """Our costs, and SciPy with a copy of its own for every problem."""
    counts = [len(labels) for labels, _ in inputs.image_targets]
    return [
        [
            solve(problem[:, :count].cpu().repeat(1, inputs.copies))
            for problem, count in zip(layer, counts, strict=True)
        ]
        for layer in dense_cost(inputs, "auto")
    ]


_BYTES_PER_PAIR = 48


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """An implementation of some of the tasks."""

    name: str
    one_to_one: Run | None = None
    """For the decoder, Hybrid DETR's extra queries, and the encoder."""
    one_to_many: Run | None = None
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device, or None."""
    mixes_images: bool = False
    """Whether one-to-one costs of a layer pair predictions with the targets of all images."""

    @property
    def runs(self) -> Mapping[Task, Run]:
        """Its function for each task."""
        runs: dict[Task, Run] = {}
        if self.one_to_one is not None:
            runs |= dict.fromkeys(("one_to_one", "hybrid", "encoder"), self.one_to_one)
        if self.one_to_many is not None:
            runs["one_to_many"] = self.one_to_many
        return runs

    def gigabytes(self, case: Case) -> float:
        """Estimate of the memory of a call."""
        mixed = self.mixes_images and case.task != "one_to_many"
        pairs = case.batch * case.queries * case.targets
        pairs *= case.batch * case.copies if mixed else case.layers
        return _BYTES_PER_PAIR * pairs / 2**30


def _no_kernel(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "kernels are timed on a GPU only"
    try:
        resolve_impl("one_to_many", "triton", device)
    except NotImplementedError as error:
        return str(error)
    return None


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            name="msdetr",
            one_to_one=functools.partial(dense_one_to_one, impl="triton"),
            one_to_many=functools.partial(dense_one_to_many, impl="triton"),
            unavailable=_no_kernel,
        ),
        Implementation(
            name=CHUNKED,
            one_to_many=functools.partial(dense_one_to_many, impl="auto"),
            unavailable=lambda device: "is for CPUs only" if device.type != "cpu" else None,
        ),
        Implementation(
            name=REFERENCE,
            one_to_one=functools.partial(dense_one_to_one, impl="reference"),
            one_to_many=functools.partial(dense_one_to_many, impl="reference"),
        ),
        Implementation(
            name=PUBLISHED,
            one_to_one=published_one_to_one,
            one_to_many=published_one_to_many,
            mixes_images=True,
        ),
        Implementation(name="scipy", one_to_one=scipy_per_problem),
    )
}
