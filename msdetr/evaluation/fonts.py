"""Fonts that have the characters of a class name, in any script.

Pillow's own font has Latin letters only, and draws an empty box for any other. Fonts of the system
are tried until one has all characters of the name.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_VARIABLE = "MSDETR_FONT"
"""Environment variable with a font file to try first."""

# Pillow looks for these names in the font folders of Linux, macOS and Windows.
_FONT_FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "segoeui.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc"),
)
_UNASSIGNED = "\U0010ffff"
"""No font has this character, and all draw the same box for every character that they lack."""


@cache
def readable_text(name: str, label: int, size: int) -> tuple[str, Font]:
    """A class name and a font that has all its characters.

    Where no font has them, the text is `class <label>`, and a warning says which name it stands
    for and how to get a font.

    Args:
        name: name of the class.
        label: its label.
        size: of the font, in pixels.

    Raises:
        ValueError: the file that `MSDETR_FONT` names is no font.
    """
    for font in _fonts(name, size):
        if _has_glyphs(font, name):
            return name, font
    logger.warning(
        "no font has all characters of %r, drawn as 'class %d': install a font with them, such as "
        "the package fonts-noto-cjk or fonts-dejavu, or name a font file in %s",
        name,
        label,
        FONT_VARIABLE,
    )
    return f"class {label}", ImageFont.load_default(size)


def _fonts(text: str, size: int) -> Iterator[Font]:
    chosen = os.environ.get(FONT_VARIABLE)
    if chosen:
        try:
            yield ImageFont.truetype(chosen, size)
        except OSError as error:
            raise ValueError(f"{FONT_VARIABLE}={chosen}: cannot read the font: {error}") from error
    yield ImageFont.load_default(size)
    for file in _font_files(text):
        try:
            yield ImageFont.truetype(file, size)
        except OSError:  # not on this system
            continue


def _font_files(text: str) -> Iterator[str]:
    yield from _FONT_FILES
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        yield str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")
    if shutil.which("fc-list"):
        characters = " ".join(f"{ord(character):x}" for character in sorted(set(text)))
        command = ["fc-list", "--format=%{file}\n", f":charset={characters}"]
        yield from subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def _has_glyphs(font: Font, text: str) -> bool:
    missing = bytes(font.getmask(_UNASSIGNED))
    return all(x.isspace() or bytes(font.getmask(x)) != missing for x in text)
