"""What pyproject.toml promises exists, and set-up cannot pull a CUDA build of torch onto a machine without a GPU."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("target", [PROJECT["entry-points"]["torch_dynamo_backends"]["fxopt"], PROJECT["scripts"]["fxopt"]])
def test_entry_points_are_callables(target: str) -> None:
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_public_name_loads() -> None:
    import fxopt

    assert all(getattr(fxopt, name) is not None for name in fxopt.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        fxopt.no_such_name  # noqa: B018
    assert fxopt.__version__ == PROJECT["version"]


def test_every_dependency_is_used() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "fxopt").rglob("*.py"))
    used = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
    used |= {"numpy"} if ".numpy()" in text else set()  # what torch asks for when a tensor becomes an array
    assert {re.split(r"\W", dependency)[0] for dependency in PROJECT["dependencies"]} <= used


def test_cpu_constraints_allow_only_the_cpu_build() -> None:
    pins = [line for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if line.startswith("torch")]
    assert pins
    assert all("+cpu" in pin or ("darwin" in pin and "!=" not in pin) for pin in pins)


def test_constraints_satisfy_the_project_and_pin_exactly() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    wanted = [Requirement(r) for group in PROJECT["optional-dependencies"].values() for r in group]
    for requirement in wanted:
        assert requirement.name in pins, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} but {pins[requirement.name]}"


@pytest.mark.parametrize("script", ["demo", "check", ".ci/run", "scripts/setup.sh"])
def test_scripts_parse(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert script == "scripts/setup.sh" or os.access(path, os.X_OK)


def test_readme_opens_with_two_commands_that_exist() -> None:
    first = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    commands = [line.split()[0] for line in first.group(1).splitlines()]
    assert len(commands) == 2
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)
