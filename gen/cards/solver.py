"""A learned solver as one folder to distribute: run/solver/ with solver.safetensors, read by `load_solver`, and README.md."""

from pathlib import Path

from midway.gen.cards.parts import write_folder
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.runs import Run
from midway.samplers.hub import FILE, Saved, describe
from midway.tokenizers.hub import checked

FOLDER = "solver"


def finish_solver(run: Run, solver: Saved, license: str) -> Path:
    """Write run.path/solver, the solver and its card; errors and path as `write_folder`. UsageError for no licence."""
    with raising(UsageError, f"--license {license}", "give one such as apache-2.0, mit, cc-by-4.0 or other"):
        text = describe(solver, checked(license))
    return write_folder(run, FOLDER, lambda folder: solver.save(folder / FILE), text)
