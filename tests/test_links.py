"""Relative links of Markdown files lead to files, `#anchors` to headings, and CONTRIBUTING.md names real files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "tests/**/*.md", "examples/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def links(page: Path) -> list[str]:
    """Targets of links and pictures, code left out."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub and MkDocs make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.relative_to(ROOT)} links to {link}, which is not there"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.relative_to(ROOT)} links to {link}: no such heading"


def test_contributing_names_files_and_functions_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "src/corda_lora"
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert (package / name).exists() or (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which is not there"
    for file, names in re.findall(r"`([\w/]+\.py)` \((`\w+`(?:, `\w+`)*)\)", text):
        code = (package / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:def|class) {name}\b", code, flags=re.MULTILINE), f"{file} has no {name}"
