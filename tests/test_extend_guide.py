"""The code blocks of docs/guide/extend.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

from msdetr.supervision.losses import LOSS_TERMS

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "extend.md"


def test_code_blocks_run() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    before, names = dict(LOSS_TERMS), {"__name__": "__main__"}
    try:
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), names)
    finally:
        LOSS_TERMS.clear()
        LOSS_TERMS.update(before)
