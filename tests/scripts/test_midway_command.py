"""The command `midway`: names, overview, versions, an incomplete environment, and what it imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import SCRIPTS

import midway
from midway.gen.commands import main


def _run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import json, sys, runpy\nsys.argv[1:] = ['--help']\ntry:\n    runpy.run_module('midway', run_name='__main__')\n"
        "except SystemExit as end:\n    print(json.dumps([end.code, 'torch' in sys.modules, 'numpy' in sys.modules]))\n"
    )
    *text, last = _run("-c", code).stdout.splitlines()
    assert json.loads(last) == [0, False, False]
    assert "\n".join(text) == main.overview()
    assert all(f"  {name} " in main.overview() for name in main.COMMANDS)
    assert max(map(len, text)) <= 100


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("train tokenizer small --x", ("train tokenizer", ["small", "--x"])),
        ("train-tokenizer small", ("train tokenizer", ["small"])),
        ("train_latent", ("train latent", [])),
        ("evaluate --model m", ("evaluate", ["--model", "m"])),
        ("evaluate_tokenizer --help", ("evaluate-tokenizer", ["--help"])),
        ("data build images", ("data build", ["images"])),
        ("Sample", ("sample", [])),
    ],
)
def test_the_first_words_name_a_command(words: str, found: tuple[str, list[str]]) -> None:
    assert main.named(words.split()) == found


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ("", 0, "usage: midway COMMAND", ""),
        ("help", 0, "usage: midway COMMAND", ""),
        ("--version", 0, midway.__version__, ""),
        ("train", 0, "train solver", ""),
        ("train --help", 0, "usage: midway train COMMAND", ""),
        ("evalute", 2, "", "did you mean 'evaluate'?"),
        ("train tokeniser", 2, "", "did you mean 'train tokenizer'?"),
        ("trian latent", 2, "", "did you mean 'train latent'?"),
        ("data chek", 2, "", "did you mean 'data check'?"),
        ("--model x", 2, "", "unknown command '--model'"),
    ],
)
def test_without_a_command(words: str, code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.started(words.split())
    printed = capsys.readouterr()
    assert ended.value.code == code and out in printed.out and err in printed.err
    assert (printed.err == "") == (code == 0) and len(printed.err.splitlines()) in (0, 3)


def test_without_the_environment_a_sentence(tmp_path: Path) -> None:
    """A Python that has neither midway nor torch: `-S` hides what is installed."""
    script = _run("-S", SCRIPTS / "train_tokenizer.py", "digits-fsq", PYTHONPATH="")
    assert script.returncode == 2 and script.stderr.startswith("error: Midway is not installed here\n  why: ")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    command = _run("-m", "midway", "sample", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert command.returncode == 2 and "has no package 'torch'" in command.stderr
    assert len(script.stderr.splitlines()) == len(command.stderr.splitlines()) == 3


def test_the_names_of_the_package_are_there() -> None:
    assert set(midway.NAMES) | {"__version__"} == set(dir(midway))
    assert all(callable(getattr(midway, name)) or getattr(midway, name) for name in midway.NAMES)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = midway.Nothing


def test_every_command_is_found_and_its_module_has_it() -> None:
    from importlib import import_module

    for name, command in main.COMMANDS.items():
        assert main.named(name.split()) == (name, [])
        assert callable(getattr(import_module(f"midway.gen.{command.module}"), command.function))


def test_completion_offers_commands_recipes_and_flags(tmp_path: Path) -> None:
    """In bash itself; files are left to the shell."""
    from midway.gen.commands.completion import script

    (tmp_path / "midway").write_text(script("bash"))

    def offered(*words: str) -> set[str]:
        line = f"COMP_WORDS=(midway {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}; _midway"
        code = f"source {tmp_path}/midway; {line}; echo ${{COMPREPLY[@]}}"
        return set(subprocess.check_output(["bash", "-c", code], text=True, timeout=60).split())

    assert offered("tr") == {"train"} and offered("ev") == {"evaluate", "evaluate-tokenizer", "evaluate-likelihood"}
    assert offered("train", "") == {"tokenizer", "latent", "prior", "solver", "baseline", "features"}
    assert offered("train", "tokenizer", "sm") == {"small"}
    assert offered("train", "tokenizer", "small", "--res") == {"--resize", "--resume"}
    assert "--model.actnorm" in offered("train", "baseline", "digits-glow", "--model.")
    assert offered("evaluate", "--model", "runs/a", "--nf") == {"--nfe"}
    assert offered("data", "build", "x", "--keep") == {"--keep-encoded"} and offered("sample", "--out", "f") == set()
    assert script("zsh").endswith(script("bash"))
