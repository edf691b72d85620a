"""The documentation: links resolve, code is code, and the README's example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as the usual Markdown renderers make them."""
    headings = re.findall(r"^#+\s+(.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def blocks(path: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name(page)} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{name(page)} links to {link}; {name(path)} has {sorted(anchors(path))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path) -> None:
    for number, code in enumerate(blocks(page, "python"), 1):
        compile(code, f"{name(page)} block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_end_cleanly(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").split("\n")
    assert lines[-1] == "", f"{name(page)} does not end with a newline"
    assert not [n for n, line in enumerate(lines, 1) if line.rstrip() != line], f"{name(page)}: trailing blanks"


# A page whose first Python block is complete: it runs, in order, each in the names that the one before it left.
RUNNABLE = ["README.md", "docs/checker.md", "docs/quantization.md", "docs/runtime.md"]


@pytest.mark.parametrize("page", RUNNABLE)
def test_examples_run(page: str) -> None:
    names: dict[str, object] = {}
    code = blocks(ROOT / page, "python")
    assert code
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{page} block {number}", "exec"), names)


def test_every_page_is_reachable() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "index.md" and f"({p.name}" not in index]
    assert not missing, f"docs/index.md does not link to {missing}"


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
