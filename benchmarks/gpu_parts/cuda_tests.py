"""The tests of the suite that need a CUDA device, as rows: those marked `cuda`, all of them in tests/cuda."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_parts.part import Maker, Setting, Skipped

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "cuda"
CONFTEST_NEEDS = ("tyro", "diffusers", "accelerate", "torchvision")
"""What tests/conftest.py imports; tests marked `cuda` use none of its fixtures."""


def makers(setting: Setting) -> dict[str, Maker]:
    """One run of pytest."""
    return {"tests": lambda: outcomes(setting, TESTS)}


def outcomes(setting: Setting, tests: Path) -> Iterator[dict[str, Any]]:
    """A row for every test: passed, failed or skipped, with seconds and the message."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("the package pytest is not installed")
    report = setting.folder / "tests.xml"
    done = subprocess.run(command(tests, report), cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(
            f"pytest ended with {done.returncode} and wrote nothing: {done.stdout[-300:]} {done.stderr[-300:]}"
        )
    cases = list(ElementTree.parse(report).iter("testcase"))
    if not cases:
        raise RuntimeError(f"pytest found no test that is marked: {done.stdout[-300:]}")
    yield from map(case_row, cases)


def command(tests: Path, report: Path) -> list[str]:
    """pytest on this folder or file alone; without the suite's fixtures where the packages that they need are missing."""
    bare = any(importlib.util.find_spec(name) is None for name in CONFTEST_NEEDS)
    flags = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *flags, *(["--noconftest"] if bare else []), str(tests)]


def case_row(case: ElementTree.Element) -> dict[str, Any]:
    """One test of a JUnit report."""
    row: dict[str, Any] = {
        "name": f"{case.get('classname')}::{case.get('name')}",
        "seconds": float(case.get("time") or 0),
    }
    for kind, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            text = f"{found.get('message') or ''} {found.text or ''}"
            return {**row, "status": status, "reason": " ".join(text.split())[:400]}
    return {**row, "status": "measured", "held": True}
