"""Cases by name, and what is said of their kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from benchmarks.kernel_times import job, lines, main


def test_a_case_has_its_kernels_and_contests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, sizes, dtype = job(" column-sum:64x64:float32")
    assert (workload.name, sizes, dtype) == ("column-sum", {"rows": 64, "cols": 64}, "float32")
    monkeypatch.setattr("fxopt.report.compare.kernel_seconds", lambda call, device: {"sum": 1e-6})
    main("column-sum:64x64:float32", "cpu", "eager,copy", seconds=0.01, out=tmp_path / "times.json")
    data = json.loads((tmp_path / "times.json").read_text())
    data["cases"][0]["rows"][0]["contests"] = {"graph r0": {"x1": 2e-6}}
    said = lines(data)
    assert said[0] == "column-sum 64x64 float32" and said[1].endswith("us: sum 1.0")
    assert said[-1] == "  contest graph r0: x1: 2.0"


@pytest.mark.parametrize("text", ["column-sum:64:float32", "no-such:64x64:float32", "column-sum:64x64:float", "column-sum"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no case of memory_bound"):
        job(text)


def test_a_misspelt_case_is_told_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no workload 'layernorm'; did you mean 'layer-norm'\?; there are rms-norm"):
        job("layernorm:64x64:float32")
    with pytest.raises(ValueError, match="write workload:rowsxcols:dtype"):
        job("layer-norm")
    with pytest.raises(typer.BadParameter, match="unknown dtype 'float'"):
        main("layer-norm:64x64:float", "cpu")
