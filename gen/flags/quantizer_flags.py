"""The flags --quantizer.*: any quantizer with any of its arguments, those that are made of others included.

    --quantizer vq --quantizer.codebook-size 64
    --quantizer residual --quantizer.base vq --quantizer.depth 3 --quantizer.codebook-size 64
    --quantizer two_level --quantizer.top vq --quantizer.bottom fsq --quantizer.bottom.levels 8 5

An argument that the outer quantizer does not read goes to the one inside that does. In config.yaml it is the mapping `quantizer`.
"""

import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from midway.gen.core.errors import UsageError, nearest, raising
from midway.gen.flags.fields import Flag
from midway.gen.flags.tasks import QUANTIZER_FIELDS, TokenizerConfig, TokenizerTask
from midway.gen.flags.vocabulary import kinds_of
from midway.gen.flags.vocabulary import settled as settled_word
from midway.gen.names.nearest import canonical
from midway.tokenizers.arguments import check_arguments
from midway.tokenizers.quantizers import PARTS, QUANTIZERS

TEXTS = {
    "type": "Kind of quantizer; --quantizer NAME for short.",
    "levels": "Levels per channel; their product is the number of codes.",
    "form": "The bounding function.",
    "symmetric": "Levels around 0, also for even counts.",
    "noise_dropout": "Share of the images that are trained with noise in place of rounding.",
    "codebook_size": "Number of codes.",
    "dim": "Channels of a code, or of the latents.",
    "commitment": "Weight of the pull of the latents to their codes.",
    "decay": "Decay of the means that codes are.",
    "eps": "Smoothing of the counts of codes.",
    "init": "Start of the codebook from the first batch: k-means, or vectors of it.",
    "restart_threshold": "Codes that are used less often than this in a batch, by their mean, start again from its vectors.",
    "restart_after": "Steps without use after which a code starts again from a vector of the batch (0: never).",
    "seed": "Of the start of the codebook.",
    "normalize": "Codes and latents of length 1.",
    "gradient": "How gradients pass the quantizer: as they are, or turned and scaled as the latent was.",
    "entropy_weight": "Weight of the entropy loss: each latent sure of its code, all codes in use.",
    "entropy_temperature": "Temperature of the soft assignment in that loss.",
    "bits": "Channels, each of one bit; 2^bits codes.",
    "diversity_gamma": "Weight of the entropy of all codes in that loss.",
    "inverse_temperature": "Inverse temperature of that loss.",
    "entropy_group": "Bits whose entropy is computed together (default: all, or what memory allows).",
    "base": "The quantizer of every stage or group.",
    "depth": "Stages, each of what the one before left.",
    "dropout": "Share of the images that are trained with fewer stages.",
    "groups": "Groups of channels, each with a quantizer of its own.",
    "top": "The quantizer of the coarse level.",
    "bottom": "The quantizer of the fine level.",
    "weight": "Weight of the KL term.",
}
"""Arguments of quantizers, in the order of the help."""
OLD = tuple(f"model.{name}" for name in QUANTIZER_FIELDS)
"""Flags in whose place these are; they still work."""
FLAG = "--quantizer"


def parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of a quantizer, by name."""
    return inspect.signature(QUANTIZERS[kind]).parameters


def hints(kind: str) -> dict[str, Any]:
    """Their types."""
    made = QUANTIZERS[kind]
    return typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)


def help_flags(task: TokenizerTask | None) -> Iterator[Flag]:
    """For the help: every argument with the quantizers that read it, and its value in `task`."""
    now = {} if task is None else starting(task)
    for name, text in TEXTS.items():
        readers = [kind for kind in QUANTIZERS if name in parameters(kind)]
        hint = hints(readers[0])[name] if readers else typing.Literal[tuple(QUANTIZERS)]
        hint = typing.Literal[tuple(QUANTIZERS)] if name in PARTS else _as_flag(hint)
        value = tuple(now[name]) if isinstance(now.get(name), list) else now.get(name)
        value = value.get("type") if isinstance(value, dict) else value
        read = f" Read by {', '.join(readers)}." if readers else ""
        yield Flag(f"quantizer.{name}", f"{FLAG}.{name.replace('_', '-')}", hint, value, text + read)


def _as_flag(hint: Any) -> Any:
    return tuple[int, ...] if typing.get_origin(hint) is Sequence else hint


def starting(task: TokenizerTask) -> dict[str, Any]:
    """The quantizer that a task has before any of these flags; the channels of identity are those of the latents."""
    config = task.quantizer_config(1)
    own = config["type"] == "identity" and "dim" not in task.quantizer
    return {key: value for key, value in config.items() if key != "dim" or not own}


def taken(arguments: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of --quantizer flags as a tree of words, and the other arguments.

    `--model.quantizer NAME` beside such flags is the same as --quantizer NAME.
    """
    tree, rest, values = dict[str, Any](), list[str](), None
    words = list(arguments)
    with_old = any(word.startswith((FLAG + ".", FLAG + "=")) or word == FLAG for word in words)
    for word in words:
        name, has_value, value = word.partition("=")
        name = FLAG if with_old and name == "--model.quantizer" else name
        if name == FLAG or name.startswith(FLAG + "."):
            values = [value] if has_value else []
            _put(tree, name.removeprefix(FLAG).replace("-", "_").split(".")[1:] or ["type"], values)
        elif values is not None and not (word.startswith("--") and word[2:3].isalpha()):
            values.append(word)
        else:
            values = None
            rest.append(word)
    return tree, rest


def _put(tree: dict[str, Any], path: list[str], values: list[str]) -> None:
    for part in path[:-1]:
        inner = tree.get(part, {})
        inner = inner if isinstance(inner, dict) else {"type": inner}
        tree[part] = inner
        tree = inner
    last = path[-1].removeprefix("no_")
    values += ["false"] if last != path[-1] else []
    if isinstance(tree.get(last), dict):
        tree[last]["type"] = values
    else:
        tree[last] = values


def with_quantizer(task: TokenizerTask, tree: Mapping[str, Any], typed: Iterable[str]) -> TokenizerTask:
    """`task` with the quantizer that these flags, or the file of its configuration, describe; UsageError for what does not fit.

    `typed` are the other flags of the call.
    """
    if not tree and not task.quantizer:
        return task
    old = {f"--{path.replace('_', '-')}" for path in OLD} & {*typed}
    if old:
        flag = min(old)
        raise UsageError(f"{flag} and {FLAG} flags", "both describe the quantizer", f"write {FLAG}{flag[7:]}")
    config = settled(merged(starting(task), tree))
    plain = {name: getattr(TokenizerConfig(), name) for name in QUANTIZER_FIELDS}
    return replace(task, quantizer=config, model=replace(task.model, **{**plain, "quantizer": config["type"]}))


def merged(start: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`start` with the arguments of `new`; of another kind, those of `new` alone."""
    kind = _kind(new.get("type", start["type"]))
    result: dict[str, Any] = dict(start) if kind == _kind(start["type"]) else {}
    for key, value in new.items():
        there, inner = result.get(key), value if isinstance(value, Mapping) else {"type": value}
        result[key] = merged(there, inner) if key in PARTS and isinstance(there, Mapping) else value
    return {**result, "type": kind}


def _kind(value: Any) -> str:
    """The name of a quantizer, also of the words of a flag; UsageError for none."""
    word = (value[0] if len(value) == 1 else " ".join(value)) if isinstance(value, list) else str(value)
    found = canonical(word, QUANTIZERS)
    if found is None:
        raise UsageError(f"unknown quantizer '{word}'", "it is not in the registry", nearest(word, QUANTIZERS))
    return found


def settled(config: Mapping[str, Any], flag: str = FLAG) -> dict[str, Any]:
    """A complete configuration: names in full, values of their types, each argument at the quantizer that reads it."""
    kind = _kind(config["type"])
    known, inside = hints(kind), [part for part in PARTS if part in parameters(kind)]
    parts = {part: _part(config, part, kind, flag) for part in inside}
    own: dict[str, Any] = {}
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name in known and name not in PARTS:
            own[name] = _typed(value, known[name], f"{flag}.{name.replace('_', '-')}")
        elif name != "type" and name not in inside:
            parts[_reader(name, kind, parts, flag)][name] = value
    with raising(UsageError, f"{flag} flags of {kind} cannot be used", "correct the value"):
        check_arguments(QUANTIZERS[kind], own, f"quantizer {kind!r}")
    own = _defaults(kind) | own
    missing = [name for name, p in parameters(kind).items() if p.default is p.empty and name not in {*own, *parts}]
    if missing and kind != "identity":
        name = f"{flag}.{missing[0].replace('_', '-')}"
        raise UsageError(f"{kind} needs {name}", TEXTS[missing[0]], f"add {name} 4, say")
    return {"type": kind, **own, **{part: settled(inner, f"{flag}.{part}") for part, inner in parts.items()}}


def _part(config: Mapping[str, Any], part: str, kind: str, flag: str) -> dict[str, Any]:
    if part not in config:
        raise UsageError(f"{kind} needs {flag}.{part}", TEXTS[part], f"add {flag}.{part} vq, say")
    inner = config[part]
    return dict(inner) if isinstance(inner, Mapping) else {"type": inner}


def _reader(name: str, kind: str, parts: Mapping[str, Mapping[str, Any]], flag: str) -> str:
    """The part that reads an argument which `kind` does not; UsageError where none does, or more than one."""
    found = [part for part, inner in parts.items() if _reads(inner, name)]
    if len(found) == 1:
        return found[0]
    own = name.replace("_", "-")
    if found:
        raise UsageError(
            f"{flag}.{own} is ambiguous",
            f"{' and '.join(found)} of {kind} read it",
            f"write {' and '.join(f'{flag}.{part}.{own}' for part in found)}",
        )
    readers = [other for other in QUANTIZERS if name in parameters(other)]
    if not readers:
        known = [f"{flag}.{other.replace('_', '-')}" for other in TEXTS]
        raise UsageError(f"unknown flag {flag}.{own}", "no quantizer reads it", nearest(f"{flag}.{own}", known))
    why = f"{kind} does not read it; read by {', '.join(readers)}"
    raise UsageError(f"{flag}.{own} has no effect here", why, f"drop it, or choose {flag} {readers[0]}")


def _reads(config: Mapping[str, Any], name: str) -> bool:
    own = parameters(_kind(config["type"])) if "type" in config else {}
    inner = (config[part] for part in PARTS if part in own and part in config)
    nested = (part if isinstance(part, Mapping) else {"type": part} for part in inner)
    return name in own or any(_reads(part, name) for part in nested)


def _defaults(kind: str) -> dict[str, Any]:
    """What TokenizerConfig has for the arguments of this quantizer."""
    config = replace(TokenizerConfig(), quantizer=kind).quantizer_config(1)  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in config.items() if name in parameters(kind) and kind != "identity"}


def _typed(value: Any, hint: Any, flag: str) -> Any:
    """The words of a flag as a value of this type; what a file has stays as it is."""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return value
    kind = kinds_of(hint)[0]
    try:
        if kind is bool:
            return {"": True, "true": True, "false": False}[" ".join(value).lower()]
        if typing.get_origin(kind) is Sequence:
            return [int(word) for word in value]
        (word,) = value
        if typing.get_origin(kind) is typing.Literal:
            return settled_word(Flag("", flag, kind, None, ""), word)
        return None if word == "None" and kind is not hint else kind(word)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else "a whole number" if kind is int else "a number, or several"
        raise UsageError(f"{flag} cannot be '{' '.join(value)}'", f"it is {wanted}", "correct the value") from None
