"""Runs printed Triton kernels in Triton's interpreter, in a process of its own (it is chosen when triton is imported).

As a script: reads pickled jobs from stdin and writes pickled answers. `Interpreter` is the client. The interpreter has no
libdevice, so the server puts torch's functions, evaluated in float64, in its place. What a kernel loads or stores outside
of its buffers is an error, also where nothing is made of it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from fxopt.ir.exprs import evaluate
from fxopt.ir.kernel import KernelSource
from fxopt.runtime.batch import layout


class Interpreter:
    """A server process; `run` executes one kernel over CPU tensors in place."""

    def __init__(self) -> None:
        env = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def run(self, source: KernelSource, tensors: dict[str, torch.Tensor], sizes: dict[str, int] | None = None) -> None:
        """Run `source` on `tensors` (each the flat memory of a buffer); raises RuntimeError with the server's traceback."""
        env = sizes or {}
        grid = tuple(evaluate(g, env) for g in source.grid)
        job = {
            "text": source.text,
            "entry": source.entry,
            "blocks": source.compile_options["constexprs"],
            "grid": grid,
            "buffers": [_sendable(tensors[b]) for b in source.buffers],
            "types": [tensors[b].dtype for b in source.buffers],
            "tensor_maps": _tensor_maps(source),
            "batch": (source.members, source.block),
            "sizes": [(evaluate(s, env), t) for s, t in zip(source.sizes, _size_types(source), strict=True)],
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, str):
            raise RuntimeError(f"{answer}\n{source.text}")
        for name, after in zip(source.buffers, answer, strict=True):
            tensors[name].copy_(after.view(tensors[name].dtype))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as pickle takes it, which has no 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _size_types(source: KernelSource) -> list[str]:
    return [t for t in source.compile_options["signature"].values() if not t.startswith(("*", "tensordesc"))]


def _tensor_maps(source: KernelSource) -> list[dict[str, Any] | None]:
    """The geometry of each buffer's parameter that is a tensor descriptor."""
    maps = source.compile_options.get("tensor_maps", {})
    return [maps.get(p) for p, _ in zip(source.compile_options["signature"], source.buffers, strict=False)]


_TORCH_NAMES = {"rint": "round", "pow": "pow", "copysign": "copysign", "fmod": "fmod"}


def _fake_libdevice() -> None:
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def fake(name: str) -> Any:
        function = getattr(torch, _TORCH_NAMES.get(name, name), None) or getattr(torch.special, name)

        def call(*args: Any) -> Any:
            dtype = args[0].dtype
            arrays = [torch.from_numpy(np.array(a.handle.data)) for a in args]
            wide = arrays if name == "nextafter" else [a.double() for a in arrays]
            out = function(*wide).to(arrays[0].dtype).numpy()
            shaped = tl.block_type(dtype, list(out.shape)) if out.shape else dtype
            return tl.tensor(TensorHandle(np.atleast_1d(out), dtype.scalar), shaped)

        return call

    names = (
        "rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
        "erf erfc erfinv lgamma atan2 hypot copysign nextafter fmod pow trunc rint"
    )
    for name in names.split():
        setattr(libdevice, name, fake(name))


def _multiply_bfloat16() -> None:
    """The interpreter multiplies the bits of bfloat16 blocks as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = dot


def _round_to_float8() -> None:
    """The interpreter loses the carry when a mantissa is rounded up to the next power of two."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.create_fp_to_fp

    def rounded(self: Any, x: Any, dtype: Any, mode: Any) -> Any:
        if dtype.scalar != tl.float8e4nv or x.dtype.scalar != tl.float32:
            return convert(self, x, dtype, mode)
        bits = torch.from_numpy(x.data.copy()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(bits.numpy(), dtype.scalar)

    InterpreterBuilder.create_fp_to_fp = rounded


def _patch_once() -> None:
    """The interpreter puts its operators into Triton's modules anew for each call of a device function, which takes longer
    than most of these. Here nobody wants them back."""
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)

    def patched(function: Any) -> Any:
        patch(function)
        return interpreter._LangPatchScope()  # of nothing, which is restored

    interpreter._patch_lang = patched


def _reduce_by_halves() -> None:
    """The interpreter joins elements one by one, in Python, with any function but those for sums and extrema. Here all
    neighbours are joined at once, then those of the results, as a GPU's threads do, too."""
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce

    def halved(self: Any, blocks: tuple[Any, ...]) -> Any:
        arrays, axis = [b.handle.data for b in blocks], self.axis
        if axis is None or arrays[0].shape[axis].bit_count() != 1:
            return one_by_one(self, blocks)
        before = (slice(None),) * (axis % arrays[0].ndim)
        while arrays[0].shape[axis] > 1:
            sides = [
                self.to_tensor(array[(*before, slice(side, None, 2))], block.dtype)
                for side in (0, 1)
                for array, block in zip(arrays, blocks, strict=True)
            ]
            joined = self.combine_fn.fn(*sides)
            results = joined if isinstance(joined, tuple) else (joined,)
            arrays = [r.handle.data.astype(a.dtype) for r, a in zip(results, arrays, strict=True)]
        kept = arrays if self.keep_dims else [a.squeeze(axis) for a in arrays]
        return [self.to_tensor(a, b.dtype) for a, b in zip(kept, blocks, strict=True)]

    ReduceOps.generic_reduce = halved


def _round_to_bfloat16() -> None:
    """The interpreter cuts the lower half of a float32 off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl

    def rounded(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return convert(self, x, dtype)
        bits = torch.from_numpy(x.data.copy()).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), dtype.scalar)

    InterpreterBuilder.cast_impl = rounded


def _enable_asserts() -> None:
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)


class _Bounds:
    """The memory that the kernel which runs has been given."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.starts, self.ends = _spans([])
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        rmw = InterpreterBuilder.create_atomic_rmw

        def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.check(pointers, mask)
            return load(builder, pointers, mask, *rest, **named)

        def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.check(pointers, mask)
            return store(builder, pointers, value, mask, *rest, **named)

        def checked_rmw(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.check(pointers, mask)
            return rmw(builder, operation, pointers, value, mask, *rest)

        InterpreterBuilder.create_masked_load = checked_load
        InterpreterBuilder.create_masked_store = checked_store
        InterpreterBuilder.create_atomic_rmw = checked_rmw

    def give(self, tensors: list[torch.Tensor]) -> None:
        """The next kernel has these."""
        self.starts, self.ends = _spans([(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors])

    def check(self, pointers: Any, mask: Any) -> None:
        """Raise IndexError if a lane that is not masked has an element outside."""
        import numpy as np

        addresses, valid = np.broadcast_arrays(pointers.data, mask.data)
        first = addresses[valid.astype(bool)]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = np.maximum(np.searchsorted(self.starts, first, side="right") - 1, 0)
        outside = (first < self.starts[at]) | (first + np.uint64(size) > self.ends[at])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {first.size} elements lie outside of the kernel's buffers")


def _spans(ranges: list[tuple[int, int]]) -> Any:
    """(starts, ends) of memory ranges in order of their starts; with one that is empty, so that there is one."""
    import numpy as np

    starts, ends = zip(*sorted([(0, 0), *ranges]), strict=True)
    return np.array(starts, dtype=np.uint64), np.array(ends, dtype=np.uint64)


class _Size(int):
    """A size with the type of its parameter, which the interpreter would take from its value."""

    kind: str


def _typed(value: int, kind: str) -> _Size:
    size = _Size(value)
    size.kind = kind
    return size


def _type_sizes() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def typed(arg: Any) -> Any:
        if not isinstance(arg, _Size):
            return convert(arg)
        dtype = tl.str_to_ty(arg.kind, None)
        values = np.array([int(arg)], dtype={"i32": np.int32, "i64": np.int64}[arg.kind])
        return tl.tensor(interpreter.TensorHandle(values, dtype), dtype)

    interpreter._implicit_cvt = typed


def _tables(members: tuple[int, ...], block: int, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a batched kernel is called with."""
    return [*layout(members, block), torch.tensor([b.data_ptr() for b in buffers])]


_STEPS: dict[int, list[int]] = {}
"""From one element of a block to the next, along each dimension, of the descriptor of memory at an address."""


def _take_steps() -> None:
    """The interpreter's descriptors have blocks of neighbours."""
    import numpy as np
    from triton.runtime.interpreter import TensorDescHandle, TensorHandle

    def materialize(self: Any, offsets: Any) -> Any:
        steps = _STEPS.get(self.base.data.item(), [1] * self.ndim)
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        assert (offsets[-1].data * itemsize) % 16 == 0, "a block begins at a multiple of 16 bytes"
        at = np.ix_(*(np.arange(n) * s for n, s in zip(self.block_shape, steps, strict=True)))
        places = [o.data.astype(np.int64) + a for o, a in zip(offsets, at, strict=True)]
        valid = [(p >= 0) & (p < size.data) for p, size in zip(places, self.shape, strict=True)]
        moved = [itemsize * p * s.data.astype(np.int64) for p, s in zip(places, self.strides, strict=True)]
        addresses = sum(np.broadcast_arrays(*moved)) + self.base.data.astype(np.int64)
        return TensorHandle(addresses.astype(np.uint64), self.base.dtype.scalar), np.logical_and.reduce(
            np.broadcast_arrays(*valid)
        )

    TensorDescHandle.materialize_pointers = materialize


def _described(memory: torch.Tensor, geometry: dict[str, Any] | None) -> Any:
    if geometry is None:
        return memory
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor = memory[geometry["offset"] :]
    _STEPS[tensor.data_ptr()] = geometry.get("steps", [1] * len(geometry["shape"]))
    return TensorDescriptor(tensor, geometry["shape"], geometry["strides"], geometry["block"])


def _run(job: dict[str, Any], directory: Path, number: int, bounds: _Bounds) -> list[torch.Tensor]:
    path = directory / f"job{number}.py"
    path.write_text(job["text"])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, job["entry"])
    buffers = [sent.view(dtype) for sent, dtype in zip(job["buffers"], job["types"], strict=True)]
    pointers = _tables(*job["batch"], buffers) if job["batch"][0] else buffers
    bounds.give([*buffers, *pointers])
    _STEPS.clear()
    pointers = [_described(*each) for each in zip(pointers, job["tensor_maps"], strict=False)]
    kernel[job["grid"]](*pointers, *(_typed(*s) for s in job["sizes"]), **job["blocks"])
    return job["buffers"]


def _serve() -> None:
    torch.set_num_threads(1)
    _fake_libdevice()
    _multiply_bfloat16()
    _round_to_float8()
    _patch_once()
    _reduce_by_halves()
    _round_to_bfloat16()
    _enable_asserts()
    _type_sizes()
    _take_steps()
    bounds = _Bounds()
    replies, number = sys.stdout.buffer, 0
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as directory:
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            number += 1
            try:
                answer: Any = _run(job, Path(directory), number, bounds)
            except Exception:
                answer = traceback.format_exc()
            pickle.dump(answer, replies)
            replies.flush()


if __name__ == "__main__":
    _serve()
