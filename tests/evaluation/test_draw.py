from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msdetr.evaluation.draw import draw_comparison, draw_detections

NAMES = ("disc", "square", "triangle")
NO_BOXES = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
NO_DETECTIONS = (*NO_BOXES, torch.zeros(0))


GROUND = (40, 120, 200)


def plain_image(height: int, width: int) -> Tensor:
    color = torch.tensor(GROUND, dtype=torch.uint8)
    return color[:, None, None].expand(3, height, width)


def drawn(boxes: list[list[float]], labels: list[int], scores: list[float] | None) -> np.ndarray:
    picture = draw_detections(
        plain_image(32, 64),
        torch.tensor(boxes),
        torch.tensor(labels),
        None if scores is None else torch.tensor(scores),
        NAMES.__getitem__,
        panel_size=256,
    )
    return np.asarray(picture)


def colors(picture: np.ndarray) -> dict[tuple[int, int, int], int]:
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(value): count for value, count in zip(values.tolist(), counts, strict=True)}


def box_color(label: int) -> tuple[int, int, int]:
    picture = drawn([[16, 12, 48, 28]], [label], None)
    return tuple(picture[112, 160].tolist())  # on the lower side of the box, four times enlarged


def test_image_is_enlarged_and_the_box_is_at_its_place() -> None:
    picture = drawn([[16, 12, 48, 28]], [1], [0.5])
    assert picture.shape == (128, 256, 3)
    color = box_color(1)
    assert color != GROUND
    for y, x in ((112, 160), (80, 64), (80, 192)):  # lower, left and right side
        assert tuple(picture[y, x]) == color
    assert tuple(picture[90, 128]) == GROUND  # inside


def test_labels_have_colors_of_their_own() -> None:
    assert len({box_color(label) for label in range(3)}) == 3


def test_scores_are_written() -> None:
    box, label = [[16.0, 12, 48, 28]], [0]
    assert (drawn(box, label, [0.25]) != drawn(box, label, [0.75])).any()
    assert (drawn(box, label, [0.25]) != drawn(box, label, None)).any()


def test_texts_of_coinciding_boxes_do_not_hide_each_other() -> None:
    box = [16.0, 12, 48, 28]
    alone = colors(drawn([box], [0], [0.5]))[box_color(0)]
    together = colors(drawn([box, box, box], [0, 1, 2], [0.5, 0.6, 0.7]))
    for label in range(2):
        # The box itself lies under the best one: what remains is the text's ground.
        assert together[box_color(label)] > alone / 4


def test_box_beyond_the_image_shows_its_sides() -> None:
    picture = drawn([[-10, -10, 100, 100]], [1], None)
    color = box_color(1)
    assert tuple(picture[127, 128]) == tuple(picture[64, 255]) == color


def test_comparison_holds_every_image_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "comparison.png"
    images = [plain_image(32, 32), plain_image(20, 40), plain_image(300, 200)]
    draw_comparison(
        path, images, [NO_BOXES] * 3, [NO_DETECTIONS] * 3, NAMES.__getitem__, panel_size=64
    )
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture)
    heights_times_widths = 64 * 64 + 32 * 64 + 64 * 43
    assert (pixels == np.array(GROUND)).all(axis=-1).sum() == 2 * heights_times_widths


def test_comparison_leaves_out_low_scores(tmp_path: Path) -> None:
    box, label = torch.tensor([[8.0, 8, 24, 24]]), torch.tensor([1])

    def pixels(score: float) -> np.ndarray:
        path = tmp_path / "comparison.png"
        draw_comparison(
            path,
            [plain_image(32, 32)],
            [NO_BOXES],
            [(box, label, torch.tensor([score]))],
            NAMES.__getitem__,
            score_threshold=0.5,
        )
        return np.asarray(Image.open(path))

    color = np.array(box_color(1))
    assert not (pixels(0.49) == color).all(axis=-1).any()
    result = (pixels(0.51) == color).all(axis=-1)
    assert result.any()
    assert not result[:, : result.shape[1] // 2].any()  # predictions are on the right


def test_unsuitable_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\] uint8, got \[3, 8, 8\] torch.float32"):
        draw_detections(torch.zeros(3, 8, 8), *NO_BOXES, None, NAMES.__getitem__)
    with pytest.raises(ValueError, match="1 images, 0 truths and 1 detections"):
        draw_comparison(
            tmp_path / "a.png", [plain_image(8, 8)], [], [NO_DETECTIONS], NAMES.__getitem__
        )
    with pytest.raises(ValueError, match="one or more images"):
        draw_comparison(tmp_path / "a.png", [], [], [], NAMES.__getitem__)
