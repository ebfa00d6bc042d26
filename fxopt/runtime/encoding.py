"""How a plan's values become JSON and come back checked: field readers that name what is wrong, and op arguments.

JSON has no NaN, complex numbers, tuples or torch types; those are objects with one key that says what they are, such as
`{"dtype": "float32"}`. Everything else is JSON's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fxopt.errors import PlanError
from fxopt.ir.exprs import Int
from fxopt.ir.exprs_json import from_json, to_json
from fxopt.ir.region import Ref, Size

T = TypeVar("T")

_TORCH_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


class Field:
    """One value inside a plan's JSON together with its path, so that every error names the field."""

    __slots__ = ("data", "path")

    def __init__(self, data: Any, path: str) -> None:
        self.data, self.path = data, path

    def fail(self, wanted: str) -> PlanError:
        shown = repr(self.data)
        return PlanError(f"{self.path}: expected {wanted}, found {shown if len(shown) <= 80 else shown[:77] + '...'}")

    def __getitem__(self, key: str) -> Field:
        if not isinstance(self.data, dict):
            raise self.fail("an object")
        if key not in self.data:
            raise PlanError(f"{self.path}.{key}: missing")
        return Field(self.data[key], f"{self.path}.{key}")

    def items(self) -> list[Field]:
        if not isinstance(self.data, list):
            raise self.fail("a list")
        return [Field(x, f"{self.path}[{i}]") for i, x in enumerate(self.data)]

    def each(self, read: Callable[[Field], T]) -> tuple[T, ...]:
        return tuple(read(item) for item in self.items())

    def text(self) -> str:
        if not isinstance(self.data, str):
            raise self.fail("a string")
        return self.data

    def boolean(self) -> bool:
        if not isinstance(self.data, bool):
            raise self.fail("true or false")
        return self.data

    def integer(self) -> int:
        if not isinstance(self.data, int) or isinstance(self.data, bool):
            raise self.fail("an integer")
        return self.data

    def number(self) -> float:
        if not isinstance(self.data, (int, float)) or isinstance(self.data, bool):
            raise self.fail("a number")
        return float(self.data)

    def choice(self, *allowed: str) -> str:
        if self.data not in allowed:
            raise self.fail(" or ".join(allowed))
        return self.text()

    def size(self) -> Int:
        """An integer expression as `ir.exprs_json.to_json` writes it."""
        try:
            return from_json(self.data)
        except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError) as error:
            raise self.fail("an integer expression") from error

    def sizes(self) -> tuple[Int, ...]:
        return self.each(Field.size)

    def names(self) -> tuple[str, ...]:
        return self.each(Field.text)

    def dtype(self) -> torch.dtype:
        value: torch.dtype = self.torch_value("dtype")
        return value

    def device(self) -> torch.device:
        try:
            return torch.device(self.text())
        except RuntimeError as error:
            raise self.fail("a device such as cpu or cuda:0") from error

    def torch_value(self, kind: str) -> Any:
        """The torch dtype, layout or memory format of that name."""
        value = getattr(torch, self.text(), None)
        if not isinstance(value, _TORCH_KINDS[kind]):
            raise self.fail(f"a torch {kind}")
        return value


def torch_name(value: Any) -> str:
    """`float32` for torch.float32, `strided` for torch.strided, and so on."""
    return str(value).removeprefix("torch.")


def sizes_json(xs: tuple[Int, ...]) -> list[Any]:
    return [to_json(x) for x in xs]


def encode_float(x: float) -> Any:
    """A float as JSON; NaN and the infinities, which JSON lacks, as {"float": "nan"}."""
    return x if math.isfinite(x) else {"float": repr(x)}


def encode_value(value: Any, path: str) -> Any:
    """An op argument or plan output as JSON.

    Takes Ref, Size, None, bool, int, float, complex, str, dtype, device, layout, memory_format and nested lists, tuples and
    dicts with string keys. Raises PlanError naming `path` for anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, list):
        return [encode_value(x, f"{path}[{i}]") for i, x in enumerate(value)]
    return _encode_tagged(value, path)


def _encode_tagged(value: Any, path: str) -> dict[str, Any]:
    match value:
        case Ref(name):
            return {"ref": name}
        case Size(expr):
            return {"size": to_json(expr)}
        case complex():
            return {"complex": [encode_float(value.real), encode_float(value.imag)]}
        case torch.device():
            return {"device": str(value)}
        case tuple():
            return {"tuple": [encode_value(x, f"{path}[{i}]") for i, x in enumerate(value)]}
        case dict() if all(isinstance(k, str) for k in value):
            return {"dict": {k: encode_value(v, f"{path}[{k!r}]") for k, v in value.items()}}
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: torch_name(value)}
    raise PlanError(f"{path}: a plan cannot hold a {type(value).__name__}: {value!r}")


def decode_value(field: Field) -> Any:
    """Inverse of `encode_value`. Raises PlanError naming the field."""
    data = field.data
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode_value(item) for item in field.items()]
    if not isinstance(data, dict) or len(data) != 1:
        raise field.fail("an argument value")
    kind = next(iter(data))
    decode = _DECODERS.get(kind)
    if decode is None:
        raise field.fail("an argument value")
    return decode(field[kind])


def _decode_float(field: Field) -> float:
    return float(field.choice("nan", "inf", "-inf"))


def _decode_part(field: Field) -> float:
    return _decode_float(field["float"]) if isinstance(field.data, dict) else field.number()


def _decode_complex(field: Field) -> complex:
    parts = field.each(_decode_part)
    if len(parts) != 2:
        raise field.fail("a real and an imaginary part")
    return complex(*parts)


def _decode_dict(field: Field) -> dict[str, Any]:
    if not isinstance(field.data, dict):
        raise field.fail("an object")
    return {k: decode_value(field[k]) for k in field.data}


_DECODERS: dict[str, Callable[[Field], Any]] = {
    "ref": lambda f: Ref(f.text()),
    "size": lambda f: Size(f.size()),
    "float": _decode_float,
    "complex": _decode_complex,
    "device": Field.device,
    "tuple": lambda f: f.each(decode_value),
    "dict": _decode_dict,
    "dtype": Field.dtype,
    "layout": lambda f: f.torch_value("layout"),
    "memory_format": lambda f: f.torch_value("memory_format"),
}


def size_values(value: Any) -> list[Int]:
    """Every integer expression that an argument value mentions."""
    match value:
        case Size(expr):
            return [expr]
        case list() | tuple():
            return [e for x in value for e in size_values(x)]
        case dict():
            return [e for x in value.values() for e in size_values(x)]
    return []
