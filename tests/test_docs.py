"""Links, paths and commands in the documentation exist, and its lines are short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
MAX_LINE_LENGTH = 100

_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Files of the project in code spans. Files of a run folder begin with other names.
_FILE = re.compile(r"`((?:msdetr|tests|benchmarks|docs|\.ci)/[\w./-]+)`")
_PAGE = re.compile(r"\bdocs/[\w./-]+\.md")
_MODULE = re.compile(r"python -m\s+(benchmarks[\w.]*)")


def prose(page: Path) -> list[str]:
    """Lines of a page outside of code blocks."""
    blocks = re.split(r"^ *```.*$", page.read_text(), flags=re.MULTILINE)
    return "\n".join(blocks[::2]).splitlines()


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub forms them."""
    headings = [line.lstrip("# ") for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_runnable(module: str) -> bool:
    """Whether `python -m module` can start."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        return spec is not None
    return importlib.util.find_spec(f"{module}.__main__") is not None


def problems(page: Path) -> list[str]:
    """Long lines, dead links, missing files and missing commands of a page."""
    text, lines = page.read_text(), prose(page)
    result = [f"long line: {x}" for x in lines if len(x) > MAX_LINE_LENGTH and x[0] != "|"]
    for link in _LINK.findall("\n".join(lines)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            result.append(f"dead link: {link}")
    if page.name != "CHANGELOG.md":  # The changelog also names removed files.
        result += [f"missing file: {x}" for x in _FILE.findall(text) if not (ROOT / x).exists()]
    modules = sorted(set(_MODULE.findall(text)))
    return result + [f"no command {x}" for x in modules if not is_runnable(x)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_paths_and_commands_exist(page: Path) -> None:
    assert problems(page) == []


@pytest.mark.parametrize("folder", ["msdetr", "benchmarks", "tests"])
def test_pages_that_code_refers_to_exist(folder: str) -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {page}"
        for path in sorted((ROOT / folder).glob("**/*.py"))
        for page in _PAGE.findall(path.read_text())
        if not (ROOT / page).is_file()
    ]
    assert missing == []


def test_problems_are_detected(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[here](#a-title) [there](absent.md) [no](#nowhere)\n"
        f"{'x' * 101}\n| {'x' * 101}\n```\n{'x' * 101}\n```\n"
        "`msdetr/absent.py` `msdetr/boxes.py`\npython -m benchmarks.absent\n"
    )
    assert problems(page) == [
        f"long line: {'x' * 101}",
        "dead link: absent.md",
        "dead link: #nowhere",
        "missing file: msdetr/absent.py",
        "no command benchmarks.absent",
    ]
