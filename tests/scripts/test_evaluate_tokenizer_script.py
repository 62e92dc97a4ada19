"""evaluate_tokenizer.py as a user calls it, and the report it writes: whole files, with the best in bold."""

import csv
import dataclasses
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import SCRIPTS, Script

from midway.gen.commands import evaluate_tokenizer
from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.core.errors import DiskError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.evaluation.compared import report_names
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.features.classifier import load_features
from midway.gen.features.reference import make_reference
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.report.html import SCRIPT
from midway.gen.report.rates import rate_of
from midway.gen.report.table import ReportContext
from midway.gen.report.text import csv_text, jsonl_text
from midway.gen.report.tokenizer_plots import drawings, noise_figure, rate_figure, usage_figure
from midway.gen.report.tokenizers import (
    FILES,
    check_out,
    flat_record,
    report_md,
    tables,
    terminal_text,
    write_tokenizer_report,
)
from midway.gen.sweep.run import held_out_images, measure_images
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_features, train_tokenizer
from midway.tokenizers import perceptual

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TINY = TrainConfig(steps=20, batch_size=32, lr=1e-2, warmup=2, ema=0, log_every=20)
PNG = b"\x89PNG\r\n\x1a\n"
FEATURES = "cnn-digits@3fa2c1ab90de"
ROW = TokenizerRow(
    *("fsq", "0123456789ab", "fsq levels 8,5,5,5", 1000, "4x4x4", 16, 1, 1000),  # name to codebook
    *(0.01, 26.02, 0.95, None, 0.5, 0.75, 0.25),  # mse, psnr, ssim, lpips, distance, interpolated, floor
    *(0.9, 900, 100, 6400, 500.0, 159.4, 143.5),  # usage, used, dead, counted, perplexity, bits, entropy_bits
    *(None, None, 3.9, 3.1, 3.8, 3.0),  # rate, psnr_sampled, ranks of codes and of latents
    *((0.0, 0.1), (27.5, 25.0), (26.02, 24.75)),  # noise, psnr_noisy, psnr_snapped
    *(0.5, 0.25, 400, 0),  # encode_seconds, decode_seconds, n, seed
    *("digits-heldout@f9b5a420bc3a", FEATURES, "digits-train@fb9e2564f104", None),  # images to perceptual
)
OF_CODES = "codebook usage used dead counted perplexity bits entropy_bits code_rank code_stable_rank psnr_snapped"
BOUND: dict[str, Any] = {"rate": 200.0, "psnr_sampled": 25.5, "psnr_noisy": (27.0, 26.0), "decode_seconds": 0.125}
KL = replace(ROW, name="k|l_1", psnr=27.0, distance=0.625, interpolated=0.5, **BOUND, **dict.fromkeys(OF_CODES.split()))
ROWS = [ROW, KL]
COMMAND = "midway evaluate-tokenizer"
CONTEXT = ReportContext(
    "Compared", "2 tokenizers", "digits", COMMAND, "2 cores", {"torch": "2.15"}, "0", ("rounded to 8 bits",)
)


def measurements(rows: list[TokenizerRow]) -> list[TokenizerResult]:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    shares = torch.arange(50, 0, -1).double()
    return [TokenizerResult(r, None if r.codebook is None else shares / shares.sum(), images, images) for r in rows]


def write(directory: Path, rows: list[TokenizerRow] = ROWS, context: ReportContext = CONTEXT) -> str:
    """The page's text, its images cut out."""
    write_tokenizer_report(directory, measurements(rows), torch.zeros(3, 1, 8, 8, dtype=torch.uint8), context)
    page = (directory / "report.html").read_text(encoding="utf-8")
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", page)


# ---- tables and files ----


def test_the_best_is_bold_where_one_direction_is_better() -> None:
    text = report_md(ROWS, CONTEXT).partition("## Notes")[0]
    best = "0.9500 0.500 27.00 0.9500 0.500 27.00 26.00 1,000 0.500 1,000 0.500 0.125"
    assert re.findall(r"\*\*(.*?)\*\*", text) == best.split()
    assert "| fsq | 159 | 26.02 | **0.9500** | **0.500** | 0.750 |" in text
    assert r"| k\|l\_1 | 200 | **27.00** (25.50 of draws) | **0.9500** | 0.625 | **0.500** |" in text
    assert "| *floor* |  |  |  | *0.250* | *0.250* |" in text
    assert "24.75 (25.00 not snapped)" in text


def test_figures_that_no_row_has_are_no_column() -> None:
    bare = replace(ROW, distance=None, interpolated=None, floor=None, features=None, noise=(), psnr_noisy=())
    first, *others = tables([bare])
    assert first.heads == ("tokenizer", "bits per image", "PSNR, dB", "SSIM")
    assert not any(line.floor for line in first.lines)
    assert FEATURES not in first.note
    assert [table.title for table in others] == ["Codes and latents", "Cost"]
    ranking, first, *_ = tables([ROW, replace(ROW, lpips=0.25)])
    assert "at equal rate" in ranking.heads and "LPIPS" in first.heads


def test_a_single_tokenizer_is_never_the_best() -> None:
    assert "**" not in report_md([ROW], CONTEXT).partition("## Notes")[0]
    assert "*" not in terminal_text([ROW]).removesuffix("* best\n")


def test_the_text_table_is_aligned_and_has_the_floor() -> None:
    *lines, answer = terminal_text(ROWS).splitlines()
    assert answer.startswith("No two of these")
    first = lines[lines.index("Reconstruction") + 2 :][:5]
    assert [line.split()[0] for line in first] == ["tokenizer", "-" * len(first[1]), "fsq", "k|l_1", "floor"]
    assert "27.00*" in first[3]
    assert first[2].index(".9500") == first[3].index(".9500")
    assert first[4].split() == ["floor", "0.250", "0.250"]
    assert max(map(len, lines)) <= 100


def test_csv_and_jsonl_hold_every_figure() -> None:
    rows = list(csv.DictReader(csv_text([flat_record(row) for row in ROWS]).splitlines()))
    assert [row["name"] for row in rows] == ["fsq", "k|l_1"]
    fields = {field.name for field in dataclasses.fields(TokenizerRow)}
    curves = {f"psnr_{kind}_{sigma}" for kind in ("noisy", "snapped") for sigma in ("0", "0.1")}
    assert set(rows[0]) == fields - {"noise", "psnr_noisy", "psnr_snapped"} | curves
    assert (rows[0]["psnr_snapped_0.1"], rows[1]["psnr_snapped_0.1"], rows[1]["codebook"]) == ("24.75", "", "")
    records = [json.loads(line) for line in jsonl_text([dataclasses.asdict(row) for row in ROWS]).splitlines()]
    tuples = {"noise", "psnr_noisy", "psnr_snapped"}
    back: list[dict[str, Any]] = [
        {k: tuple(v) if k in tuples and v is not None else v for k, v in record.items()} for record in records
    ]
    assert [TokenizerRow(**record) for record in back] == ROWS


def test_the_report_is_whole_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    write(out)
    before = (out / "results.csv").read_text()
    page = write(out, [replace(ROW, name="other")])
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    assert before != (out / "results.csv").read_text()
    assert "other" in page
    for name in (name for name in FILES if name.endswith(".png")):
        assert (out / name).read_bytes().startswith(PNG)
        assert f"({name})" in (out / "report.md").read_text()
        assert f"({name})" in (out / "report.md").read_text()


@pytest.mark.parametrize("call", [4, len(FILES) + 1])
def test_a_failed_write_leaves_the_old_report(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one of the files, or of the whole directory."""
    write(tmp_path / "report")
    old = (tmp_path / "report" / "results.csv").read_bytes()
    real, calls = Path.replace, list[Path]()

    def fail(source: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DiskError, match="No space"):
        write(tmp_path / "report", [KL])
    assert calls[-1].name == ("report" if call > 4 else "results.csv")
    assert (tmp_path / "report" / "results.csv").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_directory_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        check_out(tmp_path)
    with pytest.raises(UsageError, match="holds other files"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\"&"
    context = ReportContext(evil, evil, evil, evil, evil, {evil: evil}, evil, (evil,))
    nasty = replace(ROW, name=evil, features=evil, reference=evil, quantizer=evil, latent_shape=evil, images=evil)
    page = write(tmp_path / "report", [nasty, KL], context)
    assert page.count("<script") == 1, "our own"
    page = page.replace(f"<script>{SCRIPT}</script>", "")
    assert page.count("&lt;script&gt;") > 10
    assert not re.search(r"https?:|//|<link|@import|url\(|href=", page)
    assert page.count('src="data:image/png;base64,"') == 2 * 3


def test_the_page_names_the_best_and_the_protocol(tmp_path: Path) -> None:
    page = write(tmp_path / "report")
    lead = re.sub(r"<.*?>", "", re.search(r'class="lead">(.*?)</p>', page)[1])  # pyright: ignore[reportOptionalSubscript]
    assert lead == (
        "No two of these tokenizers have the same rate; on the Pareto front of bits and PSNR: fsq (159 bits, 26.02 dB)."
    )
    for fact in (FEATURES, ROW.reference, ROW.images, "tokenizer@0123456789ab", "fsq levels 8,5,5,5", "400"):
        assert fact and fact in page
    assert page.count('<tr class="floor">') == 1
    assert "FID " not in page.replace("iFID", "")


def places(values: Any) -> list[float]:
    """Of a line."""
    return np.asarray(values).tolist()


@pytest.mark.parametrize("narrow", [False, True])
def test_plots_show_their_rows(narrow: bool) -> None:
    """Names in the legend or beside the points, front and points where they were measured; a text where nothing was."""
    many = measurements([replace(ROW, name=f"t{i}", bits=100.0 + i, psnr=30.0 - i) for i in range(9)])
    for figure in (usage_figure(many, narrow), noise_figure(many, narrow), rate_figure(many, narrow)):
        found = [
            text.get_text() for text in (figure.legends[0].get_texts() if figure.legends else figure.axes[0].texts)
        ]
        assert set(found) == {f"t{i}" for i in range(9)}
    front, *points = rate_figure(many, narrow).axes[0].lines
    assert (places(front.get_xdata()), places(front.get_ydata())) == ([100.0], [30.0]), (
        "the others cost more and show less"
    )
    assert [places(point.get_xdata()) for point in points[1::2]] == [[100.0 + i] for i in range(9)]
    bare = measurements([replace(KL, rate=None, noise=(), psnr_noisy=())])
    for figure in (usage_figure(bare, narrow), noise_figure(bare, narrow), rate_figure(bare, narrow)):
        assert figure.axes[0].texts[0].get_text().startswith("no ")
    assert [f"{drawing.name}.png" for drawing in drawings(many)] == [
        "rate_distortion.png",
        "noise.png",
        "codebook_usage.png",
    ]


def test_the_rate_of_a_posterior_goes_with_its_draws() -> None:
    assert rate_of(ROW) == (159.4, 26.02)
    assert rate_of(KL) == (200.0, 25.5)
    assert rate_of(replace(KL, rate=None)) is None


# ---- the command ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of digits, `a` with codes and `b` with a posterior, and a feature network."""
    root = tmp_path_factory.mktemp("runs")
    model = TokenizerConfig(width=8, blocks=1, downsample=4)
    train_tokenizer.train(TokenizerTask(root / "a", model=model, train=TINY))
    kl = replace(model, quantizer="kl", dim=3)
    train_tokenizer.train(TokenizerTask(root / "b", model=kl, train=TINY))
    train_features.train(train_features.FeaturesTask(root / "features", width=8, dim=8, train=TINY))
    return root


def test_the_command_compares_two_tokenizers(runs: Path, succeed: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--tokenizers", runs / "a", runs / "b", "--out", out, "--n", 60, "--noise", 0, 0.4, "--seed", 3)
    arguments = (*arguments, "--features", runs / "features")
    done = succeed("evaluate_tokenizer", *arguments)
    assert {path.name for path in out.iterdir()} == set(FILES)
    a, b = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert (a["name"], b["name"], a["n"], a["seed"]) == ("a", "b", "60", "3")
    assert a["floor"] == b["floor"] and float(a["distance"]) > 0 and float(b["interpolated"]) > 0
    assert a["features"].startswith("cnn-digits@") and a["reference"].startswith("digits-train@")
    assert float(a["psnr_snapped_0"]) == pytest.approx(float(a["psnr"]))
    assert float(a["bits"]) > 0 and b["bits"] == "" and float(b["rate"]) > 0
    assert "PSNR, dB" in done.out and f"report: {out / 'report.html'}" in done.out
    succeed("evaluate_tokenizer", *arguments, "--batch-size", 7)
    for old, new in zip((a, b), csv.DictReader((out / "results.csv").read_text().splitlines()), strict=True):
        for name in ("psnr", "ssim", "distance", "interpolated", "psnr_noisy_0.4", "latent_rank"):
            assert float(new[name]) == pytest.approx(float(old[name]), rel=1e-5)


def test_training_and_comparison_have_one_psnr(runs: Path, succeed: Script, tmp_path: Path) -> None:
    """The mean over images, by the one function that has a logarithm of an error."""
    final = json.loads((runs / "a/metrics.jsonl").read_text().splitlines()[-1])
    succeed(f"evaluate_tokenizer --tokenizers {runs}/a --out {tmp_path}/out --features none --noise 0")
    (row,) = csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines())
    assert float(row["psnr"]) == pytest.approx(final["held_out_psnr"], rel=1e-9)
    assert float(row["psnr"]) > 10 * math.log10(4 / final["held_out_mse"]) + 0.01, (
        "that of the mean error is another figure"
    )
    sources = [path for room in ("gen", "tokenizers", "samplers") for path in (SCRIPTS.parent / room).rglob("*.py")]
    assert [path.name for path in sources if "log10(4" in path.read_text()] == ["psnr_ssim.py"]


def test_one_tile_changes_no_figure_and_four_do(runs: Path, succeed: Script, tmp_path: Path) -> None:
    call = f"evaluate_tokenizer --tokenizers {runs}/a --out {tmp_path}/out --features none --n 20 --noise 0"
    figures = []
    for tile in ("", "--tile 8 --tile-margin 0", "--tile 4 --tile-margin 0"):
        succeed(f"{call} {tile}")
        (row,) = csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines())
        figures.append((row["tokenizer"], row["parameters"], float(row["psnr"])))
    whole, one_tile, four_tiles = figures
    assert len({tokenizer for tokenizer, _, _ in figures}) == 3, "tiles are part of what a tokenizer is called"
    assert one_tile[1:] == whole[1:]
    assert four_tiles[1] == whole[1] and four_tiles[2] != whole[2]


def test_without_features_there_are_no_distances(runs: Path, succeed: Script) -> None:
    """And the report lies beside the tokenizer unless given."""
    done = succeed("evaluate_tokenizer", "--tokenizers", runs / "a", "--features", "none", "--n", 4, "--noise", 0)
    out = runs / "tokenizer-report"
    page = (out / "report.html").read_text()
    shutil.rmtree(out)
    assert "distance" not in done.out and "Fréchet" not in page
    assert "nearest neighbour" not in page


def test_lpips_is_measured_when_weights_are_given(
    runs: Path, succeed: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distance(torch.nn.Module):
        protocol = "LPIPS-vgg@1234"

        def __init__(self, net: str, weights: Path) -> None:
            super().__init__()
            assert (net, weights) == ("vgg", tmp_path / "vgg.pth")

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().flatten(1).mean(1) + 0.125

    monkeypatch.setattr(perceptual, "Perceptual", Distance)
    flags = ("--tokenizers", runs / "a", "--n", 4, "--lpips-weights", tmp_path / "vgg.pth", "--out", tmp_path / "out")
    flags = (*flags, "--features", "none")
    succeed("evaluate_tokenizer", *flags)
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    assert float(row["lpips"]) > 0.125
    assert row["perceptual"] == "LPIPS-vgg@1234"


def test_how_images_were_fetched_makes_no_difference(runs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs / "b", tmp_path / "b"))
    config = read_yaml(other / "config.yaml")
    write_yaml(other / "config.yaml", {**config, "data": {**config["data"], "download": True, "on_bad_image": "skip"}})
    tokenizers, _ = evaluate_tokenizer.load((runs / "a", other), torch.device("cpu"))
    assert list(tokenizers) == ["a", "b"]


def test_runs_of_one_name_are_reported_by_path(tmp_path: Path) -> None:
    paths = (tmp_path / "x" / "fsq", tmp_path / "y" / "fsq", tmp_path / "y" / "vq")
    names = report_names(paths)
    assert list(names) == [str(paths[0]), str(paths[1]), "vq"]
    with pytest.raises(UsageError, match="nothing to measure"):
        report_names(())


def test_the_floor_is_of_the_held_out_images_themselves(runs: Path) -> None:
    task = evaluate_tokenizer.TokenizersTask(
        tokenizers=(runs / "a",), n=50, noise=(), features=str(runs / "features"), out=runs / "floor"
    )
    (found,) = evaluate_tokenizer.run(task)
    shutil.rmtree(runs / "floor")
    splits = load_splits(DataConfig())
    network = load_features(Run.open(runs / "features", "features").checkpoint / "features.safetensors")
    cell = measure_images(
        "floor", held_out_images(splits.held_out, 50), {"": make_reference(network, network.name, splits.train)}
    )
    assert (found.row.floor, found.row.features, found.row.reference) == (cell.distance, cell.features, cell.reference)
    assert found.row.floor is not None and np.isfinite(found.row.floor)
