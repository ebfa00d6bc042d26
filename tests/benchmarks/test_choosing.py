"""Names on command lines: by a part or in whole, and that every program refuses one that there is not."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import benchmarks
from benchmarks.choosing import UnknownName, beginning, containing, containing_any, named, names_of
from benchmarks.groupings import main
from benchmarks.kernel_times import EXAMPLE


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


def test_parts_by_commas() -> None:
    cases = ["long rows", "rows", "columns"]
    assert containing_any(cases, "col, long", str) == ["long rows", "columns"]
    assert containing_any(cases, "", str) == cases
    assert containing_any(cases, "long rows;columns", str, ";") == ["long rows", "columns"]
    assert beginning(cases, "rows", str) == ["rows"]
    with pytest.raises(UnknownName, match=r"no case has 'colums' .* did you mean 'columns'\?"):
        containing_any(cases, "rows,colums", str)
    with pytest.raises(UnknownName, match="no case begins with 'ows'"):
        beginning(cases, "ows", str)


def test_names_are_told_apart_and_are_not_too_many() -> None:
    with pytest.raises(UnknownName, match="cases: 3 x 3, plain; 1 x 1"):
        containing(["3 x 3, plain", "1 x 1"], "5 x 5", str)
    with pytest.raises(UnknownName, match=r", 119, and 80 more$"):
        containing(range(200), "rows", str)


def test_whole_names() -> None:
    known = {"softmax": 1, "gelu": 2}
    assert named("gelu, softmax,gelu", known, "workload") == [2, 1]
    assert names_of("gelu", known, "workload") == ["gelu"]
    with pytest.raises(UnknownName, match=r"no workload 'sofmax'; did you mean 'softmax'\?; there are: softmax, gelu"):
        named("gelu,sofmax", known, "workload")
    with pytest.raises(UnknownName, match="no workload is named; there are: softmax, gelu"):
        named(" ", known, "workload")


NAMING = {
    *("only", "workloads", "workload", "cases", "case", "ways", "variants", "contests", "contenders", "contender"),
    *("precisions", "few"),
}
"""What options of programs that choose by name are called."""
CHILDREN = {"peak_memory one", "linear_cross_entropy peak"}
"""Commands that programs alone start."""
GIVEN = {"out": "results", "workload": "minilm", "contender": "fxopt", "cases": EXAMPLE}
"""What other parameters get, those that must be given."""


def _programs() -> Iterator[tuple[str, Any]]:
    """Each program's name and its commands."""
    for found in pkgutil.iter_modules(benchmarks.__path__):
        source = (Path(benchmarks.__path__[0]) / f"{found.name}.py").read_text()
        if "typer.run(main)" not in source and "\n    app()" not in source:
            continue
        module = importlib.import_module(f"benchmarks.{found.name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer()
            app.command()(module.main)
        command = typer.main.get_command(app)
        for name, each in getattr(command, "commands", {"": command}).items():
            yield f"{found.name} {name}".strip(), each


CHOOSING = [
    pytest.param(command, option, id=f"{name} {option.name}")
    for name, command in _programs()
    for option in command.params
    if option.name in NAMING and name not in CHILDREN
]


def test_programs_are_found() -> None:
    assert {"conv_micro only", "regions contests", "run workloads", "first_call workload"} <= {
        str(each.id) for each in CHOOSING
    }


@pytest.mark.parametrize(("command", "option"), CHOOSING)
def test_every_program_refuses_a_name_that_there_is_not(
    command: Any, option: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = list[str]()
    for each in command.params:
        if each is option or each.required:
            value = "nonsense" if each is option else GIVEN.get(each.name, "folder")
            words += [value] if each.param_type_name == "argument" else [f"{each.opts[0]}={value}"]
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    said = re.sub(r"[\s\u2502]+", " ", "".join(capsys.readouterr()))
    assert ended.value.code
    assert re.search(r"'nonsense'.*(there are|cases|valid|write)\b", said), said
    assert not list(tmp_path.iterdir())
