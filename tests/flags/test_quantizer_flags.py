"""Quantizers by flags: the same as by JSON or YAML, whatever they are made of; each argument is read, or named in an error."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from quantizer_cases import CASES

from midway.gen.core.config import to_dict, write_yaml
from midway.gen.core.errors import UsageError
from midway.gen.flags.quantizer_flags import TEXTS, help_flags, parameters
from midway.gen.trainings.train_tokenizer import read_task
from midway.tokenizers.options import plain
from midway.tokenizers.quantizers import PARTS, QUANTIZERS, make_quantizer


def words(config: Mapping[str, Any], flag: str = "--quantizer") -> Iterator[str]:
    """The flags of a quantizer's configuration."""
    yield from (flag, config["type"])
    for name, value in config.items():
        if name in PARTS:
            yield from words(value, f"{flag}.{name}")
        elif name != "type":
            given = value if isinstance(value, list | tuple) else [] if value is True else [value]
            yield from (f"{flag}.{name.replace('_', '-')}", *map(str, given))


def quantizer(text: str, *more: str) -> dict[str, Any]:
    return read_task([*text.split(), *more]).quantizer


@pytest.mark.parametrize("case", CASES)
def test_every_quantizer_can_be_typed_and_is_recorded_as_the_same(case: str, tmp_path: Path) -> None:
    config = {**({"weight": 1e-6} if case == "kl" else {}), **plain(CASES[case])}
    task = read_task(["digits-fsq", *words(config)])
    again = plain(task.quantizer_config(1))
    assert {name: again[name] for name in config if name not in PARTS} == {
        k: v for k, v in config.items() if k not in PARTS
    }
    assert str(make_quantizer(again)) == str(make_quantizer(config))
    assert task.model.quantizer == config["type"]
    write_yaml(tmp_path / "config.yaml", to_dict(task))
    assert read_task(["--config", str(tmp_path / "config.yaml")]) == task


def test_the_old_flags_and_files_mean_what_they_did() -> None:
    json = '{"base": {"type": "vq", "codebook_size": 64, "dim": 4}, "depth": 3}'
    old = read_task(["digits-vq", "--model.quantizer", "residual", "--model.options", json])
    assert old.quantizer == {} and old.quantizer_config(1) == {
        "type": "residual",
        "base": {"type": "vq", "codebook_size": 64, "dim": 4},
        "depth": 3,
    }
    new = quantizer(
        "digits-vq --quantizer residual --quantizer.base vq --quantizer.depth 3 --quantizer.codebook-size 64 --quantizer.dim 4"
    )
    assert new == old.quantizer_config(1)
    assert read_task(["digits-vq"]).quantizer == {}


ROOT = Path(__file__).resolve().parents[2]
VQ = {"type": "vq", "codebook_size": 512, "dim": 8}


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("digits-fsq --quantizer.levels 8 5", {"type": "fsq", "levels": [8, 5], "form": "tanh"}),
        ("digits-fsq --quantizer vq", VQ),
        ("digits-vq --quantizer.codebook_size=64", {**VQ, "codebook_size": 64}),
        ("digits-vq --quantizer.normalize --steps 3", {**VQ, "normalize": True}),
        ("digits-vq --quantizer.no-normalize", {**VQ, "normalize": False}),
        ("digits-vq --quantizer.normalize false", {**VQ, "normalize": False}),
        (
            "digits-fsq --model.quantizer residual --quantizer.base vq --quantizer.depth 3",
            {"type": "residual", "base": VQ, "depth": 3},
        ),
        (
            "digits-fsq --quantizer grouped --quantizer.base residual --quantizer.base.base VQ --quantizer.depth 2"
            " --quantizer.groups 2 --quantizer.decay .5",
            {"type": "grouped", "groups": 2, "base": {"type": "residual", "depth": 2, "base": {**VQ, "decay": 0.5}}},
        ),
        (
            "digits-fsq --quantizer lookup-free --quantizer.entropy-group None",
            {"type": "lfq", "bits": 8, "entropy_group": None},
        ),
        ("digits-fsq --quantizer kl", {"type": "kl", "dim": 8, "weight": 1e-4}),
        ("digits-fsq --quantizer identity", {"type": "identity"}),
    ],
)
def test_flags_replace_what_they_name(typed: str, found: dict[str, Any]) -> None:
    assert quantizer(typed) == found


def test_identity_has_the_channels_of_the_images_where_it_passes_pixels() -> None:
    assert read_task(["digits-pixels", "--quantizer", "identity"]).quantizer_config(3) == {"type": "identity", "dim": 3}
    assert read_task(["digits-fsq", "--quantizer", "identity"]).quantizer_config(3)["dim"] == 8


def test_a_file_may_be_short(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("out: runs/a\nquantizer: {type: residual, base: vq, depth: 3, codebook-size: 64}\n")
    expected = {"type": "residual", "depth": 3, "base": {**VQ, "codebook_size": 64}}
    assert quantizer(f"--config {file}") == expected
    assert quantizer(f"--quantizer.depth 4 --config {file}") == {**expected, "depth": 4}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--quantizer.codebook-size 3",
            "has no effect here|fsq does not read it; read by vq, vq_gradient, simvq|--quantizer vq",
        ),
        ("--quantizer.depht 3", "unknown flag --quantizer.depht|did you mean '--quantizer.depth'?"),
        ("--quantizer rvq", "unknown quantizer 'rvq'|did you mean 'residual'?"),
        ("--quantizer residual --quantizer.depth 3", "residual needs --quantizer.base|add --quantizer.base vq"),
        ("--quantizer residual --quantizer.base vq", "residual needs --quantizer.depth|add --quantizer.depth 4"),
        ("--quantizer.levels a", "--quantizer.levels cannot be 'a'"),
        ("--quantizer.form ifsk", "cannot be 'ifsk'|did you mean 'ifsq'?"),
        ("--quantizer.symmetric maybe", "cannot be 'maybe'|true or false"),
        ("--quantizer vq --quantizer.dim 2.5", "--quantizer.dim cannot be '2.5'|a whole number"),
        ("--quantizer.levels 8 --model.levels 8 8", "--model.levels and --quantizer flags|write --quantizer.levels"),
        (
            "--quantizer two_level --quantizer.top vq --quantizer.bottom vq --quantizer.dim 3",
            "ambiguous|--quantizer.top.dim and",
        ),
    ],
)
def test_what_is_not_read_is_an_error_that_names_who_reads_it(typed: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantizer("digits-fsq " + typed)
    assert [word for word in said.split("|") if word not in str(caught.value)] == []


def test_the_help_has_every_argument_of_every_quantizer() -> None:
    assert {*TEXTS} == {"type"} | {name for kind in QUANTIZERS for name in parameters(kind)}
    shown = {flag.path: flag for flag in help_flags(read_task(["digits-vq"]))}
    assert shown["quantizer.codebook_size"].default == 512 and shown["quantizer.type"].default == "vq"
    assert "Read by fsq." in shown["quantizer.levels"].text


def test_documented_commands_can_be_parsed() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in page.read_text().replace("\\\n", " ").splitlines()]
    calls = [line.split("midway train tokenizer ")[1] for line in lines if line.startswith("midway train tokenizer ")]
    for call in calls:
        read_task(shlex.split(call.split(" && ")[0].split(" #")[0]))
    assert sum("--quantizer" in call for call in calls) >= 3
