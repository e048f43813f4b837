"""Runs the CUDA code paths on fake tensors, which have devices and dtypes but no values.

Autocast and operators have rules of their own for CUDA. Mixing in a CPU tensor is an error, and so
is reading a value. Autograd's backward pass needs a real GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.detector.cases import Case, Dtype
from msdetr.engine.device import autocast
from msdetr.evaluation.postprocess import postprocess
from msdetr.model.detector import build_detector
from msdetr.structures import ImageBatch, TargetCount, Targets
from msdetr.supervision.criterion import Criterion

DEVICE = torch.device("cuda", 0)


class Kernels(TorchDispatchMode):
    """Which of our operators run, and the type of the first argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator.namespace == "msdetr":
            self.calls[operator.overloadpacket.__name__, args[0].dtype] += 1
            if "impl" in (argument.name for argument in operator._schema.arguments):
                assert "triton" in args
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def _autocast_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.mark.usefixtures("_autocast_as_on_a_gpu")
@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("ms-detr-r50-300", "bfloat16"),
        ("ms-detr-pp-r50-300", "bfloat16"),
        ("deformable-detr-r50", "float32"),  # one stage
        ("ms-cdn-deformable-detr-r50", "bfloat16"),
        ("dn-deformable-detr-r50", "bfloat16"),
        ("dino-r50-4scale", "float32"),
        ("deta-r50", "bfloat16"),
    ],
)
def test_detector_and_criterion(preset: str, dtype: Dtype) -> None:
    config = Case(preset=preset, dtype=dtype).config
    detector = build_detector(config.model, initialize_backbone=False)
    named = {**dict(detector.named_parameters()), **dict(detector.named_buffers())}
    lower = getattr(torch, dtype)
    with FakeTensorMode():
        state = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            for name, x in named.items()
        }
        images = ImageBatch(
            torch.empty(2, 3, 256, 320, dtype=torch.uint8, device=DEVICE),
            torch.empty(2, 2, dtype=torch.int64, device=DEVICE),
        )
        targets = Targets(
            torch.empty(2, 8, dtype=torch.int64, device=DEVICE),
            torch.empty(2, 8, 4, device=DEVICE),
            torch.empty(2, dtype=torch.int64, device=DEVICE),
        )
        criterion = Criterion(config.assignment, config.loss)
        with Kernels() as kernels:
            with autocast(DEVICE, dtype):
                noise = detector.draw_noise(targets, None)
                output = torch.func.functional_call(detector, state, (images, targets, noise))
            losses = criterion(
                output,
                targets,
                num_targets=TargetCount(*torch.ones(2, device=DEVICE)),
                priority=criterion.draw_priority(output),
            )
        results: list[object] = [output, losses]
        if config.model.proposal_nms_iou_threshold is None:  # torchvision's suppression reads back.
            detector.eval()
            with torch.no_grad(), autocast(DEVICE, dtype):
                answer = torch.func.functional_call(detector, state, (images,))
            detections = postprocess(
                answer.one_to_one, images.sizes, max_detections=100, nms_iou_threshold=None
            )
            results.append(detections)

    result = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
    assert {tensor.device for tensor in result} == {DEVICE}
    assert output.one_to_one.logits.dtype == lower
    assert output.one_to_one.boxes.dtype == torch.float32
    assert {x.dtype for x in (losses.total, *losses.terms.values())} == {torch.float32}
    branches = len(losses.terms) // 3
    matched = output.branches.keys() & {"one_to_one", "encoder", "encoder_selected"}
    if config.assignment.decoder_match == "iou":
        matched = set()
    expected = {
        ("ms_deform_attn_fused", lower): 12,
        ("focal_loss", lower): branches,
        ("matching_cost", lower): len(matched),
        ("linear_assignment", torch.float32): len(matched),
        ("one_to_many", lower): int("one_to_many" in output.branches),
        ("nms_mask", torch.float32): int(config.model.proposal_nms_iou_threshold is not None),
    }
    assert kernels.calls == Counter(expected)
