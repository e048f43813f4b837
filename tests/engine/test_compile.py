"""Compiled training steps: equal to eager ones, and compiled once per shape."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from assignment.scenes import padded_targets, random_boxes
from model.helpers import image_batch, tiny_config
from torch import Tensor, nn

from msdetr.config import AssignmentConfig, CompileConfig, LossConfig
from msdetr.engine.compile import (
    CompileError,
    compile_step,
    explain_compile_errors,
    is_compiled,
    num_graphs,
    parts,
)
from msdetr.losses.criterion import Criterion
from msdetr.model.detector import Detector, build_detector
from msdetr.structures import ImageBatch, Targets


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Step(NamedTuple):
    """What a forward and a backward pass give."""

    total: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def new_step(**changes: object) -> tuple[Detector, Criterion]:
    """A detector in training mode, and a criterion that draws nothing."""
    torch.manual_seed(0)
    model = build_detector(tiny_config(**changes)).train()
    # Heads start at zero, and hide what lies before them.
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model, Criterion(AssignmentConfig(positive_fraction=1.0), LossConfig())


def images_of(*sizes: tuple[int, int], padded: tuple[int, int] = (64, 64)) -> ImageBatch:
    """The same images at every call."""
    torch.manual_seed(1)
    return image_batch(*sizes, padded=padded)


def targets_of(*counts: int, slots: int = 8) -> Targets:
    """The same targets at every call."""
    torch.manual_seed(2)
    labels = [torch.arange(count) % 3 for count in counts]
    return padded_targets(labels, [random_boxes(count) for count in counts], slots=slots)


def run(
    model: Detector,
    criterion: Criterion,
    images: ImageBatch,
    targets: Targets,
    dtype: torch.dtype = torch.float32,
) -> Step:
    model.zero_grad(set_to_none=True)
    encoder_assignment = criterion.assign_encoder(model.anchors(images), targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(images)
    losses = criterion(
        output,
        targets,
        encoder_assignment=encoder_assignment,
        priority=torch.zeros(output.one_to_one.logits.shape[:3]),
        num_targets=targets.count.sum(),
    )
    losses.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(losses.total.detach(), losses.terms, gradients)


def assert_close(actual: Step, expected: Step, *, rtol: float) -> None:
    """Losses agree to `rtol`, and every gradient to `rtol` of its own norm."""
    torch.testing.assert_close(actual.total, expected.total, rtol=rtol, atol=0.0)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = (actual.gradients[name] - gradient).norm()
        # Gradients of no norm to speak of are rounding errors, of biases before a softmax.
        assert difference <= rtol * (gradient.norm() + 1e-3), name


VARIANTS = {
    "ms-detr": {},
    "ms-detr-pp": {"mixed_selection": True, "look_forward_twice": True},
    "implementation a": {
        "one_to_many": "output",
        "one_to_many_ffn": False,
        "decoder_order": "self_cross",
    },
    "one stage": {"two_stage": False, "box_refine": False},
    "one stage, refined": {"two_stage": False},
    "learned positions": {"position_embedding": "learned"},
    "frozen backbone": {"train_backbone": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_captured_whole(changes: dict[str, object]):
    model, criterion = new_step(**changes)
    eager = run(model, criterion, images_of(), targets_of(3, 1))
    compile_step(model, criterion, backend="eager")
    compiled = run(model, criterion, images_of(), targets_of(3, 1))
    assert_close(compiled, eager, rtol=1e-4)
    assert num_graphs() >= 8


@pytest.mark.parametrize("recompute", ["encoder", "all"])
def test_activation_checkpointing_stays_possible(recompute: str):
    model, criterion = new_step(dropout=0.1)
    model.checkpoint_activations(recompute)
    compile_step(model, criterion, backend="aot_eager")
    torch.manual_seed(1)
    recomputed = run(model, criterion, images_of(), targets_of(3, 1))
    model.checkpoint_activations("none")
    torch.manual_seed(1)
    kept = run(model, criterion, images_of(), targets_of(3, 1))
    assert_close(recomputed, kept, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_generated_code_computes_what_eager_code_does(dtype: torch.dtype, rtol: float):
    # In bfloat16 compiled code rounds less often. Two-stage selection could then choose other
    # queries, which says nothing about the code: one stage.
    model, criterion = new_step(two_stage=False, mixed_selection=False)
    eager = run(model, criterion, images_of(), targets_of(3, 1), dtype)
    compile_step(model, criterion)
    compiled = run(model, criterion, images_of(), targets_of(3, 1), dtype)
    assert_close(compiled, eager, rtol=rtol)


def test_no_recompilation_once_every_bucket_was_met():
    model, criterion = new_step(num_encoder_layers=3, num_decoder_layers=3)
    compile_step(model, criterion, backend="aot_eager")
    buckets = ((64, 64), (64, 96), (96, 64))
    for padded in buckets:
        run(model, criterion, images_of(padded=padded), targets_of(3, 1))
    run(model, criterion, images_of(padded=buckets[0]), targets_of(3, 1, slots=16))
    warm = num_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for counts in ((0, 0), (8, 2), (1, 7)):
            for slots in (8, 16, 32):
                for padded in buckets:
                    images = images_of((40, 61), (64, 33), padded=padded)
                    run(model, criterion, images, targets_of(*counts, slots=slots))
    assert num_graphs() == warm


def test_layers_of_a_kind_share_their_graphs():
    graphs = []
    for layers in (2, 5):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model, criterion = new_step(num_encoder_layers=layers, num_decoder_layers=layers)
        compile_step(model, criterion, backend="aot_eager")
        run(model, criterion, images_of(), targets_of(3, 1))
        graphs.append(num_graphs())
    assert graphs[0] == graphs[1]


def test_an_unmet_shape_compiles_once_more():
    model, criterion = new_step()
    compile_step(model, criterion, backend="aot_eager")
    run(model, criterion, images_of(), targets_of(3, 1))
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        run(model, criterion, images_of(padded=(96, 96)), targets_of(3, 1))


def test_names_and_copies_of_weights_stay_those_of_the_model():
    model, criterion = new_step()
    before = copy.deepcopy(model.state_dict())
    compile_step(model, criterion, backend="aot_eager")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [type(module) for module in model.modules()].count(Detector) == 1


def test_parts_cover_the_whole_model():
    model, criterion = new_step()
    owners = {id(part.owner) for part in parts(model, criterion)}

    def is_covered(module: nn.Module) -> bool:
        return id(module) in owners or (
            bool(list(module.children())) and all(map(is_covered, module.children()))
        )

    # The neck and the position code run inside of `flatten`, the heads inside of `predict`.
    inside = ("neck", "position_embedding", "heads")
    for name, child in model.named_children():
        assert name in inside or is_covered(child), name


def test_what_cannot_be_compiled_is_an_error_with_the_way_out():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    compiled = torch.compile(Broken(), fullgraph=True, backend="aot_eager")
    with pytest.raises(CompileError, match="--compile off"), explain_compile_errors():
        compiled(torch.ones(2))


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("on", "cpu", True),
        ("off", "cuda", False),
    ],
)
def test_what_a_run_compiles(mode: str, device: str, expected: bool):
    assert is_compiled(CompileConfig(mode=mode), torch.device(device)) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_generated_code_on_a_gpu(dtype: torch.dtype, rtol: float):
    config: dict[str, object] = {"two_stage": False, "mixed_selection": False, "hidden_dim": 64}
    model, criterion = new_step(**config)
    model.cuda()
    images = ImageBatch(*(tensor.cuda() for tensor in images_of()))
    targets = Targets(*(tensor.cuda() for tensor in targets_of(3, 1)))

    def step() -> Step:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(images)
        priority = torch.zeros(output.one_to_one.logits.shape[:3], device="cuda")
        losses = criterion(output, targets, priority=priority)
        losses.total.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return Step(losses.total.detach(), losses.terms, gradients)

    eager = step()
    compile_step(model, criterion)
    assert_close(step(), eager, rtol=rtol)
