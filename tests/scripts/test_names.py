"""Hostile names of folders, classes, files, runs and titles through every command: text in every output."""

import csv
import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_names import NAMES
from pictures import noise, save
from pipelines import Outcome, Script

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")
TRAIN = "--steps 2 --batch-size 16 --warmup 0 --ema 0"
SOURCE, TOKENIZER, FEATURES, MODEL, BASELINE, REPORT, SAMPLES, LATENTS, FIGURES = (
    "$a$ \udcff|<b>\r\n\x1b[1m",  # the images
    "_$t",
    "=f\n*x*",
    "$m$ <i>|",
    "=cmd|' !A0 $b$",
    "\u202er",
    "./-s\r$x$",
    "l",
    "@q\x07",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of every name, with five images each."""
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        for index in range(5):
            save(root / SOURCE / name / f"{index} {name[:20]}.png", noise(8, 8, seed=5 * number + index))
    return root


def is_text(path: Path) -> str:
    """The text of an output: UTF-8, without a control character."""
    text = path.read_bytes().decode()
    assert not any(unicodedata.category(letter) == "Cc" and letter != "\n" for letter in text), path
    return text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


def check_report(out: Path) -> None:
    """Every file of a report is text, and has no formula and no element of a name."""
    for path in (*out.glob("*.md"), *out.glob("*.json*"), *out.glob("*.csv")):
        is_text(path)
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert not any(field.startswith(("=", "@", "+")) for row in rows for field in row)
    if (out / "report.html").exists():
        tags = _Tags()
        tags.feed(is_text(out / "report.html"))
        assert not tags.found & {"i", "a"}


@pytest.fixture
def run(succeed: Script, place: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A command line in the folder of the names; what it prints is text."""
    monkeypatch.chdir(place)

    def call(line: str, *arguments: object) -> Outcome:
        done = succeed(line, *arguments)
        assert not any(unicodedata.category(letter) in ("Cc", "Cs") and letter != "\n" for letter in done.out)
        return done

    return call


@pytest.mark.parametrize("line", ["train_tokenizer --steps 1 --out", "demo --quick --out"])
def test_a_folder_of_weights_has_a_name_in_utf_8(line: str, script: Script, place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place)
    done = script(*line.split(), "a\udcff")
    assert done.code == 2 and r"a\xff" in done.err and len(done.err.splitlines()) == 3
    assert not (place / "a\udcff").exists()


def test_every_command_takes_every_name_as_text(run: Script, place: Path) -> None:
    data = ("--data", f"./{SOURCE}", "--held-out", "0.4")
    run("data check", data[1], "--held-out", "0.4", "--out", FIGURES)
    is_text(place / FIGURES / "data.json")
    run(f"train_tokenizer --model.width 8 --model.downsample 2 {TRAIN} --out", TOKENIZER, *data)
    run(f"train_features --width 8 --dim 8 {TRAIN} --out", FEATURES, *data)
    run(
        f"train_latent --model.dit.width 16 --model.dit.depth 1 --model.dit.heads 2 {TRAIN} --out",
        MODEL,
        "--tokenizer",
        TOKENIZER,
    )
    run(
        f"train_baseline vae --model.latent-dim 2 --model.width 8 --model.blocks 1 --model.mixtures 1 {TRAIN} --out",
        BASELINE,
        *data,
    )
    run(
        "train_solver amed --nfe 4 --grid uniform --distill.trajectories 16 --steps 1 --model",
        MODEL,
    )
    run("encode --overwrite --tokenizer", TOKENIZER)
    run("sample --n 4 --nfe 2 --model", MODEL, "--out", f"{SAMPLES}.png")
    run("evaluate_tokenizer --batch-size 16 --features", FEATURES, "--tokenizers", TOKENIZER, "--out", f"{FIGURES} $b$")
    run("evaluate_likelihood --features", FEATURES, "--models", BASELINE, "--out", LATENTS)
    np.savez(place / f"{SAMPLES}.npz", noise(24, 8, 8, 1))
    flags = "--solvers euler,amed --nfe 4 --grids uniform --n 12 --blocks 2 --exact-nfe 0 --batch-size 16"
    compared = ("--baselines", BASELINE, "--images", f"{SAMPLES}.npz", "--title", SOURCE.replace("\udcff", ""))
    run(f"evaluate {flags} --features", FEATURES, "--model", MODEL, "--out", REPORT, *compared)
    for out in (f"{FIGURES} $b$", LATENTS, REPORT):
        check_report(place / out)
    for name in (TOKENIZER, FEATURES, MODEL, BASELINE):
        is_text(place / name / "log.txt")
        is_text(place / name / "config.yaml")
        json.loads(is_text(place / name / "env.json"))
    is_text(place / TOKENIZER / "tokenizer" / "README.md")
