"""evaluate.py against published references, by published protocols, and with classes of seeds as flags draw them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import Pipeline, Script

from midway.gen.core.files import file_hash
from midway.gen.data.splits import in_proportion, load_splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.features import protocols
from midway.gen.features.protocols import Network

pytestmark = [pytest.mark.usefixtures("one_thread", "undrawn"), pytest.mark.filterwarnings("ignore:.*mostly bias")]
USAGE = 2


def evaluated(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a report by solver."""
    return {row["solver"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


@pytest.fixture
def line(pipeline: Pipeline) -> str:
    return (
        f"evaluate --model {pipeline.model} --features {pipeline.features} --solvers ddim --nfe 4 --grids uniform "
        "--exact-nfe 0 --n 20 --blocks 1"
    )


def test_a_saved_reference_gives_the_distances_of_the_images(line: str, succeed: Script, tmp_path: Path) -> None:
    """To rounding; its name is the file's, it has no images for KID, and every page names it."""
    file = tmp_path / "mine.npz"
    succeed(f"{line} --out {tmp_path / 'a'} --save-reference {file} --metrics kid")
    succeed(f"{line} --out {tmp_path / 'b'} --reference {file}")
    first, second = evaluated(tmp_path / "a"), evaluated(tmp_path / "b")
    for solver in ("ddim", "floor"):
        assert second[solver]["distance"] == pytest.approx(first[solver]["distance"], rel=1e-6)
        assert second[solver]["reference"] == f"mine@{file_hash(file)[:12]}"
        assert first[solver]["kid"] is not None and second[solver]["kid"] is None
    page = (tmp_path / "b" / "report.md").read_text().replace("\\", "")
    assert f"of 1438 images in a published file, mine@{file_hash(file)[:12]}" in page
    assert "Published protocol: none" in page and "n is 20, not 50,000" in page
    assert "all 1438 training images" in (tmp_path / "a" / "report.md").read_text()


def test_a_reference_with_images_has_the_metrics_of_images(
    line: str, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    train = load_splits(pipeline.load().data).train
    images = train.images[in_proportion(train.labels)]  # in the order of the reference's, since KID takes some of them
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    succeed(f"{line} --out {tmp_path / 'a'} --metrics kid")
    succeed(f"{line} --out {tmp_path / 'b'} --reference {tmp_path / 'images.npz'} --metrics kid")
    first, second = (evaluated(tmp_path / name)["ddim"] for name in "ab")
    assert second["distance"] == pytest.approx(first["distance"], rel=1e-6)
    assert second["kid"] == pytest.approx(first["kid"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--reference {file} --metrics kid", "--metrics kid with --reference"),
        ("--reference {file} --features {features},pixels", "2 feature spaces"),
        ("--reference {file} --features pixels", "principal axes"),
        ("--save-reference {out}.pt", "ends in .npz"),
        ("--save-reference {out}.npz --features pixels", "principal axes"),
        ("--protocol adm", "--features"),
        ("--protocol adm --features inception --n 50000", "without --reference"),
        ("--protocol adm --features inception --reference {file}", "--n 20 with --protocol adm"),
        ("--protocol amd", "adm"),
        ("--labels proportonal", "proportional"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(
    flags: str, words: str, line: str, pipeline: Pipeline, script: Script, tmp_path: Path
) -> None:
    file, out = tmp_path / "plain.npz", tmp_path / "out"
    np.savez(file, mu=np.zeros(4), sigma=np.eye(4))
    done = script(*f"{line} --out {out} {flags.format(file=file, out=out, features=pipeline.features)}".split())
    assert done.code == USAGE and words in done.err and not out.exists()


def test_labels_without_a_model_is_a_usage_error(script: Script, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 1), np.uint8))
    done = script(
        *f"evaluate --images {tmp_path / 'a.npz'} --data digits --labels random --out {tmp_path / 'out'}".split()
    )
    assert done.code == USAGE and "--labels without --model" in done.err


def test_a_protocol_sets_what_it_fixes_and_the_report_names_it(
    line: str, pipeline: Pipeline, succeed: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small network and few images in place of Inception and 50,000."""
    small = replace(protocols.PROTOCOLS["adm"], networks=(Network(str(pipeline.features), "cnn-digits@", ""),), n=20)
    monkeypatch.setitem(protocols.PROTOCOLS, "adm", small)
    file = tmp_path / "VIRTUAL.npz"
    succeed(f"{line} --out {tmp_path / 'a'} --save-reference {file} --labels random --metrics=")
    short = line.replace(" --n 20 --blocks 1", "").replace(f"--features {pipeline.features} ", "")
    succeed(f"{short} --out {tmp_path / 'b'} --protocol adm --reference {file}")
    first, second = (evaluated(tmp_path / name)["ddim"] for name in "ab")
    assert (second["n"], second["blocks"]) == (20, 1)
    assert second["distance"] == pytest.approx(first["distance"], rel=1e-6)
    page = (tmp_path / "b" / "report.md").read_text().replace("\\", "")
    assert "Published protocol: adm." in page and "--labels random" in page


@pytest.mark.parametrize("rule", ["proportional", "balanced", "random"])
def test_labels_are_those_of_exported_images_and_enter_the_identity(
    rule: str, line: str, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    out = tmp_path / rule
    succeed(f"{line} --out {out} --labels {rule} --metrics= --export-npz {out / 'npz'}")
    counts = tuple(load_splits(pipeline.load().data).train.labels.bincount().tolist())
    draw = ClassDraw(counts, rule)  # pyright: ignore[reportArgumentType]
    with np.load(next((out / "npz").glob("*.npz")), allow_pickle=False) as arrays:
        assert torch.equal(torch.from_numpy(arrays["arr_1"]).long(), draw.labels(torch.arange(20)))
    cell = json.loads((out / "cells" / f"{evaluated(out)['ddim']['record']}.json").read_text())
    assert draw.identity in json.dumps(cell)
    assert f"--labels {rule}" in (out / "report.md").read_text().replace("\\", "")
