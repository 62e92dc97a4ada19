"""Solvers as folders to share, with the verbs that models have.

save_pretrained(folder)     solver.safetensors and README.md, the card
from_pretrained(folder)     the solver again, by a folder or a Hub id
push_to_hub("owner/name")   the folder in a repository of the Hub
"""

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol, Self

from midway.samplers.card import SolverCard
from midway.samplers.schedule import Schedule

FILE = "solver.safetensors"
LICENSE = "apache-2.0"
USAGE = """\
from midway import load_solver
solver = load_solver(".")  # load_solver(".", model) checks that it belongs to {needs}
print(solver)
# images = draw(model, tokenizer, solver, seeds=range(16))"""
"""Python that loads the solver in the current folder."""


def found(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The file of a solver: of a folder, of a file itself, or of a Hub id, whose options are huggingface_hub's.

    FileNotFoundError for a folder without one; errors of the Hub.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / FILE).exists():
            raise FileNotFoundError(f"{path} has no {FILE}: give a folder of save_pretrained, or a file of a solver")
        return path / FILE
    if path.exists():
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), FILE, **hub))


class Saved(Protocol):
    """A solver that one file holds."""

    @property
    def grid(self) -> tuple[float, ...]: ...

    @property
    def nfe(self) -> int: ...

    @property
    def hash(self) -> str: ...

    @property
    def card(self) -> SolverCard | None: ...

    def save(self, path: Path) -> None: ...


def describe(solver: Saved, license: str = LICENSE) -> str:
    """The card of a folder: origin and cost of a learned solver, numbers of any, and Python that loads it."""
    learned = solver.card
    name = getattr(solver, "solver", "") if learned is None else learned.name
    facts: dict[str, object] = {"solver": name, "evaluations of the network": solver.nfe, "hash": solver.hash}
    needs = "the model's schedule"
    if learned is not None:
        facts |= {
            "learned for the model": learned.model_hash,
            "schedule": learned.schedule,
            "grid": learned.grid_name,
            "guidance": f"{learned.guidance:g}",
            "teacher": learned.teacher,
            "evaluations spent on learning": f"{learned.training_nfe:,}",
        }
        needs = f"the model {learned.model_hash}"
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    times = " ".join(f"{time:.6g}" for time in solver.grid)
    return (
        f"---\nlicense: {license}\nlibrary_name: midway\ntags:\n- ode-solver\n---\n\n"
        f"# Solver: {name}, {solver.nfe} evaluations\n\n"
        f"| | |\n|---|---|\n{rows}\n| times | {times} |\n\n"
        f"## Loading, in this folder\n\n```python\n{USAGE.format(needs=needs)}\n```\n\n## Licence\n\n{license}\n"
    )


def write(solver: Saved, folder: Path, license: str) -> None:
    """The solver's file and its card into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    solver.save(folder / FILE)
    (folder / "README.md").write_text(describe(solver, license), encoding="utf-8")


class Shared:
    """The verbs of a solver that has `save` and `load`."""

    def save_pretrained(self: Saved, folder: str | os.PathLike[str], *, license: str = LICENSE) -> None:
        """Write the solver and its card into a folder, which is made."""
        write(self, Path(folder), license)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], schedule: Schedule, **hub: Any) -> Self:
        """What `save_pretrained` wrote into a folder, or has on the Hub (`hub`: revision, token, ...).

        ValueError for a file of another kind or of another schedule; FileNotFoundError; errors of the Hub.
        """
        return cls.load(found(source, **hub), schedule)  # pyright: ignore[reportAttributeAccessIssue]

    def push_to_hub(
        self: Saved,
        repo_id: str,
        *,
        license: str = LICENSE,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with midway",
    ) -> str:
        """Upload the folder to a repository "owner/name" of the Hub, which is made; the commit's address. Errors of the Hub."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            write(self, Path(folder), license)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message))
