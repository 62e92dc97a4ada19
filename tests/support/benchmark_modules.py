"""Benchmarks as modules that tests can call, and what they change put back."""

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Benchmarks set threads and seeds, and add to the path; the next test finds all of it as it was."""
    path, threads, state = list(sys.path), torch.get_num_threads(), torch.get_rng_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        sys.path[:] = path
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        AcceleratorState._reset_state(reset_partial_state=True)


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py under another name, for `samplers` and `training` are parts of Midway too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with as_before():
        spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Report:
    """What a benchmark's main() left: exit code, printed lines, JSON."""

    code: int
    lines: list[str]
    json: dict[str, Any]


def run_main(module: ModuleType, out: Path, *flags: object) -> Report:
    """Call it with these flags, on the CPU."""
    printed = io.StringIO()
    command = [f"{module.__name__}.py", "--out", str(out), *map(str, flags)]
    with pytest.MonkeyPatch.context() as patch, as_before(), contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", command)
        code = module.main()
    return Report(code, printed.getvalue().splitlines(), json.loads(out.read_text()))
