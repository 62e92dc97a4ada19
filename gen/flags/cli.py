"""What all commands share: recipes and flags into one resolved configuration, and errors into exit codes."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from midway.gen.core import processes, signals
from midway.gen.core.config import from_dict, read_yaml
from midway.gen.core.errors import DataError, MidwayError, UsageError, as_midway, nearest, raising
from midway.gen.core.terminal import lasting_output, plain_warnings
from midway.gen.data.sources import check_unambiguous
from midway.gen.features.open import check_feature_names
from midway.gen.flags.arguments import check_required, config_of, expanded, normalised, typed_flags
from midway.gen.flags.fields import Flag as OneFlag
from midway.gen.flags.fields import flags_of
from midway.gen.flags.help import FROM_IMAGES, page
from midway.gen.names.nearest import canonical

Task = TypeVar("Task")
Flat = tyro.conf.arg(name="")  # flags without a prefix
_BOX = re.compile("\x1b\\[[0-9;]*m|^[+╭╰].*\n|^[|│]|[|│]$", re.MULTILINE)
"""Colours and the frame, with its title, of what the parser of flags prints."""
PROGRAM = "midway"
"""What to type before the flags of the command that runs."""
NAMES = {
    **dict.fromkeys(("--data", "--data-path", "--against"), check_unambiguous),
    **dict.fromkeys(("--features", "--early.features"), check_feature_names),
}
"""Flags that take a name or a path, and their check of names that something in the current directory has too."""
RECORDED = ("kind", "data", "posthoc", "merged", "baseline", "origin")


@dataclasses.dataclass(frozen=True)
class Page:
    """What the help of a command has besides the fields of its task."""

    what: str = "RECIPE"
    """A word for the first argument."""
    more: str = ""
    """The last line."""
    hidden: Sequence[str] = ()
    """Flags that are left out, by their names in config.yaml."""
    extra: Callable[[Any], Iterable[OneFlag]] = lambda _: ()
    """Flags that are no fields of the task, for a starting point or None."""
    computed: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """By recipe: flags whose defaults follow from the images."""


def resolve(
    task: type[Task],
    recipes: Mapping[str, Callable[[], Task]],
    arguments: list[str],
    more: Page = Page(),
    unread: Callable[[Task | None], Mapping[str, str]] = lambda _: {},
) -> Task:
    """`[RECIPE | --config FILE] [flags]` -> configuration. The recipe or file gives the defaults, the flags override.

    `unread` gives the groups of flags that a starting point does not read, as `table.`, and why.
    """
    asked = {"-h", "--help"} & {*arguments}
    file, words = config_of([word for word in arguments if word not in asked])
    default, rest = _starting_point(task, recipes, file, words)
    groups = unread(default) if asked or default is not None else {}
    every = list(flags_of(task, default))
    flags = [flag for flag in every if not flag.path.startswith(tuple(groups))]
    if asked:
        shown = [*(flag for flag in flags if flag.path not in more.hidden), *more.extra(default)]
        _print_help(task, recipes, shown, words[0] if len(words) > len(rest) else None, more)
    rest = normalised(rest, every, PROGRAM)
    for flag in every:
        why = next((why for group, why in groups.items() if flag.path.startswith(group)), None)
        if why is not None and flag.name in typed_flags(rest):
            raise UsageError(f"{flag.name} has no effect here", why, "drop it")
    check_required(rest, every, PROGRAM, recipes if default is None else ())
    for flag, check in NAMES.items():
        for value in _typed(rest, flag):
            check(value)
    given: dict[str, Any] = {} if default is None else {"default": default}
    own_checks = raising(UsageError, "these flags cannot be used", "correct the value")  # the configuration's
    with own_checks, _parsing():
        return tyro.cli(task, prog=PROGRAM, args=expanded(rest, every), **given)


def _print_help(
    task: type, recipes: Mapping[str, Callable[[], Any]], flags: Iterable[OneFlag], first: str | None, more: Page
) -> NoReturn:
    """The page of a recipe, or of all; the program ends."""
    chosen = None if first is None else canonical(first, recipes)
    if chosen is None:
        text = page(PROGRAM, task.__doc__ or "", recipes, flags, what=more.what if recipes else "", more=more.more)
    else:
        own = more.computed.get(chosen, ())
        shown = [dataclasses.replace(flag, default=FROM_IMAGES) if flag.path in own else flag for flag in flags]
        text = page(PROGRAM, recipes[chosen].__doc__ or "", {}, shown, what=chosen)
    print(text, end="")
    raise SystemExit(0)


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """Within the block the exit of the parser of flags becomes a UsageError with the text of the box that it prints."""
    printed, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # else lines are broken
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as ended:
        if not ended.code:
            raise
        what, *more = _BOX.sub("", printed.getvalue()).strip().splitlines() or ["these flags cannot be parsed"]
        about = [line.strip() for line in more if line.strip(" -─") and "full helptext" not in line]
        fix = f"correct it; {PROGRAM} --help lists all flags"
        raise UsageError(what.strip(), " ".join(about) or "this command does not take it", fix) from None
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if width is None else {"COLUMNS": width}


def _typed(arguments: list[str], flag: str) -> list[str]:
    """The values that a flag has on the command line."""
    apart = [value for name, value in pairwise(arguments) if name == flag]
    return apart + [word.removeprefix(f"{flag}=") for word in arguments if word.startswith(f"{flag}=")]


def by_name(*recipes: Callable[[], Task]) -> dict[str, Callable[[], Task]]:
    """Recipes by the names of their functions: `digits_fsq` is digits-fsq."""
    return {recipe.__name__.replace("_", "-"): recipe for recipe in recipes}


def with_text(text: str, recipe: Callable[[], Task]) -> Callable[[], Task]:
    """The recipe with this text in the help."""
    recipe.__doc__ = text
    return recipe


def _starting_point(
    task: type[Task], recipes: Mapping[str, Callable[[], Task]], file: str | None, arguments: list[str]
) -> tuple[Task | None, list[str]]:
    named = arguments[0] if recipes and arguments and not arguments[0].startswith("-") else None
    if file is not None:
        if named is not None:
            raise UsageError(f"'{named}' and --config", "a training starts from one configuration", "drop one of them")
        return from_dict(task, own_fields(task, read_yaml(Path(file))), file), arguments
    if named is None:
        return None, arguments
    name = canonical(named, recipes)
    if name is None:
        raise UsageError(f"unknown recipe '{named}'", f"{PROGRAM} has none of that name", nearest(named, recipes))
    return recipes[name](), arguments[1:]


def own_fields(task: type, values: Any) -> Any:
    """A run's config.yaml without what it records besides: kinds, and the data of a latent model's tokenizer."""
    if not isinstance(values, dict):
        return values
    fields = {field.name for field in dataclasses.fields(task)}
    if "source" in values and "source" not in fields:
        raise DataError(
            "this run was imported, not trained",
            f"its config.yaml names {values['source']} as its source",
            "give a run that midway train tokenizer made; imported ones serve as --tokenizer",
        )
    return {key: value for key, value in values.items() if key in fields or key not in RECORDED}


def main(
    command: Callable[[list[str]], object],
    words: Sequence[str] | None = None,
    alone: bool = False,
    program: str | None = None,
) -> NoReturn:
    """Run a command, leave the other processes if there are any, and exit with the code of `run`.

    `words` are its flags (default: those of this process), and `program` is what to type before them.
    """
    global PROGRAM
    code, typed = 1, sys.argv[1:] if words is None else words
    PROGRAM = program or f"python {sys.argv[0]}"
    with lasting_output(), plain_warnings(), signals.handling(processes.end):
        try:
            code = run(command, [word for word in typed if word != "--debug"], "--debug" in typed, alone)
        except SystemExit as ended:  # of the parser of flags
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            raise
        finally:
            with contextlib.suppress(signals.Stopped):  # the work is done
                processes.leave_processes(code)
    sys.exit(code)


def run(command: Callable[[list[str]], object], arguments: list[str], debug: bool = False, alone: bool = False) -> int:
    """The exit code. Any error is three lines and its code (`debug`: the traceback as well), a stop signal a line and 128 + its
    number.

    `alone`: the command does not divide its work, so that of several processes each would do all of it; UsageError.
    """
    try:
        try:
            _join(alone)
            command(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # else a full disk would show at the interpreter's end
        except Exception as error:
            signals.conclude()
            return _failed(error, debug)
    except KeyboardInterrupt as stop:
        number = int(getattr(stop, "number", signal.SIGINT))
        line = signals.stop_line(number)
        if processes.is_first(line):
            print(line, file=sys.stderr)
        return 128 + number
    return 0


def _join(alone: bool) -> None:
    rank, world_size = processes.launched()
    if not alone:
        processes.watch()
    elif world_size > 1 and rank == 0:
        why = f"WORLD_SIZE is {world_size}, and each would do all of the work"
        raise UsageError(f"{PROGRAM} runs in one process", why, f"start it by itself: {PROGRAM}")
    elif world_size > 1:
        sys.exit(UsageError.exit_code)  # the first process prints the error


def _failed(error: Exception, debug: bool) -> int:
    """Print an error, unless another process has; its exit code. Stopped if it is about one that the same signal ended."""
    partner, (number, _) = processes.explain(error), signals.received()
    if partner is not None and partner.exit_code == 128 + number:
        raise signals.Stopped(number)
    failure = error if isinstance(error, MidwayError) else partner or as_midway(error, _keep_traceback)
    if debug:
        traceback.print_exc()
    if processes.is_first(str(failure)):
        print(f"error: {failure}", file=sys.stderr)
    return failure.exit_code


def _keep_traceback() -> str:
    """Where the traceback of the current exception is stored."""
    with tempfile.NamedTemporaryFile("w", prefix="midway-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return file.name


def names(text: str) -> tuple[str, ...]:
    """`a,b,c` as a tuple, without empty parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """`4,6,8` as integers; UsageError naming the flag otherwise."""
    try:
        found = tuple(int(part) for part in names(text))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{flag} cannot be '{text}'", "it is a list of positive whole numbers", f"write {flag} 4,6,8")
    return found
