"""What is typed, in the form that the parser of flags takes: one spelling of every flag and name, the file of --config apart.

A flag is understood by its own name, by the name that it has in config.yaml (`--train.steps`), and with underscores for hyphens.
"""

import typing
from collections.abc import Iterable, Iterator

from midway.gen.core.errors import UsageError, nearest
from midway.gen.flags.fields import UNSET, Flag
from midway.gen.flags.vocabulary import kinds_of, settled

EXAMPLES = {
    "out": "--out runs/mine",
    "data.data": "--data path/to/images",
    "tokenizer": "--tokenizer runs/digits-fsq",
    "tokenizers": "--tokenizers runs/digits-fsq runs/digits-vq",
    "model": "--model runs/digits-dit",
    "data": "path/to/images",
    "run": "runs/digits-dit",
    "network": "inception",
}
"""What could be typed for a flag that is needed."""


def config_of(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file after --config, wherever it stands, and the other arguments; UsageError for none, and for two."""
    found, rest, words = list[str](), list[str](), iter(arguments)
    for word in words:
        if word == "--config":
            found.append(next(words, ""))
        elif word.startswith("--config="):
            found.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if "" in found or any(word.startswith("--") for word in found):
        raise UsageError("--config needs a file", "none was given", "pass the config.yaml of a run")
    if len(found) > 1:
        raise UsageError("--config is given twice", "a training has one configuration", "pass one of the files")
    return (found[0] if found else None), rest


def spellings(flags: Iterable[Flag]) -> dict[str, tuple[str, Flag]]:
    """Every way to type each flag -> (the way that the parser takes, the flag). Own names come before those of config.yaml."""
    own, full = dict[str, tuple[str, Flag]](), dict[str, tuple[str, Flag]]()
    for flag in (flag for flag in flags if not flag.positional):
        own |= dict.fromkeys((flag.name, *flag.aliases), (flag.name, flag))
        full["--" + flag.path.replace("_", "-")] = (flag.name, flag)
        if flag.negative is not None:
            own[flag.negative] = (flag.negative, flag)
            full["--" + _negative(flag.path)] = (flag.negative, flag)
    return full | own


def _negative(path: str) -> str:
    *groups, last = path.replace("_", "-").split(".")
    return ".".join((*groups, f"no-{last}"))


def normalised(arguments: list[str], flags: Iterable[Flag], program: str) -> list[str]:
    """The arguments with every flag as the parser names it, and every name as this program has it.

    UsageError for an unknown flag, with the flags nearest to it, and for a word that is none of a choice.
    """
    known = spellings(flags)
    positional = next((flag for flag in flags if flag.positional), None)
    result, current = list[str](), positional
    for word in arguments:
        if not _is_flag(word):
            result.append(word if current is None else settled(current, word))
            current = current if current is not None and _takes_many(current) else positional
            continue
        name, has_value, value = word.partition("=")
        name, current = _found(name, known, program)
        result.append(f"{name}={settled(current, value)}" if has_value else name)
        current = positional if has_value or current.hint is bool else current
    return result


def _takes_many(flag: Flag) -> bool:
    """Whether several values may follow the flag."""
    return any(typing.get_origin(kind) is tuple for kind in kinds_of(flag.hint))


def _is_flag(word: str) -> bool:
    return word.startswith("--") and word[2:3].isalpha()


def _found(name: str, known: dict[str, tuple[str, Flag]], program: str) -> tuple[str, Flag]:
    typed = "--" + name[2:].replace("_", "-")
    if typed in known:
        return known[typed]
    own = {flag.name for _, flag in known.values()}
    choices = known if "." in typed and typed.split(".")[0] not in {name.split(".")[0] for name in own} else own
    raise UsageError(f"unknown flag {name}", f"{program} has no such flag", nearest(typed, choices))


def check_required(arguments: list[str], flags: Iterable[Flag], program: str, recipes: Iterable[str]) -> None:
    """UsageError naming the flags that have no default and are not among normalised arguments."""
    given, needed = {*typed_flags(arguments)}, [flag for flag in flags if flag.default is UNSET]
    some = any(not _is_flag(word) for word in arguments)
    missing = [flag for flag in needed if not (some if flag.positional else given & {flag.name, *flag.aliases})]
    if missing:
        recipe = next(iter(recipes), None)
        ways = " ".join(EXAMPLES.get(flag.path, f"{flag.name} ...") for flag in missing)
        more = f"; or begin with a recipe, {program} {recipe}" if recipe else ""
        names = " and ".join(flag.name.upper() if flag.positional else flag.name for flag in missing)
        raise UsageError(f"{program} needs {names}", missing[0].text, f"add {ways}{more}")


def expanded(arguments: list[str], flags: Iterable[Flag]) -> list[str]:
    """Normalised arguments with flags that stand for others replaced by those, but for what is typed besides.

    UsageError for one without a value.
    """
    by_path = {flag.path: flag for flag in flags}
    short = {flag.name: flag for flag in by_path.values() if flag.stands_for is not None}
    given, rest, words = dict[str, str](), list[str](), iter(arguments)
    for word in words:
        name, has_value, value = word.partition("=")
        if name in short:
            given[name] = value if has_value else next(words, "")
        else:
            rest.append(word)
    typed = {*typed_flags(rest)}
    for name, value in given.items():
        flag, values = short[name], short[name].stands_for or {}
        if value not in values:
            raise UsageError(f"{name} needs a value", flag.text, f"add one of {', '.join(values)}")
        for key, each in values[value].items():
            field = by_path[f"{flag.path.rpartition('.')[0]}.{key}"]
            rest = rest if typed & {field.name, field.negative} else [*_words(field, each), *rest]
    return rest


def _words(flag: Flag, value: object) -> list[str]:
    """What to type for a value of a flag."""
    if flag.negative is None:
        return [flag.name, str(value)]
    return [flag.name if value else flag.negative]


def typed_flags(arguments: list[str]) -> Iterator[str]:
    """The flags of normalised arguments, without their values."""
    return (word.partition("=")[0] for word in arguments if _is_flag(word))
