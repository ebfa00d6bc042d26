"""The cost model of matrix products against measured times: `python -m benchmarks.gemm_model`.

Replays `benchmarks/results/gemm_configs_h100.json`, a compact form of what `benchmarks.gemm_micro` wrote: for each case the
time of the library's product and of every configuration, in microseconds with operands in the L2 cache and without. Prints
how much slower the best of the model's few proposals is than the best that was measured. `--compact FILE` renews the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.gemm_micro import GemmCase, cases
from fxopt.codegen.templates.gemm_config import configs, plausible
from fxopt.codegen.templates.gemm_estimate import estimate
from fxopt.codegen.templates.gemm_problem import GemmConfig, GemmProblem
from fxopt.target import Target
from fxopt.tune.candidate import GEMM_CANDIDATES

DATA = Path(__file__).parent / "results" / "gemm_configs_h100.json"
H100 = Target.cuda(90)


@dataclass(frozen=True)
class Measured:
    """Seconds that the tuner would see (the mean of a warm and a cold cache) for each configuration of a case."""

    case: GemmCase
    seconds: Mapping[GemmConfig, float]
    library: float

    @property
    def problem(self) -> GemmProblem:
        return self.case.problem

    @property
    def best(self) -> float:
        return min(self.seconds.values())

    def regret(self, count: int) -> float | None:
        """By which factor the best of `count` proposals is slower than the best of all; None if none was measured."""
        proposed = configs(self.problem, H100, limit=count)
        return min((self.seconds[c] / self.best for c in proposed if c in self.seconds), default=None)

    def errors(self) -> dict[GemmConfig, float]:
        """Logarithm of estimated over measured time."""
        return {c: log(estimate(self.problem, c, H100) / s) for c, s in self.seconds.items()}


def measured(path: Path = DATA) -> list[Measured]:
    """The measured cases. What the model would no longer print is left out."""
    data = json.loads(path.read_text())
    known = {case.title: case for case in cases()}
    return [Measured(known[name], dict(_seconds(known[name], d)), fmean(d["library"]) * 1e-6) for name, d in data.items()]


def _seconds(case: GemmCase, data: Mapping[str, Any]) -> Iterator[tuple[GemmConfig, float]]:
    fitting = plausible(case.problem, H100)
    # Tiles with large accumulators have had their epilogue in one part.
    by_label = {str(replace(c, subtile=1)): c for c in fitting} | {str(c): c for c in fitting}
    return ((by_label[label], fmean(both) * 1e-6) for label, both in data["rows"].items() if label in by_label)


def compact(written: Mapping[str, Any]) -> dict[str, Any]:
    """The output of `gemm_micro` without what the model does not need and without kernels that spill."""

    def times(row: Mapping[str, Any]) -> list[float]:
        return [round(row["us_hot"], 1), round(row["us_cold"], 1)]

    return {
        c["case"]: {
            "library": times(c["library"]),
            "rows": {r["label"]: times(r) for r in c["rows"] if "us_hot" in r and not r["n_spills"]},
        }
        for c in written["cases"]
    }


def main(
    count: Annotated[int, typer.Option(help="proposals a case")] = GEMM_CANDIDATES["default"],
    compact_from: Annotated[Path | None, typer.Option("--compact", help="a gemm_micro.json to take the data from")] = None,
) -> None:
    """Print regret and errors of every case."""
    if compact_from is not None:
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in compact(json.loads(compact_from.read_text())).items())
        DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found = measured()
    for each in found:
        errors = each.errors()
        best = min(each.seconds, key=lambda c: each.seconds[c])
        scale = exp(fmean(errors.values()))
        typer.echo(
            f"{each.case.title:<40} {_said(each.regret(count))}  estimates {scale:5.2f} times measured,"
            f" best {each.best * 1e6:7.1f} us {best}"
        )
    regrets = [r for each in found if (r := each.regret(count)) is not None]
    within = sum(r <= 1.03 for r in regrets)
    typer.echo(f"within 3 %: {within} of {len(regrets)} with a measured proposal, of {len(found)} cases")


def _said(regret: float | None) -> str:
    return "proposals not measured" if regret is None else f"slower by {regret - 1:12.3f}"


if __name__ == "__main__":
    typer.run(main)
