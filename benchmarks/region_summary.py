"""What a run over regions says: fxopt against the best of its peers, by model; what is slower, less exact or failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.region_catalog import GEMV, PLAIN
from benchmarks.summary import table_of
from fxopt.report.measure import geometric_mean

SLOWER = 1.03
"""How many times the best peer's time is too slow."""

GEMV_SHARE, PRODUCT_SHARE = 0.8, 0.9
"""The share of a copy's bandwidth that a product of one row must reach, and of eager's speed that a plain product must."""

LESS_EXACT = 1.5
"""How many times eager's distance from float64 is too far."""

WORST = 40
"""Lines of a printed list."""

Case = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """fxopt on one region, all with the same freezing: `ratios` say how many times faster it is than each peer, each by the
    times of one interleaved measurement."""

    region: str
    kind: str
    dtype: str
    sizes: Mapping[str, int]
    ratios: Mapping[str, float]
    copy_share: float | None

    @property
    def model(self) -> str:
        return self.region.split("/")[0]

    @property
    def least(self) -> tuple[float, str]:
        """How many times faster than the best peer, and which that is."""
        return min((ratio, peer) for peer, ratio in self.ratios.items())

    def place(self) -> dict[str, Any]:
        return {"region": self.region, "dtype": self.dtype, "sizes": dict(self.sizes)}


def standings(cases: Sequence[tuple[str, Case]], kinds: Mapping[str, str]) -> list[Standing]:
    """One per region of which fxopt and a peer have times. `cases` come with their regions, `kinds` are the regions'.

    A peer that was measured in several cases counts as in the first.
    """
    found: dict[tuple[str, str], Standing] = {}
    for region, case in cases:
        own = _own(case)
        if own is None or own["seconds"] is None:
            continue
        ratios = {
            row["contender"]: row["seconds"] / own["seconds"]
            for row in case["rows"]
            if row["seconds"] is not None and row is not own and row["contender"] != "copy"
        }
        before = found.get((region, case["dtype"]))
        share = before.copy_share if before is not None else own["copy_share"]
        ratios |= before.ratios if before is not None else {}
        if ratios:
            found[region, case["dtype"]] = Standing(region, kinds[region], case["dtype"], case["sizes"], ratios, share)
    return list(found.values())


def _own(case: Case) -> Row | None:
    return next((row for row in case["rows"] if row["contender"].startswith("fxopt")), None)


def summarize(found: Sequence[Standing], cases: Sequence[tuple[str, Case]]) -> dict[str, Any]:
    """Means, counts and lists over regions with the same freezing, as JSON data."""
    slower = sorted((s for s in found if s.least[0] * SLOWER < 1), key=lambda s: s.least)
    peers = list(dict.fromkeys(peer for s in found for peer in s.ratios))
    return {
        **_means(found),
        "over": {peer: _mean([s.ratios[peer] for s in found if peer in s.ratios]) for peer in peers},
        "without": {peer: [s.region for s in found if peer not in s.ratios] for peer in peers},
        "models": {model: _means([s for s in found if s.model == model]) for model in dict.fromkeys(s.model for s in found)},
        "slower": [{**s.place(), "times": 1 / s.least[0], "peer": s.least[1]} for s in slower],
        "gemv": _reached({s.region: s.copy_share for s in found if s.kind == GEMV}, GEMV_SHARE),
        "plain_products": _reached({s.region: s.ratios.get("eager") for s in found if s.kind == PLAIN}, PRODUCT_SHARE),
        "less_exact": [entry for region, case in cases if (entry := _less_exact(region, case)) is not None],
        "failed": [
            {"region": region, "dtype": case["dtype"], "contender": row["contender"], "why": row["skipped"]}
            for region, case in cases
            for row in case["rows"]
            if row["skipped"].startswith("failed")
        ],
    }


def _means(found: Sequence[Standing]) -> dict[str, Any]:
    least = [s.least[0] for s in found]
    return {
        "regions": len(found),
        "over_best": _mean(least),
        "least_over_best": min(least, default=None),
        "slower_regions": sum(ratio * SLOWER < 1 for ratio in least),
    }


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


def _reached(shares: Mapping[str, float | None], limit: float) -> dict[str, Any]:
    known = {region: share for region, share in shares.items() if share is not None}
    return {"regions": len(known), "reached": sum(share >= limit for share in known.values()), "shares": known}


def _less_exact(region: str, case: Case) -> dict[str, Any] | None:
    """The region, when fxopt's error is further from float64 than eager's by more than is allowed."""
    own, eager = _own(case), next((row for row in case["rows"] if row["contender"] == "eager"), None)
    if own is None or eager is None or own["error"] is None or eager["error"] is None:
        return None
    if own["error"] <= LESS_EXACT * eager["error"]:
        return None
    return {"region": region, "dtype": case["dtype"], "error": own["error"], "eager": eager["error"]}


def summary_tables(title: str, summary: Mapping[str, Any]) -> list[Table]:
    """A line for each model, then lists of the worst; the file has all of them."""
    models = table_of(
        f"fxopt, {title}, against the best of its peers", "", "regions", "geometric mean", "at worst", "slower"
    )
    for name, entry in [*summary["models"].items(), ("all", summary)]:
        figures = (_times(entry[key]) for key in ("over_best", "least_over_best"))
        models.add_row(name, str(entry["regions"]), *figures, str(entry["slower_regions"]))
    lines = [f"over {peer}: {_times(mean)}{_without(summary['without'][peer])}" for peer, mean in summary["over"].items()]
    for key, what, limit in (
        ("gemv", "products of one row at the bandwidth of a copy", GEMV_SHARE),
        ("plain_products", "plain products at eager's speed", PRODUCT_SHARE),
    ):
        entry = summary[key]
        lines.append(f"{what}: {entry['reached']} of {entry['regions']} at {limit:.0%} or more")
    models.caption = "\n".join(lines)
    slower = table_of(f"{title}: slower than the best by more than {SLOWER - 1:.0%}", "", "dtype", "time", "the best")
    for entry in summary["slower"][:WORST]:
        slower.add_row(entry["region"], entry["dtype"], _times(entry["times"]), entry["peer"])
    shares = table_of(f"{title}: products of one row below {GEMV_SHARE:.0%} of a copy's bandwidth", "", "share")
    for region, share in sorted(summary["gemv"]["shares"].items(), key=lambda item: item[1]):
        if share < GEMV_SHARE:
            shares.add_row(region, f"{share:.0%}")
    exact = table_of(f"{title}: further from float64 than {LESS_EXACT} times eager", "", "dtype", "error", "eager's")
    for entry in summary["less_exact"][:WORST]:
        exact.add_row(entry["region"], entry["dtype"], f"{entry['error']:.1e}", f"{entry['eager']:.1e}")
    failed = table_of(f"{title}: failed or wrong", "", "dtype", "contender", "why")
    for entry in summary["failed"][:WORST]:
        failed.add_row(entry["region"], entry["dtype"], entry["contender"], entry["why"])
    return [models, *(table for table in (slower, shares, exact, failed) if table.row_count)]


def _without(regions: Sequence[str]) -> str:
    return f" ({len(regions)} regions not yet or not measured)" if regions else ""


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
