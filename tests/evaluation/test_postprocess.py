from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from msdetr.boxes import box_iou, cxcywh_to_xyxy
from msdetr.evaluation import postprocess as module
from msdetr.evaluation.postprocess import postprocess
from msdetr.published import config_from_published_args
from msdetr.structures import Predictions

GOLDEN_DIR = Path(__file__).resolve().parents[1] / "golden"


def golden_cases() -> list[Path]:
    """The recorded models; other cases (matching, criterion, attention) have no detections."""
    return sorted(
        file
        for file in GOLDEN_DIR.glob("*.npz")
        if file.with_suffix(".json").is_file() and "post0.scores" in np.load(file).files
    )


def random_predictions(
    seed: int, *, num_images: int = 2, num_queries: int = 12, num_classes: int = 3
) -> tuple[Predictions, Tensor]:
    """Two layers, of which the first is to be ignored; boxes overlap each other."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_images, num_queries)
    logits = torch.randn(*shape, num_classes, generator=generator, dtype=torch.float64)
    center = 0.3 + 0.1 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    size = 0.3 + 0.2 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    sizes = torch.randint(50, 500, (num_images, 2), generator=generator)
    return Predictions(logits, torch.cat((center, size), dim=-1)), sizes


def all_pairs(
    predictions: Predictions, sizes: Tensor, image: int
) -> list[tuple[float, int, Tensor]]:
    """(score, label, box) of every query and class, best first, written the long way."""
    height, width = sizes[image].tolist()
    pairs = []
    for logits, box in zip(
        predictions.logits[-1, image], predictions.boxes[-1, image], strict=True
    ):
        x, y, w, h = box.tolist()
        corners = torch.tensor(
            [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height],
            dtype=torch.float64,
        )
        for label, logit in enumerate(logits.tolist()):
            pairs.append((1 / (1 + np.exp(-logit)), label, corners))
    return sorted(pairs, key=lambda pair: -pair[0])


def suppressed(
    pairs: list[tuple[float, int, Tensor]], threshold: float
) -> list[tuple[float, int, Tensor]]:
    kept: list[tuple[float, int, Tensor]] = []
    for pair in pairs:
        rivals = [box for _, label, box in kept if label == pair[1]]
        if all(box_iou(pair[2], box) <= threshold for box in rivals):
            kept.append(pair)
    return kept


def assert_image_equals(detections, image: int, expected: list[tuple[float, int, Tensor]]) -> None:
    num = len(expected)
    np.testing.assert_allclose(
        detections.scores[image, :num].numpy(), [pair[0] for pair in expected], rtol=1e-12
    )
    assert detections.labels[image, :num].tolist() == [pair[1] for pair in expected]
    torch.testing.assert_close(
        detections.boxes[image, :num], torch.stack([pair[2] for pair in expected])
    )
    assert not detections.scores[image, num:].any()
    assert not detections.labels[image, num:].any()
    assert not detections.boxes[image, num:].any()


@pytest.mark.parametrize("file", golden_cases(), ids=lambda file: file.stem)
def test_published_code_gives_the_same_detections(file: Path) -> None:
    arrays, case = np.load(file), json.loads(file.with_suffix(".json").read_text())
    config = config_from_published_args(
        case["flags"], implementation=case["implementation"], overrides=case["overrides"]
    )
    detections = postprocess(
        Predictions(
            torch.from_numpy(arrays["pred_logits"])[None],
            torch.from_numpy(arrays["pred_boxes"])[None],
        ),
        torch.tensor(case["sizes"]),
        max_detections=config.eval.max_detections,
        nms_iou_threshold=config.eval.nms_iou_threshold,
    )
    for image in range(len(case["sizes"])):
        for name, column in detections._asdict().items():
            np.testing.assert_allclose(
                column[image].numpy(), arrays[f"post{image}.{name}"], rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("max_detections", [1, 7])
def test_best_pairs_of_the_last_layer(num_classes: int, max_detections: int) -> None:
    predictions, sizes = random_predictions(0, num_classes=num_classes)
    detections = postprocess(
        predictions, sizes, max_detections=max_detections, nms_iou_threshold=None
    )
    for image in range(2):
        assert_image_equals(
            detections, image, all_pairs(predictions, sizes, image)[:max_detections]
        )


@pytest.mark.parametrize("nms_iou_threshold", [None, 1.0])
def test_fewer_pairs_than_detections(nms_iou_threshold: float | None) -> None:
    predictions, sizes = random_predictions(1, num_queries=4, num_classes=2)
    detections = postprocess(
        predictions, sizes, max_detections=100, nms_iou_threshold=nms_iou_threshold
    )
    assert detections.boxes.shape == (2, 8, 4)
    for image in range(2):
        assert_image_equals(detections, image, all_pairs(predictions, sizes, image))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_suppression_equals_a_plain_loop(seed: int, threshold: float) -> None:
    predictions, sizes = random_predictions(seed)
    detections = postprocess(predictions, sizes, max_detections=20, nms_iou_threshold=threshold)
    assert detections.scores.shape == (2, 20)
    for image in range(2):
        pairs = all_pairs(predictions, sizes, image)
        kept = suppressed(pairs, threshold)
        assert len(kept) < len(pairs)
        assert threshold > 0.3 or len(kept) < 20  # the lowest threshold leaves places empty
        assert_image_equals(detections, image, kept[:20])


def test_suppression_considers_the_best_candidates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NMS_CANDIDATES", 9)
    predictions, sizes = random_predictions(5)
    detections = postprocess(predictions, sizes, max_detections=20, nms_iou_threshold=0.5)
    for image in range(2):
        assert_image_equals(
            detections, image, suppressed(all_pairs(predictions, sizes, image)[:9], 0.5)
        )


def test_equal_scores_give_distinct_pairs() -> None:
    predictions, sizes = random_predictions(2, num_queries=5, num_classes=3)
    tied = predictions._replace(logits=torch.zeros_like(predictions.logits))
    detections = postprocess(tied, sizes, max_detections=15, nms_iou_threshold=None)
    assert (detections.scores == 0.5).all()
    for image in range(2):
        rows = torch.cat((detections.labels[image, :, None], detections.boxes[image]), dim=1)
        assert len(rows.unique(dim=0)) == 15


@pytest.mark.parametrize("nms_iou_threshold", [None, 0.7])
def test_no_images(nms_iou_threshold: float | None) -> None:
    predictions, sizes = random_predictions(0, num_images=0)
    detections = postprocess(
        predictions, sizes, max_detections=10, nms_iou_threshold=nms_iou_threshold
    )
    assert detections.scores.shape == detections.labels.shape == (0, 10)
    assert detections.boxes.shape == (0, 10, 4)


@pytest.mark.parametrize("nms_iou_threshold", [None, 0.7])
def test_memory_layout_does_not_matter(nms_iou_threshold: float | None) -> None:
    predictions, sizes = random_predictions(3)
    strided = Predictions(
        *(column.transpose(1, 2).contiguous().transpose(1, 2) for column in predictions)
    )
    assert not strided.logits.is_contiguous()
    for ours, expected in zip(
        postprocess(strided, sizes, max_detections=10, nms_iou_threshold=nms_iou_threshold),
        postprocess(predictions, sizes, max_detections=10, nms_iou_threshold=nms_iou_threshold),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("nms_iou_threshold", [None, 0.7])
def test_precision(
    dtype: torch.dtype, expected: torch.dtype, nms_iou_threshold: float | None
) -> None:
    predictions, sizes = random_predictions(4)
    detections = postprocess(
        Predictions(*(column.to(dtype) for column in predictions)),
        sizes,
        max_detections=10,
        nms_iou_threshold=nms_iou_threshold,
    )
    assert detections.scores.dtype == detections.boxes.dtype == expected
    assert detections.labels.dtype == torch.int64


@pytest.mark.parametrize("nms_iou_threshold", [None, 0.7])
def test_values_that_are_not_finite(nms_iou_threshold: float | None) -> None:
    predictions, sizes = random_predictions(6, num_images=1, num_queries=4, num_classes=1)
    predictions.boxes[-1, 0] = torch.tensor(
        [
            [0.1, 0.1, 0.1, 0.1],
            [0.3, 0.3, 0.1, 0.1],
            [torch.nan, 0.5, 0.1, 0.1],
            [0.7, 0.7, 0.1, 0.1],
        ]
    )
    predictions.logits[-1, 0, :, 0] = torch.tensor([torch.nan, torch.inf, 5.0, 0.0])
    detections = postprocess(
        predictions, sizes, max_detections=4, nms_iou_threshold=nms_iou_threshold
    )
    assert detections.scores[0].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert detections.boxes.isfinite().all()
    height, width = sizes[0].tolist()
    expected = cxcywh_to_xyxy(predictions.boxes[-1, 0, [1, 3]]) * torch.tensor(
        [width, height, width, height]
    )
    torch.testing.assert_close(detections.boxes[0, :2], expected)


def test_wrong_sizes_are_refused() -> None:
    predictions, sizes = random_predictions(0)
    with pytest.raises(ValueError, match=r"original_sizes must be \[2, 2\].*got \[1, 2\]"):
        postprocess(predictions, sizes[:1], max_detections=10, nms_iou_threshold=None)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        postprocess(predictions, sizes, max_detections=0, nms_iou_threshold=None)
