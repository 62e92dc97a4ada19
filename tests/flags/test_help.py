"""Pages of --help: every flag with a sentence, nothing cut, whatever the width; and flags by their names in config.yaml."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from midway.gen.commands.data import BuildTask
from midway.gen.commands.main import COMMANDS
from midway.gen.commands.verify_resume import VerifyTask
from midway.gen.core.config import to_dict
from midway.gen.flags import cli
from midway.gen.flags.fields import Flag, flags_of
from midway.gen.flags.help import summary
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.recipes.prior_recipes import PRIOR_RECIPES
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.training.config import flat

STARTS = {
    "train tokenizer": (TOKENIZER_RECIPES, ("digits-vq",)),
    "train latent": (LATENT_RECIPES, ("digits-dit",)),
    "train prior": (PRIOR_RECIPES, ("digits-masked",)),
    "train baseline": (BASELINE_RECIPES, ("vae", "glow", "tarflow")),
    "train solver": ({}, ("table", "table-residual", "adasde", "amed")),
}
PAGES = [(name, first) for name in COMMANDS for first in ((), *((one,) for one in STARTS.get(name, ({}, ()))[1]))]


def page_of(name: str, *words: str) -> None:
    """Run the command's --help."""
    command = COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        getattr(import_module(f"midway.gen.{command.module}"), command.function)([*words, "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize(("name", "words"), PAGES, ids=str)
def test_every_flag_has_a_sentence_and_nothing_is_cut(
    name: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Flag] = []
    page = cli.page

    def spied(program: str, about: str, recipes: Any, flags: list[Flag], **more: Any) -> str:
        seen.extend(flags)
        return page(program, about, recipes, flags, **more)

    monkeypatch.setattr(cli, "page", spied)
    monkeypatch.setattr(cli, "PROGRAM", f"midway {name}")
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        page_of(name, *words)
        printed = capsys.readouterr()
        assert printed.err == "" and "\x1b" not in printed.out and "…" not in printed.out
        longest = max(printed.out.splitlines(), key=len)
        assert len(longest) <= width, longest
        assert printed.out.startswith(f"usage: midway {name}") and "--debug" in printed.out
        whole = " ".join(printed.out.split())
        for flag in seen:
            assert flag.text and flag.text[-1] in ".)", flag
            assert flag.text in whole and flag.name.split(".")[-1].strip("-") in whole.lower(), flag
        for recipe, make in STARTS[name][0].items() if name in STARTS and not words else ():
            assert f"{recipe} {summary(make)}" in whole, recipe
    assert seen or name.startswith("train baseline")


def test_a_page_has_what_is_read_and_no_other_flag(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*words: str) -> set[str]:
        page_of(*words)
        return {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}

    glow, vae, kinds = names("train baseline", "glow"), names("train baseline", "vae"), names("train baseline")
    assert "--model.transform" in glow - vae and "--model.beta" in vae - glow
    assert not any(name.startswith("--model.") for name in kinds)
    table, amed, all_solvers = names("train solver", "table"), names("train solver", "amed"), names("train solver")
    assert {name.split(".")[0] for name in table ^ amed if "." in name} == {"--table", "--distill"}
    assert not any("." in name for name in all_solvers)


def test_common_flags_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    page_of("train tokenizer", "digits-fsq")
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Common flags:" and titles[-1] == "General:"
    assert [line.split()[0] for line in lines if line.startswith("  --")][:3] == ["--out", "--data", "--steps"]


# ---- names ----


@pytest.mark.parametrize("make", [*TOKENIZER_RECIPES.values()][:1])
def test_every_name_of_config_yaml_is_a_flag(make: Any) -> None:
    """The written configuration has no other name, and each can be typed with dots, and with underscores or hyphens."""
    task = make()
    written = {path for path in flat(to_dict(task)) if not path.startswith("quantizer")}
    flags = {flag.path: flag for flag in flags_of(type(task), task)}
    assert written <= {*flags}
    for spelled in ("train.steps", "data.held_out", "data.held-out"):
        assert cli.resolve(
            TokenizerTask, TOKENIZER_RECIPES, ["digits-fsq", f"--{spelled}", "1" if "steps" in spelled else ".5"]
        )


@pytest.mark.parametrize(
    "typed",
    [
        "--train.steps 7 --data.held_out .1 --model.kl_weight 2 --data.data cifar-10 --train.decay cosineannealing",
        "--steps 7 --held-out .1 --model.kl-weight 2 --data CIFAR10 --decay Cosine",
        "--steps=7 --train.held_out=.1 --model.kl_weight=2 --data=cifar10 --decay=cosine".replace(
            "train.held", "data.held"
        ),
    ],
)
def test_flags_are_understood_by_both_names_and_recorded_by_one(typed: str) -> None:
    task = cli.resolve(TokenizerTask, TOKENIZER_RECIPES, ["digits_fsq", *typed.split(), "--no-flip"])
    found = (task.train.steps, task.data.held_out, task.model.kl_weight, task.data.data, task.train.decay)
    assert found == (7, 0.1, 2.0, "cifar10", "cosine")
    assert not task.flip and cli.resolve(TokenizerTask, TOKENIZER_RECIPES, ["digits-fsq", "--flip"]).flip


def test_the_file_of_config_may_stand_anywhere(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("out: there\ntrain:\n  steps: 5\n  lr: 0.5\n")
    for words in (
        ["--config", "F", "--steps", "6"],
        ["--steps", "6", "--config=F"],
        ["--train.steps=6", "--config", "F"],
    ):
        arguments = [word.replace("F", str(tmp_path / "c.yaml")) for word in words]
        task = cli.resolve(TokenizerTask, TOKENIZER_RECIPES, arguments)
        assert (task.train.steps, task.train.lr, task.out) == (6, 0.5, Path("there"))


@pytest.mark.parametrize(
    "words", ["runs/a --steps 3", "--steps 3 runs/a", "--steps=3 runs/a"], ids=["before", "after a value", "after ="]
)
def test_an_argument_without_a_flag_may_stand_before_and_after_flags(words: str) -> None:
    assert cli.resolve(VerifyTask, {}, words.split()) == VerifyTask(Path("runs/a"), steps=3)


def test_an_argument_may_follow_a_switch() -> None:
    task = cli.resolve(BuildTask, {}, ["--out", "set", "--keep-encoded", "cifar-10"])
    assert (task.data, task.keep_encoded) == ("cifar10", True)  # by the name of the source
