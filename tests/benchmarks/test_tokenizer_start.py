"""benchmarks/tokenizer_start.py on digits: cells train once, the plateau, and the table that chooses learning rates."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import benchmark


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With rounds of two steps and a grid of eight cells."""
    module: Any = benchmark("tokenizer_start")
    digits = replace(module.GRIDS["digits"], rates=(1e-3, 1e-2), seeds=1, steps=4, held_out=20)
    for name, value in {
        "GRIDS": {"digits": digits},
        "BITS": (8,),
        "ROUND": 2,
        "LEAST": 4,
        "TRAINING_IMAGES": 30,
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.usefixtures("one_thread", "on_the_cpu")
@pytest.mark.slow
def test_every_cell_trains_once_and_ends_in_the_table(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = study.Study(("digits",), tmp_path / "cells.jsonl", json=tmp_path / "result.json", most=5)
    study.main(wanted)
    first = wanted.cells.read_text()
    assert len(first.splitlines()) == 5
    study.main(replace(wanted, most=None))
    assert wanted.cells.read_text().startswith(first)
    facts = json.loads((tmp_path / "result.json").read_text())
    found = {(c["cell"]["quantizer"], c["cell"]["shortcut"], c["cell"]["lr"]): c for c in facts["cells"]}
    assert len(found) == len(facts["cells"]) == 8
    assert facts["hardware"]
    for lr in (1e-3, 1e-2):
        vq, fsq = found["vq", "principal", lr], found["fsq", "principal", lr]
        assert vq["start_psnr"] > 20 > found["vq", "orthogonal", lr]["start_psnr"], "it starts as a linear autoencoder"
        assert (vq["capacity_bits"], vq["edge_mass"]) == (8, None)
        assert fsq["capacity_bits"] == pytest.approx(7.907, abs=1e-3)
        assert 0 < fsq["start_edge_mass"] < 1
        assert fsq["even_mass"] == pytest.approx((2 / 8 + 2 / 6 + 2 / 5) / 3)
        assert 0 < fsq["entropy_bits"] <= fsq["capacity_bits"]
    capsys.readouterr()
    page = tmp_path / "page.md"
    page.write_text("<!-- begin tokenizer start -->\nold\n<!-- end tokenizer start -->\n")
    study.main(replace(wanted, table=True, json=None, page=page))
    assert capsys.readouterr().out.count(" dB (1)") == 4, "of two rates the better"
    assert page.read_text().count(" dB (1)") == 4 and "old" not in page.read_text()


def test_a_training_is_over_when_the_last_third_brings_nothing(study: Any) -> None:
    study.ROUND, study.LEAST = 100, 600
    rising = [10.0, 15.0, 18.0, 20.0, 20.03, 20.04]
    assert study.is_flat(rising)
    assert not study.is_flat(rising[:5]), "too early"
    assert not study.is_flat([*rising[:4], 20.06, 20.0])
    assert study.is_flat([10.0, 15.0, 20.0, 19.0, 18.0, 17.0]), "overfitting is no progress"


def test_the_table_takes_the_rate_that_the_other_half_of_the_images_chooses(study: Any) -> None:
    def result(lr: float, seed: int, psnr: float) -> Any:
        cell = study.Cell("digits", "fsq", 10, "principal", lr, seed)
        choice = 30.0 if lr > 2e-3 else 29.0  # the scored half does not choose
        return study.Result(cell, psnr, choice, 10.0, 9.0, 1.0, 0.2, 0.36, 15.0, 0.37, 500, seed == 0, (choice,), 1.0)

    found = [result(1e-3, 0, 25.0), result(1e-3, 1, 26.0), result(1e-2, 0, 25.0), result(1e-2, 1, 25.2)]
    text = study.entry(found)
    assert text.startswith("25.10 ± 0.14 dB (2)<br>9.00 bits<br>rate 0.01<br>edges 37% to 20%")
    assert text.endswith("still learning")


def test_fsq_is_compared_with_vq_of_the_same_entropy(study: Any) -> None:
    def result(quantizer: str, bits: int, psnr: float, entropy: float, lr: float = 1e-3, choice: float = 0.0) -> Any:
        cell = study.Cell("digits", quantizer, bits, "principal", lr, 0)
        return study.Result(cell, psnr, choice, bits, entropy, 1.0, None, None, 15.0, None, 500, True, (choice,), 1.0)

    study.BITS = (8, 10, 12)
    found = [result("vq", 8, 20.0, 7.0), result("vq", 10, 24.0, 9.0), result("fsq", 12, 30.0, 8.0, 1e-2, choice=1.0)]
    found += [result("fsq", 12, 40.0, 7.0), result("fsq", 8, 21.0, 6.5)]
    assert study.at_equal_entropy(found, 12) == pytest.approx(30 - 22)
    assert study.at_equal_entropy(found, 8) is None, "less entropy than any VQ"
    assert study.at_equal_entropy(found, 10) is None, "not trained"
