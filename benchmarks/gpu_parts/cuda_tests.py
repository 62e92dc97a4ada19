"""The tests of the suite that need a CUDA device, as rows: those marked `cuda`, all of them in tests/cuda."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_parts.part import Maker, Setting, Skipped

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "cuda"
OUTCOME = re.compile(r"(\S+::.+?) (PASSED|SKIPPED)\b")
CONFTEST_NEEDS = ("tyro", "diffusers", "accelerate", "torchvision")
"""What tests/conftest.py imports; tests marked `cuda` use none of its fixtures."""


def makers(setting: Setting) -> dict[str, Maker]:
    """One run of pytest."""
    return {"tests": lambda: outcomes(setting, TESTS)}


def outcomes(setting: Setting, tests: Path) -> Iterator[dict[str, Any]]:
    """A row for every test: those that pass or are skipped as they do, for none is lost where time runs out; then the others."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("the package pytest is not installed")
    report, printed = setting.folder / "tests.xml", list[str]()
    with subprocess.Popen(
        command(tests, report), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            found = OUTCOME.match(line)
            if found:
                skipped = {"status": "skipped", "reason": "by the test itself"}
                yield {"name": found[1], **({"held": True} if found[2] == "PASSED" else skipped)}
    if not report.exists():
        raise RuntimeError(f"pytest ended with {process.returncode}: {''.join(printed)[-300:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    if not cases:
        raise RuntimeError(f"pytest found no test that is marked: {''.join(printed)[-300:]}")
    yield from filter(None, map(failed_row, cases))


def command(tests: Path, report: Path) -> list[str]:
    """pytest on this folder or file alone; without the suite's fixtures where the packages that they need are missing."""
    bare = any(importlib.util.find_spec(name) is None for name in CONFTEST_NEEDS)
    flags = ["-v", "-m", "cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *flags, *(["--noconftest"] if bare else []), str(tests)]


def failed_row(case: ElementTree.Element) -> dict[str, Any] | None:
    """Of one test of a JUnit report, None if it neither failed nor could not be run."""
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            text = " ".join(f"{found.get('message') or ''} {found.text or ''}".split())
            return {"name": f"{case.get('classname')}::{case.get('name')}", "status": "failed", "reason": text[:400]}
    return None
