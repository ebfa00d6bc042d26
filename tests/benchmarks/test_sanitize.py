"""What compute-sanitizer says of a run of tests is read right."""

from __future__ import annotations

from benchmarks.sanitize import read

TESTS = """tests/a.py::test_b[1] PASSED [ 3%]
tests/a.py::test_b[2] FAILED [ 6%]
tests/a.py::test_c PASSED [ 9%]
"""


def test_errors_are_counted_with_what_was_said_of_them() -> None:
    text = f"""========= COMPUTE-SANITIZER
{TESTS}========= Invalid __global__ read of size 4 bytes
=========     at triton_kernel+0x10
=========
========= ERROR SUMMARY: 1 error
"""
    found = read("memcheck", text, True, 3.04)
    assert (found.found, found.passed, found.failed, found.ended, found.seconds) == (1, 2, 1, True, 3.0)
    assert any("Invalid __global__ read" in line for line in found.details)


def test_a_clean_run_and_one_without_a_summary() -> None:
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert read("racecheck", TESTS + clean, True, 1.0).found == 0
    assert read("racecheck", TESTS, False, 1.0).found is None
