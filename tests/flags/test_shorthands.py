"""Flags that stand for several others, which the record has in their place and which override them."""

from pathlib import Path
from typing import Any

import pytest

from midway.gen.core.config import from_dict, to_dict
from midway.gen.core.errors import UsageError
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import LatentTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import PRESETS, SIZES
from midway.gen.recipes.recipes import LATENT_RECIPES

MODERN: dict[str, Any] = {**PRESETS["modern"]}
TINY: dict[str, Any] = {"width": 96, "depth": 4, "heads": 4, "patch": 1}


def dit(words: str) -> DiTConfig:
    return resolve(LatentTask, LATENT_RECIPES, words.split()).model.dit


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("digits-flow --model.dit.preset modern", TINY | MODERN),
        ("digits-flow --model.dit.preset=Modern --steps 3", TINY | MODERN),
        ("digits-modern --model.dit.preset dit2023", TINY | PRESETS["dit2023"]),
        ("digits-flow --model.dit.norm layer --model.dit.preset modern", TINY | MODERN | {"norm": "layer"}),
        ("digits-flow --model.dit.preset modern --model.dit.no-qk-norm", TINY | MODERN | {"qk_norm": False}),
        ("digits-flow --model.dit.preset dit2023 --model.dit.qk-norm", TINY | PRESETS["dit2023"] | {"qk_norm": True}),
        ("digits-flow --model.dit.size XL", TINY | SIZES["XL"]),
        ("digits-flow --model.dit.size xl --model.dit.depth 3", TINY | SIZES["XL"] | {"depth": 3}),
        ("--tokenizer t --out o --model.dit.size S --model.dit.preset modern", {**SIZES["S"], **MODERN}),
    ],
)
def test_a_name_stands_for_its_fields_and_a_flag_of_one_overrides_it(words: str, expected: dict[str, Any]) -> None:
    assert dit(words) == DiTConfig(**expected)


def test_the_record_has_the_fields_and_not_the_name(tmp_path: Path) -> None:
    task = resolve(LatentTask, LATENT_RECIPES, ["digits-flow", "--model.dit.preset", "modern", "--model.dit.size", "S"])
    record = to_dict(task)
    assert not {"preset", "size"} & record["model"]["dit"].keys()
    assert from_dict(LatentTask, record).model.dit == DiTConfig(**SIZES["S"], **MODERN)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--model.dit.preset", "needs a value"),
        ("--model.dit.size --steps 3", "needs a value"),
        ("--model.dit.preset dit2024", "cannot be 'dit2024'"),
        ("--model.dit.presets modern", "unknown flag --model.dit.presets"),
    ],
)
def test_a_name_that_is_none_raises_an_error(words: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        dit(f"digits-flow {words}")
    assert "modern" in str(caught.value) or "XL" in str(caught.value) or "--model.dit.preset" in str(caught.value)
