from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont

from msdetr.evaluation import fonts
from msdetr.evaluation.draw import draw_detections
from msdetr.evaluation.fonts import readable_text


@pytest.fixture(autouse=True)
def _forget_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(fonts.FONT_VARIABLE, raising=False)
    readable_text.cache_clear()
    yield
    readable_text.cache_clear()


def has_system_font(text: str) -> bool:
    if not shutil.which("fc-list"):
        return False
    charset = ":charset=" + " ".join(f"{ord(character):x}" for character in text)
    return bool(subprocess.run(["fc-list", charset], capture_output=True).stdout)


def default_font_file(folder: Path) -> Path:
    """Pillow's own font as a file. Latin letters only."""
    file = folder / "latin.ttf"
    font = ImageFont.load_default(16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    file.write_bytes(font.font_bytes)
    return file


@pytest.mark.parametrize("name", ["bolt", "größe", "подшипник", "锚栓螺母", "ベアリング"])
def test_every_character_has_a_glyph_of_its_own(name: str) -> None:
    if not name.isascii() and not has_system_font(name):
        pytest.skip(f"no font of this system has the characters of {name}")
    text, font = readable_text(name, 1, 16)
    assert text == name
    # A font without them draws the same box for all.
    assert len({bytes(font.getmask(character)) for character in name}) == len(set(name))


def test_without_a_font_the_label_is_drawn_and_a_warning_names_the_class(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "_font_files", lambda text: ["no-such-font.ttf"])
    names = ("锚栓", "class 0", "подшипник")

    def drawn(label: int) -> np.ndarray:
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        box = torch.tensor([[8.0, 30, 50, 60]])
        return np.asarray(
            draw_detections(image, box, torch.tensor([label]), None, names.__getitem__)
        )

    with caplog.at_level(logging.WARNING):
        assert [readable_text(names[label], label, 16)[0] for label in range(3)] == [
            "class 0",
            "class 0",
            "class 2",
        ]
        pictures = [drawn(label) for label in (0, 0, 2)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # once per class
    assert "'锚栓', drawn as 'class 0'" in messages[0]
    assert "fonts-noto-cjk" in messages[0]
    assert fonts.FONT_VARIABLE in messages[0]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_a_font_file_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = default_font_file(tmp_path)
    monkeypatch.setenv(fonts.FONT_VARIABLE, str(file))
    _, font = readable_text("bolt", 0, 16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.path == str(file)
    readable_text.cache_clear()
    monkeypatch.setenv(fonts.FONT_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=f"{fonts.FONT_VARIABLE}=.*cannot read the font"):
        readable_text("bolt", 0, 16)
