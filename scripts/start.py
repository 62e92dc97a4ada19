"""Run a command of Midway from a checkout, or name what is missing."""

import sys
from typing import NoReturn


def start(*words: str) -> NoReturn:
    """`midway *words` with the arguments of this script."""
    try:
        from midway.gen.commands.main import started
    except ModuleNotFoundError:
        print(
            "error: Midway is not installed here",
            f"  why: {sys.executable} has no package 'midway'",
            f"  fix: make dev, then .venv/bin/python {sys.argv[0]}; or pip install .",
            sep="\n",
            file=sys.stderr,
        )
        sys.exit(2)
    started([*words, *sys.argv[1:]], f"python {sys.argv[0]}")
