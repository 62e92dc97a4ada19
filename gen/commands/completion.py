"""Completion for shells: midway completion bash > ~/.local/share/bash-completion/completions/midway

zsh: midway completion zsh > ~/.midway-completion, and `source ~/.midway-completion` in ~/.zshrc.
"""

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import tyro

from midway.gen.commands.main import COMMANDS
from midway.gen.flags.cli import resolve
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.recipes.finetune_recipes import FINETUNE_RECIPES
from midway.gen.recipes.prior_recipes import PRIOR_RECIPES
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.trainings import solver_tasks

START = """_midway() {
  local cur=${COMP_WORDS[COMP_CWORD]} before="${COMP_WORDS[*]:1:COMP_CWORD-1}" words=""
  case "$before" in
"""
END = """  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _midway midway
"""


@dataclass(frozen=True)
class CompletionTask:
    """Print a script that completes commands, recipes and flags of midway."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"
    """The shell that reads it."""


def recipes_of(name: str) -> list[str]:
    """What may follow a command as its first argument."""
    found = {
        "train tokenizer": TOKENIZER_RECIPES,
        "train latent": LATENT_RECIPES,
        "finetune": FINETUNE_RECIPES,
        "train prior": PRIOR_RECIPES,
        "train baseline": BASELINE_RECIPES,
        "train solver": solver_tasks.recipes(),
        "completion": ("bash", "zsh"),
    }
    return list(found.get(name, ()))


def flags_of_help(name: str) -> list[str]:
    """The flags that the help pages of a command list, of all its recipes together."""
    command, printed = COMMANDS[name], io.StringIO()
    run = getattr(import_module(f"midway.gen.{command.module}"), command.function)
    for first in ([], *([recipe] for recipe in recipes_of(name))):
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            run([*first, "--help"])
    listed = re.findall(r"^ +(--[a-z](?:[\w.-]*\w)?)", printed.getvalue().replace("[no-]", ""), re.MULTILINE)
    return sorted({*listed, "--help", "--debug"})


def script(shell: str) -> str:
    """The script; a command of two words is completed word by word."""
    lines = []
    for name in sorted(COMMANDS, key=len, reverse=True):
        words = " ".join([*recipes_of(name), *flags_of_help(name)])
        lines.append(f'    "{name}"|"{name} "*) words="{words}" ;;\n')
    for group in sorted({name.split()[0] for name in COMMANDS if " " in name}):
        seconds = " ".join(name.split()[1] for name in COMMANDS if name.startswith(f"{group} "))
        lines.append(f'    "{group}") words="{seconds}" ;;\n')
    first = " ".join(sorted({name.split()[0] for name in COMMANDS}))
    lines.append(f'    "") words="{first} --help --version" ;;\n')
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + START + "".join(lines) + END


def command(arguments: list[str]) -> None:
    """`midway completion [bash | zsh]`."""
    print(script(resolve(CompletionTask, {}, arguments).shell), end="")
