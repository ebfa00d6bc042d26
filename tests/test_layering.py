"""Imports point downwards only; docs/architecture.md says why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fxopt

PACKAGE = Path(fxopt.__file__).parent

FOUNDATION = {"target", "options", "knobs", "journal", "errors", "garbage", "precision"}
# What each part of fxopt may import; parts are the first component below the package.
ALLOWED = {
    "errors": set(),
    "garbage": set(),
    "knobs": {"errors"},
    "precision": set(),
    "options": {"errors", "knobs", "precision"},
    "target": {"errors", "knobs"},
    "journal": {"errors"},
    "ir": FOUNDATION,
    "passes": {"ir"} | FOUNDATION,
    "quant": {"ir", "report"} | FOUNDATION,  # of `report` the timer, and where Dynamo stopped
    "lower": {"ir"} | FOUNDATION,
    "runtime": {"ir"} | FOUNDATION,
    "codegen": {"ir", "runtime"} | FOUNDATION,
    "tune": {"lower", "codegen", "runtime", "ir"} | FOUNDATION,
    "capture": {"ir"} | FOUNDATION,
    "engine": {"runtime", "ir"} | FOUNDATION,
    "assemble": {"lower", "tune", "codegen", "runtime", "ir"} | FOUNDATION,
    "plan_cache": {"lower", "tune", "codegen", "runtime", "ir"} | FOUNDATION,
    "compiler": {
        *("assemble", "plan_cache", "capture", "passes", "quant", "lower", "tune", "codegen", "runtime", "ir"),
        *FOUNDATION,
    },
}
TOP = {"backend", "generation", "cli", "cli_cache", "report", "__init__"}
# Only capture/ may touch what torch does not document; the comparison with Inductor sets Inductor's own switch.
PRIVATE_TORCH = (
    "torch._inductor",
    "torch._functorch",
    "torch._dynamo",
    "torch._subclasses",
    "torch._guards",
    "torch._prims",
)


def _sources(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def _parts() -> list[str]:
    names = {p.stem for p in PACKAGE.glob("*.py")} | {
        p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))
    }
    return sorted(names - {"__pycache__"})


def imported_modules(path: Path) -> set[str]:
    """Every absolute module that the file imports anywhere, in functions too; type-checking imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out so that layering stays readable"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_parts(path: Path) -> set[str]:
    return {m.split(".")[1] for m in imported_modules(path) if m.startswith("fxopt.")}


@pytest.mark.parametrize("part", [p for p in _parts() if p not in TOP])
def test_imports_point_downwards(part: str) -> None:
    assert part in ALLOWED, f"fxopt/{part} has no place in the layering: give it one here and in docs/architecture.md"
    for path in _sources(part):
        upward = (imported_parts(path) & set(_parts())) - ALLOWED[part] - {part}
        assert not upward, f"{path.relative_to(PACKAGE)} imports {sorted(upward)}, which {part} may not"


@pytest.mark.parametrize("part", ["runtime", "engine"])
def test_runtime_needs_no_triton(part: str) -> None:
    for path in _sources(part) if (PACKAGE / part).exists() else []:
        assert not {m for m in imported_modules(path) if m.split(".")[0] == "triton"}, f"{path} imports Triton"


def test_private_torch_stays_in_capture() -> None:
    for path in PACKAGE.rglob("*.py"):
        private = {m for m in imported_modules(path) if m.startswith(PRIVATE_TORCH)}
        if path == PACKAGE / "report" / "contenders.py":
            private -= {"torch._inductor.config"}
        name = path.relative_to(PACKAGE)
        assert not private or name.parts[0] == "capture", f"{name} imports {sorted(private)}"


def test_passes_and_codegen_meet_in_ir() -> None:
    for path in _sources("passes"):
        assert "codegen" not in imported_parts(path)
    for path in _sources("codegen"):
        assert "passes" not in imported_parts(path)


def test_import_of_the_package_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, fxopt; print(sorted({'torch', 'triton', 'rich', 'typer', 'sympy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"import fxopt loads {out.stdout.strip()}"
