"""How many evaluations the diffusion head of a continuous prior needs: distance to the data per head NFE, at a fixed trunk NFE.

    python benchmarks/token_head.py --model runs/digits-mar --json benchmarks/results/token_head.json

1. Tables are learned for the head (midway train solver table), where they are missing.
2. For every solver, grid and budget, the same image seeds: Fréchet distance of n images to the training images in two feature
   spaces, mean over blocks of seeds, and the root mean square difference of their tokens from those by a fine solver of the same
   noise, which is the solver's error alone.

Rows that the file has of this model, with these seeds, are not measured again. A few minutes on one core.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.data.places import images_at, splits_of
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.load import TrainedPrior, load_prior
from midway.gen.priors.rules import head_sampler
from midway.gen.priors.sampling import CodeSamples, CodeSampling, decode_codes, sample_codes
from midway.gen.trainings import train_solver

TABLE = "table"
FINE = ("dpmpp3m", "logsnr", 200)
"""The solver that errors are measured from: name, grid and head NFE."""


@dataclass(frozen=True)
class TokenHeadStudy:
    """What to measure."""

    model: Path
    """Run directory of a continuous prior."""
    json: Path
    """File of the figures."""
    trunk_nfe: int | None = None
    """Evaluations of the trunk; None: one a token."""
    rule: str = "halton"
    solvers: tuple[str, ...] = ("euler", "dpmpp2m")
    grids: tuple[str, ...] = ("uniform", "karras")
    nfe: tuple[int, ...] = (1, 2, 3, 5, 10, 50)
    """Head NFE of the solvers."""
    table_nfe: tuple[int, ...] = (1, 2, 3, 5, 10)
    """Head NFE of learned tables."""
    table_steps: int = 600
    features: tuple[str, ...] = ("effnet-lite0", "pixels")
    n: int = 1000
    """Images of a block."""
    blocks: int = 2
    first_seed: int = 100_000


@dataclass
class Bench:
    """What rows are measured with; fine tokens by block, once there is a row to measure."""

    study: TokenHeadStudy
    trained: TrainedPrior
    references: dict[str, FeatureReference]
    fine: dict[int, Tensor]

    def samples(self, solver: str, grid: str, nfe: int, block: int) -> CodeSamples:
        """Of a block of seeds."""
        study = self.study
        first = study.first_seed + block * study.n
        how = Decoding(study.rule, study.trunk_nfe)  # pyright: ignore[reportArgumentType]
        sampling = CodeSampling(how, head=head_sampler(self.trained, solver, grid, nfe))
        return sample_codes(self.trained, torch.arange(first, first + study.n), sampling)

    def fine_tokens(self, block: int) -> Tensor:
        """(n, L, C)."""
        if block not in self.fine:
            self.fine[block] = self.samples(*FINE, block).tokens
        return self.fine[block]

    def row(self, solver: str, grid: str, nfe: int) -> dict[str, Any]:
        """One row: every block, its distances and error, and what was counted."""
        found = [self.samples(solver, grid, nfe, block) for block in range(self.study.blocks)]
        images = [decode_codes(self.trained, its.tokens) for its in found]
        errors = [its.tokens - self.fine_tokens(block) for block, its in enumerate(found)]
        return {
            "sampler": head_sampler(self.trained, solver, grid, nfe).hash,
            "head_solver": solver,
            "grid": grid,
            "head_nfe": found[0].head_nfe,
            "trunk_nfe": found[0].nfe,
            "distances": {name: [r.distance(one) for one in images] for name, r in self.references.items()},
            "rmse": statistics.mean(error.square().mean().sqrt().item() for error in errors),
            "seconds": statistics.mean(its.seconds for its in found),
        }


def cells(study: TokenHeadStudy) -> Iterator[tuple[str, str, int]]:
    """Solver, grid and head NFE of every row."""
    yield from ((TABLE, "best", nfe) for nfe in study.table_nfe)
    yield from itertools.product(study.solvers, study.grids, study.nfe)


def learn_tables(study: TokenHeadStudy) -> None:
    """Those that are missing."""
    budgets = ",".join(map(str, study.table_nfe))
    words = [TABLE, "--model", str(study.model), "--nfe", budgets, "--steps", str(study.table_steps)]
    train_solver.command([*words, "--resume", "auto"])


def identity(study: TokenHeadStudy, bench: Bench) -> dict[str, Any]:
    """What all rows of a file have in common."""
    seeds = [study.first_seed, study.first_seed + study.n * study.blocks - 1]
    return {
        "model": bench.trained.hash,
        "weights": bench.trained.weights,
        "rule": study.rule,
        "tokens": bench.trained.prior.layout.about,
        "n": study.n,
        "blocks": study.blocks,
        "seeds": seeds,
        "features": {name: reference.features for name, reference in bench.references.items()},
        "reference": {name: reference.id for name, reference in bench.references.items()},
        "fine": list(FINE),
    }


def main(study: TokenHeadStudy) -> None:
    """Learn, measure what is missing, write after every row."""
    torch.set_num_threads(1)
    if study.table_nfe:
        learn_tables(study)
    trained = load_prior(study.model)
    data = images_at(trained.run)
    train, references = splits_of(trained.run, data).train, dict[str, FeatureReference]()
    for name in study.features:
        network = named_extractor(name, data, "the prior")
        references[name] = make_reference(network, network.name, train)
    bench = Bench(study, trained, references, {})
    head = {**identity(study, bench), "environment": environment(), "hardware": hardware()}
    before = json.loads(study.json.read_text()) if study.json.exists() else {}
    same = all(before.get(name) == value for name, value in identity(study, bench).items())
    rows = before["rows"] if same else []
    done = {row["sampler"] for row in rows}
    for cell in cells(study):
        if head_sampler(trained, *cell).hash in done:
            continue
        begun = time.monotonic()
        rows.append(bench.row(*cell))
        study.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(study.json, (json.dumps({**head, "rows": rows}, indent=1) + "\n").encode())
        row = rows[-1]
        means = ", ".join(f"{name} {statistics.mean(values):.3f}" for name, values in row["distances"].items())
        took = time.monotonic() - begun
        print(f"{cell[0]} on {cell[1]}, head NFE {cell[2]}: {means}, RMSE {row['rmse']:.4f}; {took:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(TokenHeadStudy, description=__doc__))
