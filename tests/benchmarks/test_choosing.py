"""Cases by a part of their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from benchmarks.choosing import containing
from benchmarks.groupings import main


def test_cases_that_have_the_part() -> None:
    assert containing(["long rows", "rows"], "rows", str) == ["long rows", "rows"]
    assert containing(["long rows", "rows"], "", str) == ["long rows", "rows"]
    assert containing([], "rows", str) == []


def test_a_name_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"no case has 'squeze' .* did you mean 'squeeze'\?; cases: squeeze, x"):
        containing(["squeeze", "x"], "squeze", str)
    with pytest.raises(typer.BadParameter, match="no case has 'nothing'"):
        main(tmp_path / "new", "cpu", "nothing")
    assert not (tmp_path / "new").exists()
