"""Exported images are those that were measured, in the formats that other evaluators read, whole or absent."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Pipeline
from sweeps import beside_model, images_task, measured
from torch import Tensor

from midway.gen.commands import evaluate
from midway.gen.core.errors import DiskError, UsageError
from midway.gen.data.pictures import png_name
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.evaluation.sources import SampledBatch
from midway.gen.sweep import store
from midway.gen.sweep.export import ImageSet, export
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.store import Seeds

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


class Coloured:
    """Images whose values are a function of the seed."""

    kind = "coloured"

    def __init__(self, channels: int = 3) -> None:
        self.identity: dict[str, Any] = {}
        self.channels = channels
        self.asked: list[int] = []

    def sample(self, seeds: Tensor) -> SampledBatch:
        self.asked.append(len(seeds))
        return SampledBatch(seeds, 0.0, 0.0)

    def images(self, raw: SampledBatch) -> Tensor:
        place = torch.arange(self.channels * 6).view(1, self.channels, 2, 3)
        return (7 * raw.values.view(-1, 1, 1, 1) + place).to(torch.uint8)


def of(seeds: range, channels: int = 3) -> np.ndarray[Any, Any]:
    """What `Coloured` makes, uint8 (N, H, W, C)."""
    place = np.arange(channels * 6).reshape(channels, 2, 3)
    return np.stack([(7 * seed + place) % 256 for seed in seeds]).transpose(0, 2, 3, 1).astype(np.uint8)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PART", 8)


# ---- files ----


def test_npz_is_what_adm_reads(tmp_path: Path, small_parts: None) -> None:
    source = Coloured()
    export(ImageSet(source, Seeds(30, 10, 2), classes=4), tmp_path / "a.npz")
    assert source.asked == [8, 2, 8, 2], "part by part"
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"] and arrays["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(arrays["arr_0"], of(range(30, 50)))
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(30, 50) % 4)
    export(ImageSet(Coloured(1), Seeds(0, 3, 1)), tmp_path / "grey.npz")
    with np.load(tmp_path / "grey.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], of(range(3), 1).repeat(3, axis=3))


@pytest.mark.parametrize("channels", [1, 3])
def test_zip_is_edms_layout(channels: int, tmp_path: Path) -> None:
    export(ImageSet(Coloured(channels), Seeds(5, 1001, 1), classes=3), archive=tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert names[0] == "00000/img00000000.png" and names[1000:] == ["00001/img00001000.png", "dataset.json"]
        labels = json.loads(archive.read("dataset.json"))["labels"]
        images = [np.asarray(Image.open(archive.open(name))) for name in names[:-1]]
    assert labels == [[name, (5 + index) % 3] for index, name in enumerate(names[:-1])]
    np.testing.assert_array_equal(np.stack(images).reshape(1001, 2, 3, channels), of(range(5, 1006), channels))
    assert png_name(1234567) == "01234/img01234567.png"


def test_labels_are_null_without_classes_and_files_are_the_same_bytes_again(tmp_path: Path) -> None:
    images = ImageSet(Coloured(), Seeds(0, 4, 2))
    for folder in ("a", "b"):
        export(images, tmp_path / folder / "x.npz", tmp_path / folder / "x.zip")
    with zipfile.ZipFile(tmp_path / "a" / "x.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for name in ("x.npz", "x.zip"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class FullDisk(Coloured):
    """Fails as a disk does, while the second part is written."""

    def sample(self, seeds: Tensor) -> SampledBatch:
        if self.asked:
            raise OSError(28, "No space left on device")
        return super().sample(seeds)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, small_parts: None) -> None:
    export(ImageSet(Coloured(), Seeds(0, 20, 1)), tmp_path / "a.npz", tmp_path / "a.zip")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DiskError, match=r"a\.zip"):
        export(ImageSet(FullDisk(), Seeds(0, 20, 1)), tmp_path / "a.npz", tmp_path / "a.zip")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


class Later(Coloured):
    """Meanwhile another process writes the file."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__()
        self.path, self.content = path, content

    def sample(self, seeds: Tensor) -> SampledBatch:
        self.path.write_bytes(self.content)
        return super().sample(seeds)


@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
def test_a_file_of_other_images_stays(name: str, tmp_path: Path) -> None:
    """Of other seeds or another model, and what no command made; the same images may be written again."""
    path, images = tmp_path / name, ImageSet(Coloured(), Seeds(0, 4, 1))
    place: dict[str, Any] = {"npz" if path.suffix == ".npz" else "archive": path}
    export(images, **place)
    export(images, **place)
    own = path.read_bytes()
    other = Coloured()
    other.identity = {"model": "another"}
    for source in (ImageSet(other, Seeds(0, 4, 1)), ImageSet(Coloured(), Seeds(4, 4, 1))):
        with pytest.raises(UsageError, match=f"{name} is of other images"):
            export(source, **place)
        assert path.read_bytes() == own
    for content in (b"", b"mine", own.replace(b"midway ", b"nobody ")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is of other images"):
            export(images, **place)
        assert path.read_bytes() == content
        path.unlink()
        with pytest.raises(UsageError, match="is of other images"):
            export(ImageSet(Later(path, content), Seeds(0, 4, 1)), **place)
        assert [path.name for path in tmp_path.iterdir()] == [name] and path.read_bytes() == content


# ---- cells ----


@pytest.fixture(scope="module")
def exported(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """Two solvers on two grids and a baseline, in parts of 8."""
    out = tmp_path_factory.mktemp("exported")
    more = {
        "solvers": "ddim,euler",
        "grids": "uniform,karras",
        "exact_nfe": 8,
        "baselines": (pipeline.baseline,),
        "batch_size": 8,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PART", 8)
        asked = beside_model(pipeline, out, seed=7, **more)
        return out, evaluate.run(replace(asked, export_npz=out / "npz", save_images=out / "zips"))


def test_the_exports_of_a_cell_have_its_distance_to_the_last_digit(
    exported: tuple[Path, Sweep], pipeline: Pipeline, tmp_path: Path, small_parts: None
) -> None:
    out, sweep = exported
    best = {f"{c.solver}-{c.grid}-nfe{c.nfe}": c for c in measured(sweep) if c.grid}
    best["baseline-nfe1"] = next(cell for cell in sweep.measurements if cell.baseline)
    assert len(best) == 3
    assert {path.name for path in (out / "npz").iterdir()} == {f"{name}.npz" for name in best}
    assert {path.name for path in (out / "zips").iterdir()} == {f"{name}.zip" for name in best}
    paths = [*(out / "npz").iterdir(), *(out / "zips").iterdir()]
    again = evaluate.run(images_task(pipeline, tmp_path / "again", *paths, n=20))
    found = {cell.solver.removeprefix("images: "): cell.distances for cell in measured(again)}
    assert found == {f"{name}{end}": cell.distances for name, cell in best.items() for end in (".npz", ".zip")}


def test_labels_are_those_the_seeds_were_sampled_with(exported: tuple[Path, Sweep]) -> None:
    (path,) = (exported[0] / "npz").glob("ddim*")
    counts = tuple(load_splits(DataConfig()).train.labels.bincount().tolist())
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], ClassDraw(counts).labels(torch.arange(7, 47)))


def test_a_solver_exports_its_chosen_grid_and_external_images_none(pipeline: Pipeline, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", np.zeros((20, 8, 8, 3), dtype=np.uint8) + np.arange(8, dtype=np.uint8)[:, None])
    asked = beside_model(pipeline, tmp_path / "out", tmp_path / "theirs.npz", grids="karras", n=5)
    evaluate.run(replace(asked, export_npz=tmp_path / "npz"))
    assert {path.stem for path in (tmp_path / "npz").iterdir()} == {"ddim-karras-nfe4"}
