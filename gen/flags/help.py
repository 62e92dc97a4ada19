"""The page that --help prints: how the command is called, recipes, and flags in sections, those of most use first.

Text without colours, at most `WIDEST` columns wide.
"""

import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from midway.gen.flags.fields import UNSET, Flag
from midway.gen.flags.vocabulary import kinds_of, words_of

WIDEST = 110
TEXT = 30
"""Column where the text of a flag begins."""
SHORT = 26
"""Letters of a choice that is shown in the place of a value."""
FROM_IMAGES = "from the images"
"""In place of the default of a flag that a recipe computes."""


def page(
    program: str,
    about: str,
    recipes: Mapping[str, Callable[[], Any]],
    flags: Iterable[Flag],
    *,
    what: str = "",
    more: str = "",
) -> str:
    """The whole page. `what` is the first argument: the word for those of `recipes`, or one of them.

    Recipes without a docstring are not listed. `more` is a last line.
    """
    width = min(max(shutil.get_terminal_size((80, 24)).columns, 60), WIDEST)
    shown = list(flags)
    blocks = [_usage(program, shown, what), *_prose(about, width)]
    if recipes:
        listed = {name: make for name, make in recipes.items() if make.__doc__}
        entries = (_entry(name, summary(make), width) for name, make in listed.items())
        blocks.append("\n".join([f"{what.capitalize()}s:", *entries]))
    blocks += _sections(shown, width)
    return "\n\n".join([*blocks, *_prose(more, width)]) + "\n"


def summary(make: Callable[[], Any]) -> str:
    """The first paragraph of a function's docstring, in one line."""
    return " ".join((make.__doc__ or "").strip().split("\n\n")[0].split())


def _usage(program: str, flags: list[Flag], what: str) -> str:
    words = [what, *(flag.name.upper() for flag in flags if flag.positional), "[flags]", "[--debug]"]
    ways = [" ".join(word for word in (program, *words) if word)]
    ways += [f"{program} --config FILE [flags]"] if what else []
    return "\n".join(("usage: " if i == 0 else "       ") + way for i, way in enumerate(ways))


def _prose(text: str, width: int) -> list[str]:
    """Paragraphs, each broken by itself."""
    return [textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False) for part in text.split("\n\n") if part]


def _entry(name: str, text: str, width: int) -> str:
    """A name, and a text that begins at the column `TEXT`, in the next line where the name is too long."""
    body = textwrap.wrap(text, width - TEXT, break_on_hyphens=False)
    head = f"  {name}"
    if len(head) + 2 > TEXT:
        return "\n".join([head, *(" " * TEXT + line for line in body)])
    first, *rest = body or [""]
    return "\n".join([f"{head:<{TEXT}}{first}".rstrip(), *(" " * TEXT + line for line in rest)])


def _sections(flags: list[Flag], width: int) -> list[str]:
    sections: dict[str, list[str]] = {}
    for flag in sorted(flags, key=lambda flag: section_of(flag)[0]):
        sections.setdefault(section_of(flag)[1], []).append(_entry(written(flag), described(flag), width))
    general = (
        ("--config FILE", "Take the flags of a run, its config.yaml; those that are typed besides replace them."),
        ("--debug", "Print the traceback of an error, too."),
        ("-h, --help", "Print this page."),
    )
    sections["General"] = [_entry(name, text, width) for name, text in general]
    return ["\n".join([f"{title}:", *entries]) for title, entries in sections.items()]


def written(flag: Flag) -> str:
    """The flag with a word for its value: `--steps N`; a switch that is on with both of its spellings."""
    if flag.positional:
        return flag.name.upper()
    if flag.hint is bool and flag.default is True:
        *groups, own = flag.name.removeprefix("--").split(".")
        return "--" + ".".join((*groups, f"[no-]{own}"))
    value = "" if flag.hint is bool else _value(flag.hint)
    return ", ".join((f"{flag.name} {value}".rstrip(), *flag.aliases))


def _value(hint: Any) -> str:
    words = words_of(hint)
    if words and len("|".join(words)) <= SHORT:
        numbers = ["N"] if any(kind in (int, float) for kind in kinds_of(hint)) else []
        return "|".join((*words, *numbers))
    kind = kinds_of(hint)[0]
    if typing.get_origin(kind) is tuple:
        inner, *others = typing.get_args(kind)
        return f"{_value(inner)} ..." if others == [Ellipsis] else " ".join(_value(part) for part in (inner, *others))
    if words:
        return "NAME"
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind, "VALUE")


def described(flag: Flag) -> str:
    """The text of a flag with its choices, where they are not in front of it, and its default."""
    words = words_of(flag.hint)
    notes = [f"one of {', '.join(words)}"] if words and len("|".join(words)) > SHORT else []
    notes += _default(flag)
    return f"{flag.text} ({'; '.join(notes)})" if notes else flag.text


def _default(flag: Flag) -> list[str]:
    value = flag.default
    if value is UNSET:
        return ["required"]
    if value == FROM_IMAGES:
        return [f"default: {FROM_IMAGES}"]
    if value is None or value is False or value in ((), ""):
        return []
    if isinstance(value, tuple):
        return [f"default: {' '.join(map(str, value))}"]
    return ["default: on" if value is True else f"default: {value}"]


# ---- under which title a flag is, and in which order ----

COMMON = (
    "model out tokenizer tokenizers source run data.data data solver solvers nfe grid grids n labels images diffusers guidance"
    " features train.steps train.batch_size train.lr train.max_seconds resume overwrite train.seed seed"
)
NAMED = {
    "Sampling": "guidance_interval guide analytic_first eta init strength invert parallel tolerance window rtol atol"
    " choice_seeds exact_nfe skip_unreachable",
    "Priors over codes": "priors prior_rules prior_nfe prior_decay temperature top_k top_p guidance_ramp choice_noise",
    "Measuring": "feature_weights metrics reference save_reference protocol root blocks repeats few_step few_step_nfe"
    " baselines",
    "External images": "images_resize images_channels export_npz save_images",
    "Tiles": "tile tile_margin",
    "Optimizer": "train.optimizer train.warmup train.decay train.plateau train.weight_decay train.betas train.clip"
    " train.accumulation train.ema train.posthoc train.posthoc_every train.patience",
    "Saving and stopping": "train.max_steps train.save_every train.save_seconds train.keep train.validate_every"
    " train.patience_validations license",
    "Logging": "train.log_every train.preview_every train.preview_seconds train.log_with train.measure_every",
    "Speed and precision": "train.precision train.gradient_checkpointing train.compile train.deterministic train.workers"
    " precision graph batch_size overlap",
}
"""Flags by their names in config.yaml; those that begin with a word of `GROUPS` need no entry."""
GROUPS = {
    "data.": "Data",
    "quantizer.": "Quantizer",
    "model.dit.": "Transformer",
    "model.unet.": "U-Net",
    "model.": "Model",
    "loss.": "Losses",
    "reflow.": "Pairs of another model",
    "early.": "Online evaluation",
    "distill.": "AMED",
    "table.": "Learned table",
    "residual.": "Residual of a table",
    "noise.": "Solver with noise",
    "ode.": "Likelihood of latent models",
    "train.": "Optimizer",
}
ORDER = (
    "Common flags",
    "Sampling",
    "Priors over codes",
    "Measuring",
    "More flags",
    "Data",
    "External images",
    "Tiles",
    "Model",
    "Transformer",
    "U-Net",
)
ORDER += ("Quantizer", "Losses", "Optimizer", "Saving and stopping", "Logging", "Speed and precision")
"""Other titles follow in the order of their flags."""


def section_of(flag: Flag) -> tuple[tuple[int, int], str]:
    """Its place among the flags of a page, and the title above it."""
    if flag.positional:
        return (0, -1), "Arguments"
    common = COMMON.split()
    if flag.path in common:
        return (0, common.index(flag.path)), "Common flags"
    title = next((title for title, names in NAMED.items() if flag.path in names.split()), None)
    title = title or next((title for start, title in GROUPS.items() if flag.path.startswith(start)), "More flags")
    return (ORDER.index(title) if title in ORDER else len(ORDER), 0), title
