"""The command `midway`: which module runs `midway train tokenizer`, and the overview that `midway --help` prints.

It imports torch only with the command that is run.
"""

import os
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import NoReturn

from midway.gen.core.errors import UsageError, nearest


@dataclass(frozen=True)
class Command:
    """A module of gen/ with a `function(arguments)`, and a line about it; `alone`: it does all of its work in one process."""

    module: str
    about: str
    alone: bool = False
    function: str = "command"


TRAININGS = {
    "train tokenizer": Command("trainings.train_tokenizer", "an image tokenizer: FSQ, VQ, LFQ, residual, KL, ..."),
    "train latent": Command("trainings.train_latent", "a latent diffusion or flow model on a tokenizer"),
    "finetune": Command("trainings.finetune", "a latent model on other images, by adapters (LoRA) or as a whole"),
    "train prior": Command("trainings.train_prior", "a causal or masked prior over a tokenizer's codes"),
    "train solver": Command("trainings.train_solver", "a solver for one model: AMED, a learned table, ..."),
    "train baseline": Command("trainings.train_baseline", "a VAE, NICE, RealNVP, Glow or TarFlow"),
    "train features": Command("trainings.train_features", "a feature network on your own labelled images"),
    "encode": Command("commands.encode", "store latents or codes of a tokenizer, by several processes"),
}
MEASURES = {
    "sample": Command("commands.sample", "images of a model, to a grid, a folder, a zip or an npz"),
    "evaluate": Command(
        "commands.evaluate", "Fréchet distance of every solver at every step budget: table, plots, report"
    ),
    "evaluate-tokenizer": Command(
        "commands.evaluate_tokenizer", "tokenizers side by side: PSNR, distance, codes", True
    ),
    "evaluate-likelihood": Command("commands.evaluate_likelihood", "models side by side in bits per dimension", True),
    "check-metric": Command("commands.check_metric", "whether a feature network answers to known damage", True),
    "prove": Command("commands.prove_solvers", "all solvers on an exact model", True),
    "demo": Command("commands.demo", "everything in minutes, on real digits"),
}
TOOLS = {
    "data check": Command("commands.data", "look at images before training on them", True, "check_command"),
    "data build": Command("commands.data", "a set larger than memory, in few large files", True, "build_command"),
    "import-tokenizer": Command("commands.import_tokenizer", "an autoencoder of diffusers", True),
    "import-model": Command("trainings.import_model", "weights of DiT, SiT, LightningDiT, diffusers", True),
    "merge-adapter": Command("trainings.merge_adapter", "a latent model with an adapter added to its weights", True),
    "posthoc-ema": Command("commands.posthoc_ema", "averages of other lengths, after training", True),
    "verify-resume": Command("commands.verify_resume", "check that resuming a run is exact"),
    "completion": Command("commands.completion", "a script that completes commands and flags in a shell", True),
    "download-weights": Command("commands.download_weights", "weights of feature networks, for machines offline", True),
}
SECTIONS = {"Train": TRAININGS, "Sample and measure": MEASURES, "Data and tools": TOOLS}
COMMANDS = TRAININGS | MEASURES | TOOLS


def main() -> NoReturn:
    """The command line of `midway`; exits with the code of the command."""
    started(sys.argv[1:])


def started(words: list[str], program: str = "midway") -> NoReturn:
    """Run the command that `words` begin with; `program` is what to type before it."""
    found = named(words)
    if found is None:
        _exit_without_command(words, program)
    name, arguments = found
    command = COMMANDS[name]
    try:
        run, module = import_module("midway.gen.flags.cli").main, import_module(f"midway.gen.{command.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("midway"):
            raise
        _exit(incomplete(error.name or "a package"))
    shown = f"midway {name}" if program == "midway" else program
    raise SystemExit(run(getattr(module, command.function), arguments, command.alone, shown))  # `run` exits by itself


def named(words: list[str]) -> tuple[str, list[str]] | None:
    """The command that the first one or two words name, also joined by a hyphen or with underscores, and what follows."""
    whole = {name.replace(" ", "-"): name for name in COMMANDS}
    for count in (2, 1):
        text = "-".join(words[:count]).replace("_", "-").lower()
        if text in whole:
            return whole[text], words[count:]
    return None


def incomplete(package: str) -> UsageError:
    """Midway's own packages are not all there."""
    fix = "pip install midway (in a checkout: make dev, then .venv/bin/midway), or use the environment that has it"
    return UsageError("Midway is not completely installed", f"{sys.executable} has no package '{package}'", fix)


def overview() -> str:
    """What `midway --help` prints."""
    lines = [
        "usage: midway COMMAND [flags]",
        "",
        "Which tokenizer, which model, which ODE solver, at how many evaluations?",
    ]
    for title, commands in SECTIONS.items():
        lines += ["", f"{title}:", *(f"  {name:<20} {command.about}" for name, command in commands.items())]
    lines += ["", "midway COMMAND --help lists the flags of a command; midway --version prints the version."]
    return "\n".join(lines)


def _exit_without_command(words: list[str], program: str) -> NoReturn:
    first, *rest = words or ["--help"]
    group = {name: command for name, command in COMMANDS.items() if name.split()[0] == first}
    if first in ("-V", "--version"):
        _print(metadata.version("midway"))
    elif first in ("-h", "--help", "help"):
        _print(overview())
    elif group and (not rest or rest[0] in ("-h", "--help")):
        lines = (f"  {name:<20} {command.about}" for name, command in group.items())
        _print("\n".join((f"usage: midway {first} COMMAND [flags]", "", *lines, "", "Each has its own --help.")))
    else:
        typed = " ".join(words[: 2 if group else 1])
        why = f"{program} has no such command"
        _exit(UsageError(f"unknown command '{typed}'", why, nearest(typed, group or COMMANDS)))
    sys.exit(0)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(error: UsageError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
