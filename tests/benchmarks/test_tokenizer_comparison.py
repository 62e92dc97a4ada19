"""benchmarks/compare_tokenizers.py on digits: every quantizer trains, is measured, and ends in table, JSON and page."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_modules import BENCHMARKS, as_before, benchmark


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    return benchmark("compare_tokenizers")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_every_quantizer_ends_in_the_table_the_json_and_the_page(comparison: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin tokenizers -->\nold\n<!-- end tokenizers -->\nafter\n")
    wanted = comparison.Comparison(
        out=tmp_path / "runs",
        data=comparison.DataConfig(),
        steps=2,
        width=8,
        bits=(8, 10),
        quantizers=("vq", "fsq", "residual_fsq", "kl"),
        repeats=1,
        n=20,
        json=tmp_path / "result.json",
        page=page,
    )
    comparison.main(wanted)
    facts = json.loads(wanted.json.read_text())
    found = {(c["quantizer"], c["target"], c["seed"]): c for c in facts["cells"]}
    assert len(found) == 4 * 2 + 2
    assert found["vq", 8, 0]["bits"] == 8
    assert found["fsq", 10, 1]["bits"] == pytest.approx(9.966, abs=1e-3)
    assert found["residual_fsq", 10, 0]["bits"] == pytest.approx(10.34, abs=1e-2)
    assert found["kl", 8, 0]["bits"] > 0
    assert facts["spread"]["vq-10"]["seeds"] == 2
    assert facts["protocol"]["n"] == 20
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("**") == 4, "the best of each column but KL's"
    assert (tmp_path / "images" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    comparison.train_all(wanted)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what is there is left alone"


def test_the_cells_are_of_the_sizes_they_name(comparison: Any) -> None:
    """Products of levels, and codes that are matched to within half a bit."""
    from midway.tokenizers.quantizers import make_quantizer

    for bits in comparison.BITS:
        for quantizer in comparison.QUANTIZERS:
            config = comparison.model(quantizer, bits, 8).quantizer_config(3)
            made = make_quantizer(config)
            assert (made.codebook_size is None) == (quantizer == "kl")
            of_position = made.groups * math.log2(made.codebook_size or 2**bits)
            assert abs(of_position - bits) < 0.5, (quantizer, bits, of_position)


def test_a_page_without_the_block_raises(comparison: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="no block"):
        comparison.embed(page, "text")
    assert page.read_text() == "nothing\n"


def test_a_name_that_a_folder_has_too_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every command, before anything is trained."""
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_tokenizers.py", "--data", "digits", "--out", "runs", "--steps", "1"])
    with as_before(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "compare_tokenizers.py"), run_name="__main__")
    assert ended.value.code == 2 and "the data source digits is ambiguous" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
