"""Every kernel with every dtype, as compiled: `pytest --ptx sm_90 -m compiled`.

The cases are like those of other tests, but few and small, to run with several seeds.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ops import test_assignment_kernels as assignment
from ops import test_focal_loss as focal
from ops import test_ms_deform_attn_kernel as attention
from ops import test_nms as nms
from ptx import dtype_of
from scenes import Scene, random_scene

pytest.importorskip("triton")

from msdetr.kernels.ms_deform_attn import configs
from msdetr.kernels.ms_deform_attn.launch import (
    forward_kernel,
    link_kernel,
    points_kernel,
    walk_kernel,
)

FOLDER = Path(__file__).resolve().parents[2] / "msdetr" / "kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Calls an op, and compares its results with a reference."""

    run: Callable[[torch.device, torch.dtype], Any]
    kernels: tuple[str, ...] = ()
    """Names of those that serve arrays of each dtype."""
    float32_kernels: tuple[str, ...] = ()
    """Names of those whose arrays are float32, whatever the dtype of the predictions."""

    def launches(self, dtype: torch.dtype) -> set[tuple[str, str]]:
        """The kernels that it launches, with the types of their arrays."""
        pairs = [(name, dtype) for name in self.kernels]
        pairs += [(name, torch.float32) for name in self.float32_kernels]
        return {(f"{name}_kernel", str(dtype).removeprefix("torch.")) for name, dtype in pairs}


def fused_attention(device: torch.device, dtype: torch.dtype) -> None:
    """With padding, boxes as reference points, and as many channels as the models have."""
    valid_sizes = [[[3, 5], [2, 3]]]
    attention.check(
        attention.random_call(
            device,
            shapes=attention.LEVELS[:2],
            head_dim=32,
            reference_dim=4,
            valid_sizes=valid_sizes,
            dtype=dtype,
        )
    )


def attention_with_a_channel_per_lane(device: torch.device, dtype: torch.dtype) -> None:
    attention.check(
        attention.random_call(
            device, shapes=attention.LEVELS[:2], head_dim=5, points=3, dtype=dtype
        )
    )


def attention_by_reductions(device: torch.device, dtype: torch.dtype) -> None:
    """The default for more queries; the table may select it for few."""
    with configs.override({"lists": {}}):
        fused_attention(device, dtype)


def deterministic_attention(device: torch.device, dtype: torch.dtype) -> None:
    with attention.deterministic_algorithms():
        attention.TestDeterministic().test_as_accurate(device, dtype)


def windows(device: torch.device, dtype: torch.dtype) -> None:
    """They are the default for bfloat16 alone; the table may select them for other types."""
    with configs.override({"windows": dataclasses.asdict(configs.default_windows(16))}):
        attention.check_samples_on_edges(device, dtype)


def scene_of(dtype: torch.dtype, queries: int = 12) -> Scene:
    scene = random_scene((6, 0, 3), queries=queries)
    return scene._replace(logits=scene.logits.to(dtype))


def matching_cost(device: torch.device, dtype: torch.dtype) -> None:
    assignment.TestMatchingCost().check(scene_of(dtype), device, **assignment.COSTS)


def linear_assignment(device: torch.device, dtype: torch.dtype) -> None:
    tests = assignment.TestLinearAssignment()
    tests.test_rivals_for_the_same_queries(device)
    tests.test_shapes(device, 300, 20, [20, 7])
    tests.test_long_path_through_several_warps(device)


def assignment_of_copies(device: torch.device, dtype: torch.dtype) -> None:
    tests = assignment.TestCopies()
    tests.test_shapes(device, 300, 20, 6, [20, 7])
    tests.test_shapes(device, 150, 30, 6, [30, 11, 0])
    tests.test_crowded_targets(device, 26)


def one_to_many(device: torch.device, dtype: torch.dtype) -> None:
    """Several warps, a few targets, equal scores, and a draw among too many positives."""
    options = assignment.OPTIONS | {"positive_fraction": 0.05}
    for scene in (scene_of(dtype, queries=300), assignment.tied_scene(0, (6, 0, 3), 300, dtype)):
        assignment.check_pairs(scene, torch.rand(3, 300), device, **options)


def focal_loss(device: torch.device, dtype: torch.dtype) -> None:
    focal.check(focal.random_call(device, (2, 2, 14, 91), dtype=dtype))


def nms_mask(device: torch.device, dtype: torch.dtype) -> None:
    """Several blocks, and long chains within one."""
    nms.check(nms.random_boxes(2, 150, dtype=dtype).to(device), 0.3)
    nms.check(nms.chain(70).to(device, dtype), 0.5)


ATTENTION = ("forward", "points", "link", "walk")
CASES = (
    Case(fused_attention, ATTENTION),
    Case(attention_by_reductions, ("value",)),
    Case(attention_with_a_channel_per_lane, ATTENTION),
    Case(deterministic_attention, ATTENTION),
    Case(windows, ("splat", "rest")),
    Case(matching_cost, ("matching_cost",)),
    Case(linear_assignment, (), ("best_columns", "linear_assignment")),
    Case(assignment_of_copies, (), ("best_columns", "linear_assignment")),
    Case(one_to_many, ("score",), ("best_queries", "select")),
    Case(focal_loss, ("focal_forward", "focal_backward")),
    Case(nms_mask, ("nms",)),
)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in (DTYPES if case.kernels else DTYPES[:1])],
    ids=lambda x: x.run.__name__ if isinstance(x, Case) else str(x).removeprefix("torch."),
)
def test_results(kernel_device, compiled_launches, case, dtype):
    case.run(kernel_device, dtype)
    launched = {(launch.kernel, dtype_of(launch.types)) for launch in compiled_launches}
    assert launched >= case.launches(dtype)


def test_every_kernel_has_a_case():
    """A kernel is a compiled function that no other compiled function calls."""
    compiled = [
        function
        for path in FOLDER.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and any(ast.unparse(x).startswith("triton.jit") for x in function.decorator_list)
    ]
    called = {
        node.id if isinstance(node, ast.Name) else node.attr
        for function in compiled
        for node in ast.walk(function)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    kernels = {function.name for function in compiled} - called
    covered = {name for case in CASES for name, _ in case.launches(torch.float32)}
    assert kernels == covered


@pytest.mark.compiled
def test_image_sizes_share_compiled_code(kernel_device):
    """Otherwise training with many image sizes would compile in the middle of a run."""
    kernels = (forward_kernel, points_kernel, link_kernel, walk_kernel)

    def run(*shapes: tuple[int, int], queries: int) -> list[int]:
        attention.random_call(
            kernel_device, shapes=shapes, queries=queries, head_dim=16, reference_dim=4
        ).run("triton")
        return [
            len(compiled) for kernel in kernels for compiled, *_ in kernel.device_caches.values()
        ]

    compiled = run((5, 7), (3, 4), queries=3)
    assert run((6, 10), (3, 5), queries=16) == compiled
    assert run((4, 4), (1, 1), queries=1) == compiled
