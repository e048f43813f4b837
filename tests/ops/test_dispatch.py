"""A requested implementation runs or is refused."""

from __future__ import annotations

import pytest
import torch
from scenes import random_scene

from msdetr.ops import dispatch
from msdetr.ops.dispatch import resolve_impl
from msdetr.ops.focal_loss import focal_loss
from msdetr.ops.linear_assignment import linear_assignment
from msdetr.ops.matching_cost import matching_cost
from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from msdetr.ops.nms import nms_mask
from msdetr.ops.one_to_many import one_to_many


def call(op: str, impl: str) -> None:
    """Run one op on small inputs."""
    value, shapes = torch.zeros(1, 4, 1, 1), ((2, 2),)
    scene = random_scene((2,))
    if op == "ms_deform_attn":
        weights = torch.zeros(1, 1, 1, 1, 1)
        ms_deform_attn(value, shapes, torch.zeros(1, 1, 1, 1, 1, 2), weights, impl=impl)
    elif op == "ms_deform_attn_fused":
        reference = torch.zeros(1, 1, 1, 2)
        ms_deform_attn_fused(value, shapes, torch.zeros(1, 1, 3), reference, impl=impl)
    elif op == "linear_assignment":
        linear_assignment(torch.zeros(1, 3, 2), torch.tensor([2]), impl=impl)
    elif op == "matching_cost":
        matching_cost(*scene, cost_class=1.0, cost_bbox=1.0, cost_giou=1.0, impl=impl)
    elif op == "focal_loss":
        background = torch.full((1, 1, 2), -1)
        focal_loss(torch.zeros(1, 1, 2, 3), background, alpha=0.25, gamma=2.0, impl=impl)
    elif op == "nms_mask":
        nms_mask(torch.rand(1, 3, 4), iou_threshold=0.5, impl=impl)
    else:
        priority = torch.zeros(1, 12)
        one_to_many(*scene, priority, k=1, threshold=0.5, positive_fraction=1.0, impl=impl)


every_op = pytest.mark.parametrize(
    "op",
    [
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "linear_assignment",
        "matching_cost",
        "one_to_many",
        "focal_loss",
        "nms_mask",
    ],
)


@every_op
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_auto_and_reference_run(op, impl):
    call(op, impl)


@every_op
@pytest.mark.parametrize("impl", ["cuda", "", "Reference", None])
def test_unknown_implementations_are_refused(op, impl):
    with pytest.raises(ValueError, match=f"impl must be .*{impl!r}"):
        call(op, impl)


@every_op
def test_missing_kernels_are_refused(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", frozenset())
    with pytest.raises(NotImplementedError, match=f"{op} has no Triton kernel"):
        call(op, "triton")
    assert resolve_impl(op, "auto") == "reference"


class TestResolve:
    @pytest.fixture(autouse=True)
    def _one_kernel(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_KERNELS", frozenset({"op"}))
        monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
        monkeypatch.setattr(dispatch, "kernel_devices", {"cuda"})

    @pytest.mark.parametrize(
        ("impl", "device", "unsupported", "expected"),
        [
            ("triton", "cuda", None, "triton"),
            ("reference", "cuda", None, "reference"),
            ("auto", "cuda", None, "triton"),
            ("auto", "cuda", "too wide", "reference"),
            ("auto", "cpu", None, "reference"),
        ],
    )
    def test_requests(self, impl, device, unsupported, expected):
        assert resolve_impl("op", impl, torch.device(device), unsupported) == expected

    def test_auto_takes_the_chunked_implementation_on_a_cpu_only(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_CHUNKED", frozenset({"op"}))
        assert resolve_impl("op", "auto", torch.device("cpu")) == "chunked"
        assert resolve_impl("op", "reference", torch.device("cpu")) == "reference"
        assert resolve_impl("op", "auto", torch.device("cuda"), "too wide") == "reference"

    def test_kernels_run_on_an_emulating_cpu_on_request_only(self, monkeypatch):
        monkeypatch.setattr(dispatch, "kernel_devices", {"cpu"})
        assert resolve_impl("op", "triton", torch.device("cpu")) == "triton"
        assert resolve_impl("op", "auto", torch.device("cpu")) == "reference"

    def test_refusals_give_the_reason(self, monkeypatch):
        with pytest.raises(NotImplementedError, match="op: too wide"):
            resolve_impl("op", "triton", torch.device("cuda"), "too wide")
        with pytest.raises(NotImplementedError, match=r"needs a CUDA device .* got cpu"):
            resolve_impl("op", "triton", torch.device("cpu"))
        monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
        with pytest.raises(NotImplementedError, match="Triton is not installed"):
            resolve_impl("op", "triton", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_arguments_are():
    value = torch.rand(1, 4, 1, 4, device="cuda:1")
    locations = torch.rand(1, 3, 1, 1, 1, 2, device="cuda:1")
    weights = torch.rand(1, 3, 1, 1, 1, device="cuda:1")
    with torch.cuda.device(0):
        result = ms_deform_attn(value, ((2, 2),), locations, weights, impl="triton")
        expected = ms_deform_attn(value, ((2, 2),), locations, weights, impl="reference")
        torch.testing.assert_close(result, expected)
