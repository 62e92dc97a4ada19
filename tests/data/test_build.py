"""Built sets: the images of their source bit for bit, the same bytes after a kill, and a named error for whatever is wrong."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import noise, save, truncated_jpeg
from PIL import Image

from midway.gen.commands import data as data_script
from midway.gen.core import files as core_files
from midway.gen.core.errors import DataError, DiskError, MidwayError, UsageError
from midway.gen.data.build import build
from midway.gen.data.check import check
from midway.gen.data.images import ImageData, load_images
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.data.stored import StoredImages
from midway.gen.files import decoding
from midway.gen.files.records import is_records
from midway.gen.progress import bar


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images of 8 x 8 x 3 a shard."""
    monkeypatch.setattr("midway.gen.files.record_writer.SHARD_BYTES", 1920)


def source(folder: Path, count: int = 35, grey: int = 0, size: int = 8) -> Path:
    """A folder of PNGs in three classes, of which the first `grey` are grey."""
    for index in range(count):
        shape = (size, size) if index < grey else (size, size, 3)
        save(folder / f"class{index % 3}" / f"{index:03}.png", noise(*shape, seed=index))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_same(mine: ImageData, theirs: ImageData) -> None:
    assert isinstance(mine.images, StoredImages) and not isinstance(theirs.images, StoredImages)
    assert torch.equal(mine.images[:], theirs.images[:]) and torch.equal(mine.labels, theirs.labels)
    for name in ("classes", "name", "fingerprint", "conversions", "left_out"):
        assert getattr(mine, name) == getattr(theirs, name), name


# ---- the same images ----


@pytest.mark.parametrize("keep_encoded", [False, True])
@pytest.mark.parametrize(("channels", "resize"), [(None, None), (1, None), (3, 5)])
def test_a_built_set_is_its_source(
    keep_encoded: bool, channels: int | None, resize: int | None, tmp_path: Path
) -> None:
    folder = source(tmp_path / "animals", grey=14)  # RGB comes in the second shard: grey becomes RGB everywhere
    (folder / "notes.txt").write_text("x")
    config, out = DataConfig(str(folder), channels=channels, resize=resize), tmp_path / "out"
    assert build(config, out, keep_encoded, workers=2)
    options: dict[str, Any] = {"channels": channels, "resize": resize}
    assert_same(load_images(str(out)), load_images(str(folder), **options))
    recorded = (tmp_path / "out" / "fingerprints.json").exists()
    mine, theirs = load_splits(DataConfig(str(out))), load_splits(config)
    assert not recorded and not (out / "fingerprints.json").exists()  # both sides were hashed in the build
    assert_same(mine.train, theirs.train)
    assert_same(mine.held_out, theirs.held_out)
    lines = [json.loads(line) for line in (out / "names.jsonl").read_text().splitlines()]
    assert lines == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert len(list(out.glob("records-*.npy"))) > 1


def test_a_named_source_and_a_zip_are_built(tmp_path: Path) -> None:
    build(DataConfig("digits"), tmp_path / "digits")
    assert_same(load_images(str(tmp_path / "digits")), load_images("digits"))
    with pytest.raises(UsageError, match="keep-encoded"):
        build(DataConfig("digits"), tmp_path / "encoded", keep_encoded=True)
    folder = source(tmp_path / "animals", 7)
    with zipfile.ZipFile(tmp_path / "animals.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    for name in ("animals", "animals.zip"):
        build(DataConfig(str(tmp_path / name)), tmp_path / f"out-{name}")
    assert content(tmp_path / "out-animals") == content(tmp_path / "out-animals.zip")


def test_another_split_is_hashed_once_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    build(DataConfig(str(folder), held_out=0.3), out)
    for config in (DataConfig(str(out), held_out=0.3), DataConfig(str(out), split_seed=5)):
        own = load_splits(replace(config, data=str(folder)))
        capsys.readouterr()
        for turn in range(2):
            found = load_splits(config)
            assert found.train.fingerprint == own.train.fingerprint
            assert found.held_out.fingerprint == own.held_out.fingerprint
            passes = capsys.readouterr().out.count("one pass over them")
            assert passes == (2 if config.split_seed and not turn else 0)
    recorded = json.loads((out / "fingerprints.json").read_text())
    assert len(recorded["fingerprints"]) == 2
    (out / "fingerprints.json").write_text(json.dumps(recorded | {"manifest": "of another build"}))
    load_splits(DataConfig(str(out), split_seed=5))
    assert capsys.readouterr().out.count("one pass over them") == 2


def test_another_decoder_gives_no_recorded_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are decoded as they are read, so their pixels are hashed again."""
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    build(DataConfig(str(folder)), out, keep_encoded=True)
    monkeypatch.setattr("midway.gen.data.stored.decoder_versions", lambda: {"Pillow": "99"})
    assert_same(load_images(str(out)), load_images(str(folder)))
    assert len(json.loads((out / "fingerprints.json").read_text())["fingerprints"]) == 1


def test_options_of_a_built_set(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    build(DataConfig(str(folder), resize=6), out)
    fitting: list[dict[str, Any]] = [{}, {"resize": 6}, {"channels": 3}]
    other: list[dict[str, Any]] = [{"resize": 8}, {"channels": 1}]
    for options in fitting:
        assert load_images(str(out), **options).images.shape == (35, 3, 6, 6)
    for options in other:
        with pytest.raises(UsageError, match=r"do not fit[\s\S]*6x6 with 3 channels[\s\S]*data build"):
            load_images(str(out), **options)


# ---- going on ----


def _killed(k: int, work: Callable[[], object]) -> bool:
    """Whether `work` in a process of its own is killed by its k-th write to the disk."""
    child = os.fork()
    if child == 0:
        calls = 0
        sync = core_files.sync

        def killing(path: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == k:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        core_files.sync = killing
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("keep_encoded", [False, True])
def test_a_build_that_was_killed_goes_on_with_the_same_bytes(keep_encoded: bool, tmp_path: Path) -> None:
    folder, whole = source(tmp_path / "animals", 14, grey=12), tmp_path / "whole"
    config, k = DataConfig(str(folder)), 0
    build(config, whole, keep_encoded, workers=1)
    while True:
        k += 1
        out = tmp_path / f"killed-{k}"
        if not _killed(k, lambda out=out: build(config, out, keep_encoded, workers=1)):
            break
        if not is_records(out):
            with pytest.raises(DataError, match=r"unfinished|no images"):
                load_images(str(out))
        before = {
            path: path.stat().st_mtime_ns for path in out.glob("records-*.npy") if (Path(f"{path}.index")).exists()
        }
        build(config, out, keep_encoded, workers=2)
        assert content(out) == content(whole), k
        if keep_encoded:  # shards of pixels are written again when the first RGB image comes
            assert all(path.stat().st_mtime_ns == then for path, then in before.items())
        shutil.rmtree(out)
    assert k > 14
    assert content(out) == content(whole)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source, and a build of it that had space for two shards."""
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    with monkeypatch.context() as patch:
        fill_up(patch, after=2)
        with pytest.raises(DiskError, match=r"records-00002.npy[\s\S]*No space left[\s\S]*goes on where it stopped"):
            build(DataConfig(str(folder)), out)
    return folder, out


def fill_up(patch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full after so many shards."""
    sync = core_files.sync

    def full(path: Path) -> None:
        if f"records-{after:05}.npy." in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    patch.setattr(core_files, "sync", full)


def test_a_full_disk_leaves_whole_shards_and_nothing_that_is_read(begun: tuple[Path, Path]) -> None:
    folder, out = begun
    assert {path.name for path in out.iterdir()} == {
        *(".lock", "unfinished-build.json", "records-00000.npy", "records-00000.npy.index"),
        *("records-00001.npy", "records-00001.npy.index"),
    }
    with pytest.raises(DataError, match=r"unfinished set[\s\S]*run the same build again"):
        load_images(str(out))
    build(DataConfig(str(folder)), out)
    assert_same(load_images(str(out)), load_images(str(folder)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: save(folder / "class0" / "0000.png", noise(8, 8, 3)), "the names of the files"),
        (lambda folder: save(folder / "class0" / "000.png", noise(8, 8)), "the sizes of the files"),
        (lambda folder: (folder / "class2").rename(folder / "class3"), "the names of the classes"),
        (lambda folder: {"resize": 4}, "--resize"),
        (lambda folder: {"channels": 1}, "--channels"),
    ],
)
def test_another_plan_does_not_go_on(change: Callable[[Path], Any], word: str, begun: tuple[Path, Path]) -> None:
    folder, out = begun
    found = change(folder)
    config = DataConfig(str(folder), **(found if isinstance(found, dict) else {}))
    with pytest.raises(UsageError, match=rf"beginning of another set[\s\S]*{word}[\s\S]*--overwrite"):
        build(config, out)
    build(config, out, overwrite=True)
    assert (
        load_images(str(out)).fingerprint
        == load_images(str(folder), channels=config.channels, resize=config.resize).fingerprint
    )


def test_a_finished_set_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    assert build(DataConfig(str(folder)), out) and not build(DataConfig(str(folder)), out)
    monkeypatch.setattr("midway.gen.data.build_source.decoder_versions", lambda: {"Pillow": "99"})
    with pytest.raises(UsageError, match=r"already holds another set[\s\S]*versions of the decoders"):
        build(DataConfig(str(folder)), out)
    assert build(DataConfig(str(folder)), out, overwrite=True)


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    folder = source(tmp_path / "animals", 5)
    before = content(folder / "class0")
    with pytest.raises(UsageError, match=r"no set of images[\s\S]*class0"):
        build(DataConfig(str(folder)), folder, overwrite=True)
    assert content(folder / "class0") == before


# ---- sources that cannot be used ----


def refusal(folder: Path, out: Path, **options: Any) -> MidwayError:
    """The error of the build, which is that of reading in memory too."""
    with pytest.raises(MidwayError) as in_memory:
        load_images(str(folder), **options)
    with pytest.raises(MidwayError) as found:
        build(DataConfig(str(folder), **options), out)
    assert type(found.value) is type(in_memory.value)
    assert not is_records(out)
    return found.value


def test_images_of_several_sizes(tmp_path: Path) -> None:
    folder = source(tmp_path / "animals", 12)
    save(folder / "class0" / "zzz.png", noise(6, 9, 3))
    found = refusal(folder, tmp_path / "out")
    assert "images differ in size" in found.what and "zzz.png is 9x6" in found.what and "--resize N" in found.fix
    build(DataConfig(str(folder), resize=6), tmp_path / "out", overwrite=True)
    assert_same(load_images(str(tmp_path / "out")), load_images(str(folder), resize=6))


def test_no_images_and_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images" in refusal(tmp_path / "empty", tmp_path / "out").what
    assert not (tmp_path / "out").exists()
    build(DataConfig(str(source(tmp_path / "one", 1))), tmp_path / "out")
    assert_same(load_images(str(tmp_path / "out")), load_images(str(tmp_path / "one")))
    with pytest.raises(DataError, match="leaves one side of the split empty"):
        load_splits(DataConfig(str(tmp_path / "out")))


@pytest.mark.parametrize("keep_encoded", [False, True])
def test_bad_images(keep_encoded: bool, tmp_path: Path) -> None:
    folder, out = source(tmp_path / "animals", 120), tmp_path / "out"
    truncated_jpeg(folder / "class1" / "050.jpg")
    found = refusal(folder, out)
    assert (
        "1 of 121 images cannot be decoded" in found.what and "050.jpg" in found.why and "--on-bad-image" in found.fix
    )
    skip = DataConfig(str(folder), on_bad_image="skip")
    build(skip, out, keep_encoded, overwrite=keep_encoded)
    theirs = load_splits(skip)
    assert_same(load_images(str(out)), load_images(str(folder), on_bad_image="skip"))
    assert_same(load_splits(DataConfig(str(out))).held_out, theirs.held_out)
    assert any("skipped" in line for line in theirs.train.conversions)
    assert "050.jpg" not in (out / "names.jsonl").read_text()
    truncated_jpeg(folder / "class1" / "051.jpg")
    assert "2 of 122" in refusal(folder, tmp_path / "more", on_bad_image="skip").what  # above 1 %


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    truncated_jpeg(tmp_path / "bad" / "0.jpg")
    assert "cannot be decoded" in refusal(tmp_path / "bad", tmp_path / "out").what


def test_a_list_with_labels_of_no_class(tmp_path: Path) -> None:
    folder = source(tmp_path / "animals", 3)
    for label in (None, True, 1.5, ""):
        labels = [[path.relative_to(folder).as_posix(), label] for path in folder.rglob("*.png")]
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        refusal(folder, tmp_path / "out")


def test_too_little_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "animals")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskError, match=r"the images need 0 MB[\s\S]*free disk space"):
        build(DataConfig(str(folder)), tmp_path / "out")


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = source(tmp_path / "animals", 8, size=16), tmp_path / "out"
    line = [
        str(folder),
        "--out",
        str(out),
        "--resize",
        "8",
        "--channels",
        "1",
        "--keep-encoded",
        "--workers",
        "2",
    ]
    data_script.build_command([*line, "--held-out", "0.5", "--split-seed", "3", "--on-bad-image", "skip"])
    assert f"built        {out}" in capsys.readouterr().out
    data_script.build_command(line)
    assert f"was there    {out}" in capsys.readouterr().out
    load_splits(DataConfig(str(out), held_out=0.5, split_seed=3))
    assert "one pass" not in capsys.readouterr().out
    data_script.build_command([str(folder), "--out", str(out), "--overwrite", "--workers", "auto"])
    assert load_images(str(out)).images.shape == (8, 3, 16, 16)
    with pytest.raises(UsageError, match="workers is 0"):
        data_script.build_command([*line, "--workers", "0"])


def test_a_progress_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("FIRST", "SHARE", "LONGEST"):
        monkeypatch.setattr(bar, name, 0.0)
    data_script.build_command([str(source(tmp_path / "animals")), "--out", str(tmp_path / "out")])
    assert re.search(r"reading \d+ of 35 images", capsys.readouterr().out)


def test_decoders_are_named() -> None:
    assert decoding.decoder_versions()["Pillow"] == Image.__version__


# ---- the check ----


@pytest.mark.parametrize("keep_encoded", [False, True])
def test_the_check_of_a_built_set_is_that_of_its_source(keep_encoded: bool, tmp_path: Path) -> None:
    folder, out = source(tmp_path / "animals", 60, grey=14), tmp_path / "out"
    shutil.copy(folder / "class0" / "030.png", folder / "class1" / "030.png")  # RGB; grey is RGB in the built set
    build(DataConfig(str(folder)), out, keep_encoded)
    mine, theirs = check(DataConfig(str(out)), full=True), check(DataConfig(str(folder)))
    assert mine.fingerprint == theirs.fingerprint == load_images(str(folder)).fingerprint
    assert replace(mine, options={}, channels={}) == replace(theirs, options={}, channels={})
    assert mine.duplicates.first == (("class0/030.png", "class1/030.png"),) and mine.conversions


def test_the_check_finds_a_changed_shard(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "animals"), tmp_path / "out"
    build(DataConfig(str(folder)), out)
    path = out / "records-00001.npy"
    whole = bytearray(path.read_bytes())
    for place in (20, 200):  # in the header, which has no checksum of its own, and in an image
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"records-00001.npy has changed"):
            check(DataConfig(str(out)), full=True)
    with pytest.raises(DataError, match=r"records-00001.npy has changed[\s\S]*record 10"):
        check(DataConfig(str(out)))
    with pytest.raises(UsageError, match="no built set"):
        check(DataConfig(str(folder)), full=True)


def test_the_check_holds_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fingerprint is that of training, without the function that reads all images into memory."""
    folder = source(tmp_path / "animals", 60, grey=14)
    wanted = load_images(str(folder)).fingerprint
    monkeypatch.setattr("midway.gen.data.images.stack", None)
    assert check(DataConfig(str(folder))).fingerprint == wanted
