"""What a user may ask for: `torch.compile(model, backend="fxopt", mode=...)` or `options={...}`, as one frozen value."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxopt import knobs
from fxopt import precision as precisions
from fxopt.errors import OptionError
from fxopt.precision import PRECISIONS, TRAINED, Decisions, Table

MODES = {
    "default": "generated kernels from the cost model, few of them measured; inference replays CUDA graphs where it can",
    "reduce-overhead": "default, with CUDA graphs in training as well, which keep the memory of saved activations",
    "max-autotune": "default, with more implementations measured for longer",
}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_fuel(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _is_seconds(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf"))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, (tuple, list, set, frozenset)) and all(isinstance(name, str) for name in value)


def _is_path(value: Any) -> bool:
    return value is None or isinstance(value, (str, os.PathLike))


def _is_mode(value: Any) -> bool:
    return isinstance(value, str)


def _is_precision(value: Any) -> bool:
    return precisions.description(value) is None


def _is_calibration(value: Any) -> bool:
    return _is_path(value) or isinstance(value, Table)


def _is_observer(value: Any) -> bool:
    return value is None or callable(getattr(value, "attached", None))


def _option(default: Any, doc: str, kind: str, accepts: Callable[[Any], bool], in_key: bool) -> Any:
    """A dataclass field that knows its description, which values it accepts, and whether `cache_key_facts` names it."""
    return field(default=default, metadata={"doc": doc, "kind": kind, "accepts": accepts, "in_key": in_key})


@dataclass(frozen=True)
class Options:
    """Options of one compilation. Field metadata: what it means, and whether it changes what is compiled (`in_key`)."""

    mode: str = _option("default", "one of " + ", ".join(MODES), "a mode name", _is_mode, in_key=True)
    freeze: bool = _option(
        False,
        "inference graphs treat parameters and unmutated buffers as constants",
        "a bool",
        _is_bool,
        in_key=True,
    )
    precision: Decisions | None = _option(
        None,
        "precision of layers (" + ", ".join(PRECISIONS) + "): one for all, or a mapping from names and patterns",
        "a precision's name, or a mapping from layers' names to such names",
        _is_precision,
        in_key=True,
    )
    calibration: Table | str | None = _option(
        None,
        "ranges of layers, of fxopt.calibrate or a file's path; without them activations are scaled row by row",
        "a Calibration, a path or None",
        _is_calibration,
        in_key=True,
    )
    strict: bool = _option(False, "a fallback to ATen raises RetreatError", "a bool", _is_bool, in_key=False)
    fallback_random: bool = _option(False, "random ops give eager's own bits", "a bool", _is_bool, in_key=True)
    recompute_random: bool = _option(
        True,
        "the backward may recompute random values from their seed instead of reading saved ones",
        "a bool",
        _is_bool,
        in_key=True,
    )
    tuning_seconds: float | None = _option(
        None,
        "time for measuring kernels in one graph; 0 takes the cost model's choice; None what the mode allows",
        "a number >= 0 or None",
        _is_seconds,
        in_key=True,
    )
    disable: tuple[str, ...] = _option((), "names of passes to switch off", "a list of pass names", _is_names, in_key=True)
    fuel: int | None = _option(
        None, "how many rewrites may be applied in all", "a number >= 0 or None", _is_fuel, in_key=True
    )
    cuda_graphs: bool = _option(
        True,
        "a GPU replays CUDA graphs where it can: in inference, and with reduce-overhead in training",
        "a bool",
        _is_bool,
        in_key=False,
    )
    cuda_graph_limit: int = _option(
        32,
        "how many CUDA graphs one compiled graph keeps, one for each combination of sizes and addresses of weights",
        "a number > 0",
        _is_positive,
        in_key=False,
    )
    steady_modules: bool = _option(
        False,
        "of modules only tensors and training mode are checked in a call: attributes, configurations, classes and globals"
        " are taken to stay as they were when the first call was compiled",
        "a bool",
        _is_bool,
        in_key=False,
    )
    observer: Any = _option(
        None,
        "who is told what layers are given, as fxopt.calibrate does",
        "an object as quant/observers.py has it",
        _is_observer,
        in_key=False,
    )
    dump: str | None = _option(
        None, "directory for readable graphs after each pass", "a path or None", _is_path, in_key=False
    )
    check: bool = _option(False, "verify the graph's rules after every pass (for tests)", "a bool", _is_bool, in_key=False)

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Options from torch.compile's `mode` and `options`; FXOPT_DISABLE, _FUEL, _STRICT and the like are folded in.

        Raises OptionError for an unknown mode or option, or a value of the wrong type; the message lists what is valid.
        """
        given = _checked(options or {})
        if mode is not None:
            if given.get("mode", mode) != mode:
                raise OptionError(f"mode={mode!r} contradicts options={{'mode': {given['mode']!r}}}; give one of them")
            given["mode"] = mode
        _check_mode(given.get("mode", "default"))
        given["disable"] = tuple(sorted({*given.get("disable", ()), *knobs.DISABLE.get()}))
        if given.get("fuel") is None:
            given["fuel"] = knobs.FUEL.get()
        if given.get("tuning_seconds") is None:
            given["tuning_seconds"] = knobs.TUNING_SECONDS.get()
        if given.get("dump") is None:
            given["dump"] = knobs.DUMP.get()
        elif not isinstance(given["dump"], str):
            given["dump"] = os.fspath(given["dump"])
        given["strict"] = given.get("strict", False) or knobs.STRICT.get()
        _quantizing(given)
        return cls(**given)

    @property
    def trains_narrow(self) -> bool:
        """Whether layers of graphs that autograd records may be quantized (passes/fp8_training.py)."""
        rules = () if self.precision is None or self.calibration is not None else self.precision.rules
        return any(precision in TRAINED for _, precision in rules)

    def cache_key_facts(self) -> dict[str, Any]:
        """The options that can change a graph's plan, by name: what the key of a kept plan has to hold. Plain JSON data.

        Keys of kernels and of measurements need none of them: they hold the printed texts. Not among them are `dump` and
        `check`, which only watch, those of CUDA graphs, which are made of finished plans, nor `strict`, under which the plan
        is the same but one with retreats raises (`plan_cache.load` looks at those).
        """
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["in_key"]}
        return {name: _fact(value) for name, value in facts.items()}


def _fact(value: Any) -> Any:
    if isinstance(value, (Decisions, Table)):
        return value.digest()
    return list(value) if isinstance(value, tuple) else value


def _quantizing(given: dict[str, Any]) -> None:
    """Brings the options of quantization into their own types; it freezes weights. A table's path is read by whoever
    compiles."""
    if given.get("precision") is not None:
        given["precision"] = Decisions.of(given["precision"])
    if isinstance(given.get("calibration"), os.PathLike):
        given["calibration"] = os.fspath(given["calibration"])
    if given.get("precision") is not None or given.get("calibration") is not None:
        if given.get("freeze", True) is False:
            raise OptionError(
                "options={'freeze': False} contradicts 'precision' and 'calibration': quantizing freezes weights"
            )
        given["freeze"] = True


def suggestion(name: object, valid: Iterable[str]) -> str:
    """ "; did you mean ...?" for a misspelt name, or one that is cut short; or nothing."""
    names = list(valid)
    longer = [n for n in names if str(name) and n.startswith(str(name))]
    close = longer[:1] or difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        listing = "".join(f"\n  {name}: {doc}" for name, doc in MODES.items())
        raise OptionError(f"unknown mode {mode!r}{suggestion(mode, MODES)}\nValid modes:{listing}")


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(Options)}
    listing = "".join(f"\n  {name}: {f.metadata['doc']} (default {f.default!r})" for name, f in fields.items())
    for name, value in options.items():
        if name not in fields:
            raise OptionError(f"unknown option {name!r}{suggestion(name, fields)}\nValid options:{listing}")
        if name == "precision" and (problem := precisions.description(value)) is not None:
            raise OptionError(f"option 'precision': {problem}{_nearest_precision(value)}\nPrecisions:{_precisions()}")
        if not fields[name].metadata["accepts"](value):
            raise OptionError(
                f"option {name!r} must be {fields[name].metadata['kind']}, got {value!r}\nValid options:{listing}"
            )
    return dict(options)


def _nearest_precision(value: Any) -> str:
    named = value.values() if isinstance(value, Mapping) else [value]
    wrong = next((n for n in named if isinstance(n, str) and n not in PRECISIONS), None)
    return "" if wrong is None else suggestion(wrong, PRECISIONS)


def _precisions() -> str:
    return "".join(f"\n  {name}: {p.doc}" for name, p in PRECISIONS.items())
