"""Files of solvers, changed."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from resuming import seal
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from midway.gen.diffusion.load import load_model
from midway.samplers.card import SolverCard
from midway.samplers.grids import logsnr
from midway.samplers.learned import LearnedTable

Change = Callable[[dict[str, Tensor], dict[str, str]], object]
"""Changes the tensors and the header of a safetensors file in place."""


def rewrite(path: Path, change: Change) -> None:
    """The file with changed tensors and header."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors, header = {name: file.get_tensor(name) for name in names}, dict(file.metadata())
    change(tensors, header)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, header)


def with_number(name: str, index: Any, value: float) -> Change:
    """One number of a tensor, without the hash that would show it."""

    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        tensors[name][index] = value
        header.pop("hash")

    return change


def with_card(**changes: Any) -> Change:
    """Other fields of the card, of a table or of AMED, without the hash."""

    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        where = json.loads(header["metadata"]) if "metadata" in header else header
        where["card"] = json.dumps({**json.loads(where["card"]), **changes})
        if "metadata" in header:
            header["metadata"] = json.dumps(where)
        header.pop("hash", None)

    return change


def change_solver(run: Path, change: Change) -> None:
    """Change the file of a solver's run, so that its manifest agrees with it."""
    (file,) = run.glob("checkpoints/step-*/solver.safetensors")
    rewrite(file, change)
    seal(file.parent)


def add_table(model: Path) -> Path:
    """A learned table of 3 evaluations, beside the other solvers of a model's run."""
    trained = load_model(model, torch.device("cpu"))
    run = Path(
        shutil.copytree(model / "solvers" / "amed-predictor-uniform-nfe4", model / "solvers" / "table-best-nfe3")
    )
    (file,) = run.glob("checkpoints/step-*/solver.safetensors")
    card = SolverCard("table", "best", trained.model.config.schedule, trained.hash, 3, False, 1.0, 0, "none")
    LearnedTable(trained.model.schedule, logsnr(trained.model.schedule, 3)).table(
        {"card": json.dumps(asdict(card))}
    ).save(file)
    seal(file.parent)
    return run


WRONG_TABLES: dict[str, Change] = {
    "noisy": with_number("noise", 1, 0.5),
    "nan": with_number("states", (2, 0), math.nan),
    "rising": with_number("grid", 1, 0.99999),
    "outside": with_number("time", 1, 1.5),
    "empty": lambda tensors, header: [tensors["states"][1].zero_(), tensors["predictions"][1].zero_(), header.pop("hash")],
    "narrow": lambda tensors, header: tensors.update(states=tensors["states"].float()),
    "retyped": with_card(nfe="3"),
    "unsealed": lambda tensors, header: tensors["states"].mul_(1.001),
    "vp": lambda tensors, header: [header.update(schedule="VP(beta_min=0.1, beta_max=20.0)"), header.pop("hash")],
    "of_4": with_card(nfe=4),
}  # fmt: skip
"""Ways in which the file of a learned table can be wrong."""
WRONG_AMED: dict[str, Change] = {
    "nan": with_number("raw", (0, 0), math.nan),
    "rising": with_number("grid", 1, 0.99999),
    "of_6": with_card(nfe=6),
    "of_karras": with_card(grid_name="karras"),
    "of_another_base": with_card(base="ipndm4"),
    "retyped": with_card(guidance="1"),
}
"""Ways in which that of AMED can be."""
