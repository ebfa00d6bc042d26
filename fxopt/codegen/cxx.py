"""The system's C++ compiler: which one it is, whether it works, and running it so that it cannot take this process along."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from fxopt import knobs

Compiler = tuple[str, ...]

NOT_FOUND = "no C++ compiler found: install g++ or set CXX (or FXOPT_CXX) to one"
COMPILE_SECONDS = 300.0
PROBE_SECONDS = 30.0
"""More than any working compiler takes for a version or for an empty file, on a busy machine too."""
_REASON_LENGTH = 600

_broken: dict[Compiler, str] = {}
"""Compilers that this process has found not to work, with the reason."""
_probing = threading.Lock()
_running: set[subprocess.Popen[str]] = set()
"""They have process groups of their own, so an interrupt at the keyboard does not reach them."""
os.register_at_fork(after_in_child=_running.clear)  # they are the parent's, to wait for and to end


def find_compiler() -> Compiler | None:
    """The compiler command: FXOPT_CXX, $CXX, g++, c++ or clang++, the first that exists; None when there is none.

    FXOPT_CXX, when set, is the only one looked for.
    """
    forced = knobs.CXX.get()
    candidates = [forced] if forced else [os.environ.get("CXX"), "g++", "c++", "clang++"]
    for candidate in candidates:
        words = _words(candidate)
        if words and shutil.which(words[0]):
            return words
    return None


def _words(command: str | None) -> Compiler:
    try:
        return tuple(shlex.split(command or ""))
    except ValueError:  # a quotation mark without its partner
        return (command or "",)


def unusable() -> str | None:
    """Why no C++ can be compiled here, as far as is known by now; None when nothing speaks against it."""
    compiler = find_compiler()
    if compiler is None:
        forced = knobs.CXX.get()
        return f"FXOPT_CXX={forced!r} is no command here; unset it or set it to a C++ compiler" if forced else NOT_FOUND
    version(compiler)
    return _broken.get(compiler)


@functools.cache
def version(compiler: Compiler) -> str:
    """The first line of the compiler's --version. One that cannot even be asked is broken."""
    output, reason = execute([*compiler, "--version"], PROBE_SECONDS)
    if reason is not None and not output:
        _broken[compiler] = _complaint(compiler, reason)
    return output.partition("\n")[0] or str(reason)


def identity(compiler: Compiler) -> str:
    """What machine code depends on: the compiler's version, what its command says beside its name, and the macros that are
    predefined then. "-march=native" alone does not tell the machine."""
    told = compiler[1:]
    return f"{version(compiler)} {shlex.join(told)} {_predefined(compiler)}" if told else version(compiler)


@functools.cache
def _predefined(compiler: Compiler) -> str:
    macros, _ = execute([*compiler, "-dM", "-E", "-x", "c++", os.devnull], PROBE_SECONDS)
    return hashlib.sha256(macros.encode()).hexdigest()[:16]


def blame(compiler: Compiler) -> str | None:
    """After a failure: compile an empty file, to tell a compiler that does not work from a program that it rejects.

    Returns why the compiler does not work, or None. The answer is remembered when it is bad.
    """
    with _probing:
        if compiler not in _broken:
            reason = _probe(compiler)
            if reason is not None:
                _broken[compiler] = _complaint(compiler, reason)
        return _broken.get(compiler)


def _probe(compiler: Compiler) -> str | None:
    try:
        with tempfile.TemporaryDirectory(prefix="fxopt-probe-") as scratch:
            source, output = Path(scratch, "empty.cpp"), Path(scratch, "empty.so")
            source.write_text("")
            reason = execute([*compiler, "-fPIC", "-shared", str(source), "-o", str(output)], PROBE_SECONDS)[1]
            return reason if reason is not None or output.exists() else "it says success but writes no file"
    except OSError:
        return None  # no room for an empty file is not the compiler's fault


def _complaint(compiler: Compiler, reason: str) -> str:
    first = reason.partition("\n")[0]
    return f"the C++ compiler {shlex.join(compiler)} does not work ({first}); repair it or set FXOPT_CXX to another"


def execute(command: Sequence[str], seconds: float) -> tuple[str, str | None]:
    """(what it printed, None when it succeeded, else why not). What takes longer is ended, with all its children."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C"},  # messages are searched for English words
        )
    except OSError as error:
        return "", f"it could not be run: {error.strerror or error}"
    _running.add(process)
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return "", f"it did not finish within {seconds:.0f} s"
        except BaseException:
            _end(process)
            raise
        finally:
            _running.discard(process)
    return output, _failure(process.returncode, errors)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def ended_with_the_block() -> Iterator[None]:
    """Commands that other threads run for the block end when an exception, an interrupt above all, ends the block."""
    try:
        yield
    except BaseException:
        end_all()
        raise


def end_all() -> None:
    """End the commands that this process runs now, with all their children."""
    for process in list(_running):
        _end(process)


def _failure(status: int, errors: str) -> str | None:
    if status == 0:
        return None
    if status < 0:
        return f"it was ended by signal {-status}"
    return essence(errors) or f"exit status {status}"


def essence(message: str) -> str:
    """The first lines of a compiler's message that name an error; all of it when none does. Bounded in length."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.search("error|undefined|fatal|killed", line, re.IGNORECASE)]
    return "\n".join(dict.fromkeys(telling or lines))[:_REASON_LENGTH]
