"""Images that somebody else made: read as they are, or an error with the remedy, measured like our own, and resumed."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pipelines import Pipeline, Script
from sweeps import beside_model, images_task, measured, npz
from traps import Trap

from midway.gen.commands import evaluate
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.external import ReadingOptions, fitted, in_turn, read_all, read_external
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.load import load_model
from midway.gen.features.classifier import load_features
from midway.gen.sweep.comparisons import ImagesSource

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
Pixels = NDArray[np.uint8]


def noise(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def encoded(image: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, kind, **options)
    return buffer.getvalue()


def files(folder: Path, images: Pixels, name: Callable[[int], str] = "{:04d}.png".format) -> Path:
    for index, image in enumerate(images):
        path = folder / name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "JPEG" if path.suffix == ".jpg" else "PNG"))
    return folder


# ---- reading ----


def test_folder_zip_and_npz_of_the_same_pixels_are_the_same_images(tmp_path: Path) -> None:
    images = noise(7, 3)
    folder = files(tmp_path / "folder", images)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    paths = (folder, tmp_path / "some.zip", npz(tmp_path / "some.npz", images, arr_1=np.arange(7)))
    found = [read_external(path) for path in paths]
    for one in found:
        np.testing.assert_array_equal(one.pixels.permute(0, 2, 3, 1).numpy(), images)
        assert one.notes == ()
    assert len({one.fingerprint for one in found}) == 1
    converted = read_external(paths[2], ReadingOptions(channels=3, resize=8))
    assert converted.fingerprint == found[0].fingerprint, "through the decoder"
    other = images.copy()
    other[3, 2, 1, 0] ^= 1
    assert read_external(npz(tmp_path / "other.npz", other)).fingerprint != found[0].fingerprint


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (noise(4).astype(np.float32) / 255, r"127\.5"),
        (noise(4).astype(np.int64), r"uint8"),
        (noise(4, 3).transpose(0, 3, 1, 2), r"transpose\(0, 2, 3, 1\)"),
        (noise(4)[..., 0], r"\[\.\.\., None\]"),
        (noise(4, 4), "grey or RGB"),
        (noise(0), "N > 0"),
        (np.uint8(3), "one size"),
    ],
    ids=["float", "int64", "channels first", "no channels", "RGBA", "none", "scalar"],
)
def test_other_arrays_raise_with_the_remedy(array: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_external(npz(tmp_path / "a.npz", array))


def test_npz_that_cannot_be_read_raises_and_nothing_is_unpickled(tmp_path: Path) -> None:
    planted = np.empty(1, dtype=object)
    planted[0] = Trap(tmp_path / "ran")
    with pytest.raises(DataError, match="allow_pickle"):
        read_external(npz(tmp_path / "object.npz", planted))
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / "named.npz", samples=noise(4))
    with pytest.raises(DataError, match="arr_0"):
        read_external(tmp_path / "named.npz")
    whole = npz(tmp_path / "whole.npz", noise(20)).read_bytes()
    for number, data in enumerate((b"", whole[: len(whole) // 2], b"\x80\x04N.", whole[:300] + b"x" + whole[301:])):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{number}.npz"):
            read_external(path)


def test_files_that_cannot_be_used_raise(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        read_external(tmp_path / "empty")
    corrupt = files(tmp_path / "corrupt", noise(3))
    whole = encoded(noise(1, side=64)[0])
    (corrupt / "0001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"0001\.png"):
        read_external(corrupt)
    deep = files(tmp_path / "deep", noise(2))
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(deep / "0001.png")
    with pytest.raises(DataError, match="8-bit"):
        read_external(deep)
    mixed = files(tmp_path / "mixed", noise(2))
    files(mixed, noise(1, side=16), "b{}.png".format)
    with pytest.raises(DataError, match="differ in size"):
        read_external(mixed)
    with pytest.raises(DataError, match="does not exist"):
        read_external(tmp_path / "digits")


def test_bad_files_are_left_out_on_request(tmp_path: Path) -> None:
    folder = files(tmp_path / "some", noise(100))
    (folder / "0007.png").write_bytes(b"no image")
    found = read_external(folder, ReadingOptions(on_bad_image="skip"))
    assert len(found.pixels) == 99 and any("skipped" in note for note in found.notes)


def test_what_changes_pixels_is_noted(tmp_path: Path) -> None:
    folder = files(tmp_path / "some", noise(2, 3))
    (folder / "a.jpg").write_bytes(encoded(noise(1, 3)[0], "JPEG"))
    Image.fromarray(noise(1, 4)[0]).save(folder / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(1, 3)[0]).save(folder / "c.png", exif=exif)
    Image.fromarray(noise(1, 4)[0], mode="CMYK").save(folder / "d.tif")
    output = " ".join(read_external(folder).notes)
    assert all(word in output for word in ("alpha composited", "EXIF", "CMYK", "lossy samples"))
    assert "lossy" not in " ".join(read_external(files(tmp_path / "png", noise(2))).notes)
    small = read_external(files(tmp_path / "large", noise(2, side=16)), ReadingOptions(resize=8))
    assert small.pixels.shape == (2, 1, 8, 8) and "resized" in small.notes[0]


def test_class_folders_take_turns_and_numbered_folders_do_not(tmp_path: Path) -> None:
    assert in_turn(["a/0", "a/1", "a/2", "b/0", "c/0", "c/1"]) == ("a/0", "b/0", "c/0", "a/1", "c/1", "a/2")
    edm = [f"0000{index // 2}/img0000000{index}.png" for index in range(5)]
    assert in_turn(edm) == tuple(edm)
    images = noise(6)
    found = read_external(files(tmp_path / "classes", images, lambda index: f"{'ab'[index // 3]}/{index}.png"))
    np.testing.assert_array_equal(found.pixels[:, 0].numpy(), images[[0, 3, 1, 4, 2, 5], ..., 0])
    assert "take turns" in found.notes[0]


def test_names_are_those_of_files_or_whole_paths(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    paths = [files(one / "samples", noise(2)), files(two / "samples", noise(2)), npz(tmp_path / "x.npz", noise(2))]
    found = read_all(paths, ReadingOptions())
    assert list(found) == [str(paths[0]), str(paths[1]), "x.npz"] == [images.name for images in found.values()]
    with pytest.raises(UsageError, match="twice"):
        read_all([paths[0], one / ".." / "one" / "samples"], ReadingOptions())


# ---- against a reference ----


def test_rgb_that_is_grey_loses_nothing_and_any_other_raises(tmp_path: Path) -> None:
    grey, reference = noise(3), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    made = fitted(read_external(npz(tmp_path / "grey.npz", grey.repeat(3, axis=3))), reference)
    np.testing.assert_array_equal(made.pixels[:, 0].numpy(), grey[..., 0])
    for channel in range(3):
        coloured = grey.repeat(3, axis=3)
        coloured[1, 2, 3, channel] ^= 1
        with pytest.raises(DataError, match="--images-channels 1"):
            fitted(read_external(npz(tmp_path / "c.npz", coloured)), reference)
    converted = fitted(read_external(tmp_path / "c.npz", ReadingOptions(channels=1)), reference)
    assert converted.pixels.shape == (3, 1, 8, 8)
    with pytest.raises(DataError, match="--images-channels 3"):
        fitted(read_external(npz(tmp_path / "g.npz", grey)), reference.expand(-1, 3, -1, -1))
    with pytest.raises(DataError, match="--images-resize 8"):
        fitted(read_external(npz(tmp_path / "large.npz", noise(3, side=16))), reference)


# ---- measured ----


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """By the eigenvalues of the product of covariances, which the program does not use."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.real(np.sqrt(np.linalg.eigvals(s @ t).astype(complex))).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * roots)


def test_each_block_is_the_distance_of_consecutive_images(pipeline: Pipeline, tmp_path: Path) -> None:
    images = noise(61)
    path = npz(tmp_path / "samples.npz", images)
    sweep = evaluate.run(images_task(pipeline, tmp_path / "out", path, seed=5))
    network = load_features(Run.open(pipeline.features, "features").checkpoint / "features.safetensors")
    reference = network.features(load_splits(DataConfig()).train.images[:]).double().numpy()
    floor, cell = sweep.measurements
    assert (cell.solver, cell.nfe, cell.n, cell.blocks, cell.baseline) == ("images: samples.npz", 0, 30, 2, True)
    assert (floor.solver, floor.n) == ("floor", 30)
    seen = network.features(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    for block, distance in enumerate(cell.distances):
        assert distance == pytest.approx(frechet(seen[30 * block : 30 * block + 30], reference), rel=1e-6)
    output = (tmp_path / "out" / "report.md").read_text()
    assert f"(n = 30): {floor.distance:.3g}" in output.replace("\\", "")
    assert "images: samples.npz | – |" in output and "the first 60 of 61 images" in output
    assert "images: samples.npz" in (tmp_path / "out" / "report.html").read_text()


def test_several_sets_are_rows_of_the_same_count_and_nothing_is_measured_twice(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [npz(tmp_path / "a.npz", noise(40)), files(tmp_path / "b", noise(50, seed=1))]
    asked = images_task(pipeline, tmp_path / "out", *paths, blocks=1, baselines=(pipeline.baseline,))
    first = evaluate.run(asked)
    assert [c.solver for c in measured(first)] == ["baseline", "images: a.npz", "images: b"]
    assert {c.n for c in measured(first)} == {40}
    assert first.grids["images: a.npz", 0] != first.grids["images: b", 0]
    monkeypatch.setattr(ImagesSource, "sample", None)
    assert evaluate.run(asked).measurements == first.measurements
    npz(paths[0], noise(40, seed=2))
    with pytest.raises(TypeError):
        evaluate.run(asked)


def test_external_images_join_the_table_of_a_model(pipeline: Pipeline, tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", noise(45))
    sweep = evaluate.run(beside_model(pipeline, tmp_path / "out", path, seed=3))
    assert [(c.solver, c.nfe, c.n) for c in measured(sweep)] == [("ddim", 4, 20), ("images: a.npz", 0, 20)]
    alone = evaluate.run(images_task(pipeline, tmp_path / "alone", path, n=20))
    assert measured(alone)[0].distances == measured(sweep)[1].distances
    assert load_model(pipeline.model, torch.device("cpu")).data == DataConfig()
    with pytest.raises(DataError, match="45 images, 46"):
        evaluate.run(beside_model(pipeline, tmp_path / "more", path, n=23))
    assert not (tmp_path / "more").exists()


def test_the_command_measures_other_images_and_ends_with_3_for_what_does_not_compare(
    pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    """JPEG files of 16x16 RGB pixels, against 8x8 grey ones."""
    folder, out = files(tmp_path / "samples", noise(40, 3, side=16), "{}.jpg".format), tmp_path / "out"
    line = f"evaluate --data digits --features {pipeline.features} --out {out} --images {folder} --images-resize 8"
    done = script(*line.split())
    assert done.code == 3 and "--images-channels 1" in done.err
    done = succeed(f"{line} --images-channels 1 --blocks 1 --metrics", "")
    assert all(words in done.out for words in ("Floor, real images", "images: samples", "lossy"))
    record = json.loads((out / "results.jsonl").read_text().splitlines()[1])
    assert (record["solver"], record["nfe"], record["n"], record["blocks"]) == ("images: samples", 0, 40, 1)
    assert "lossy samples" in (out / "report.md").read_text()
    for flags in ("--n 41", "--held-out 0.3"):
        assert script(*f"{line} --images-channels 1 {flags}".split()).code == 3
