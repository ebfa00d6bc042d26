"""What documents name is there: files, links, and every benchmark in the list of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|cpp|cu|h|md|json))\b")
LINK = re.compile(r"\]\(([^)#:]+)\)")
FOLDERS = ("fxopt", "tests", "benchmarks", "docs")
UNLISTED = {"case_worker", "plot", "run"}
"""Programs that `fxopt bench` and others start, not people."""


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Every file of the project, as a path with a leading slash."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file())
    return [f"/{p.relative_to(ROOT)}" for p in (*found, *ROOT.glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_links_exist(document: Path, files: list[str]) -> None:
    text = document.read_text()
    missing = [name for name in FILE.findall(text) if not any(path.endswith(f"/{name}") for path in files)]
    broken = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not missing and not broken, f"{document.name} names {missing}, links to {broken}"


def test_every_benchmark_is_listed() -> None:
    listed = (ROOT / "docs" / "benchmarks.md").read_text()
    programs = [p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
    assert len(programs) > len(UNLISTED)
    assert not [name for name in programs if name not in UNLISTED and not re.search(rf"[`.]{name}\b", listed)]
