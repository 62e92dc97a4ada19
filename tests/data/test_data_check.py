"""`data.py check`: every fault is found and named, every figure equals a plain computation, and exit codes distinguish them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import PIXEL_LIMIT, UNDECODABLE, UNUSABLE, Fault, noise, save
from PIL import Image
from pipelines import Script

from midway.gen.commands import data as data_script
from midway.gen.core.errors import DataError, UsageError
from midway.gen.data import check as checks
from midway.gen.data import check_report
from midway.gen.data.check import DataFacts, check
from midway.gen.data.contents import examine
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig, split
from midway.gen.files.decoding import Decoded

OK, USAGE, DATA, DISK = 0, 2, 3, 5
FAULTS = UNDECODABLE + UNUSABLE


def good(folder: Path, count: int = 10) -> Path:
    """Two classes, `count` different RGB PNGs each, 6 x 4 (width x height)."""
    for index in range(2 * count):
        save(folder / ("cat", "dog")[index % 2] / f"{index:03}.png", noise(4, 6, 3, seed=index))
    return folder


def look(folder: Path, against: str | None = None, **options: Any) -> DataFacts:
    return check(DataConfig(data=str(folder), **options), against)


def warned(facts: DataFacts, *words: str) -> bool:
    return any(all(word in warning for word in words) for warning in facts.warnings)


# ---- bad files ----


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 179 million pixels are otherwise, 1000 are here: an error above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXEL_LIMIT)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_bad_files_are_listed_and_the_rest_is_measured(tmp_path: Path, script: Script):
    folder, out = good(tmp_path / "set"), tmp_path / "out"
    for fault in FAULTS:
        fault.make(folder / "cat" / fault.name)
    done = script("data", "check", folder, "--out", out)
    assert done.code == DATA
    lines = dict(line.split("\t") for line in (out / "bad_files.txt").read_text().splitlines())
    assert set(lines) == {f"cat/{fault.name}" for fault in FAULTS}
    for fault in FAULTS:
        name, reason = f"cat/{fault.name}", lines[f"cat/{fault.name}"]
        assert fault.word in reason and name not in reason
        assert f"bad          {name}: {reason}" in done.out
    facts = json.loads((out / "data.json").read_text())
    assert (facts["files"], facts["images"], facts["fingerprint"]) == (20 + len(FAULTS), 20, None)
    assert facts["classes"] == {"cat": 10, "dog": 10} and facts["sizes"] == {"6x4": 20}
    assert [problem["what"] for problem in facts["problems"]] == [
        f"{len(FAULTS)} of {20 + len(FAULTS)} images cannot be decoded or used",
    ]
    assert done.err.startswith(f"error: {folder} cannot be used") and "  fix: " in done.err
    assert facts["statistics"] == clean_statistics(tmp_path)


def clean_statistics(tmp_path: Path) -> Any:
    return json.loads(json.dumps([vars(one) for one in look(good(tmp_path / "clean")).statistics]))


@pytest.mark.usefixtures("small_limit")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_skip_is_a_warning_and_the_fingerprint_that_of_training(tmp_path: Path, script: Script, fault: Fault):
    good(tmp_path, 60)
    fault.make(tmp_path / "dog" / fault.name)
    done = script("data", "check", tmp_path, "--on-bad-image", "skip")
    assert done.code == OK and "1 image of 121 cannot be decoded" in done.out and f"dog/{fault.name}: " in done.out
    assert load_images(str(tmp_path), on_bad_image="skip").fingerprint in done.out
    assert script("data", "check", tmp_path).code == DATA
    with pytest.raises(DataError, match=fault.name):
        load_images(str(tmp_path))


def test_nothing_decodes(tmp_path: Path, script: Script):
    (tmp_path / "a.png").write_bytes(b"")
    done = script("data", "check", tmp_path)
    assert done.code == DATA and "0 images, none decoded" in done.out and "levels       none" in done.out


# ---- facts ----


def test_statistics_levels_and_fingerprint(tmp_path: Path):
    good(tmp_path)
    loaded = load_images(str(tmp_path))
    facts = look(tmp_path)
    levels = loaded.images[:].numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    floats = levels / 127.5 - 1
    for channel, of in enumerate(facts.statistics):
        expected = [f(x[channel]) for x in (floats, levels) for f in (np.mean, np.std)]
        assert [of.mean, of.std, of.mean_level, of.std_level] == pytest.approx(expected, rel=1e-12)
    assert (facts.fingerprint, facts.levels, facts.problems) == (loaded.fingerprint, 256, ())
    assert (facts.images, facts.files, facts.channels, facts.sizes) == (20, 20, {3: 20}, {"6x4": 20})


def test_sums_do_not_overflow():
    """The squares of an image of 255s exceed 32 bits beyond 66,051 pixels."""
    picture = examine(Decoded("white", np.full((400, 300), 255, np.uint8)))
    assert picture.sums == (120_000 * 255,) and picture.squares == (120_000 * 255**2,)
    (of,) = checks.channel_statistics([picture] * 3)
    assert (of.mean, of.std) == (1, 0) and picture.values == 1 << 255


def test_digits_by_name(script: Script):
    done = script("data", "check", "digits", "--against", "digits", "--held-out", "0.1", "--split-seed", 3)
    assert done.code == OK and load_images("digits").fingerprint in done.out and "levels       17\n" in done.out
    assert "1797 images (180 held out) with the pixels of an image in digits (digits[0] = digits[0]; " in done.out
    assert "174 to 183 images each" in done.out and "duplicates   0 images" in done.out


def test_options_are_those_of_training(tmp_path: Path):
    good(tmp_path)
    facts = look(tmp_path, channels=1, resize=3, held_out=0.3, split_seed=2)
    loaded = load_images(str(tmp_path), channels=1, resize=3)
    assert facts.fingerprint == loaded.fingerprint and facts.sizes == {"3x3": 20} and facts.channels == {1: 20}
    assert facts.split is not None and (facts.split.train, facts.split.held_out) == (14, 6)
    assert facts.statistics[0].mean_level == pytest.approx(float(loaded.images[:].double().mean()), rel=1e-12)
    assert {note.split(" ")[0] for note in facts.conversions} == {"RGB", "resized"}


def test_conversions_are_counted(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.jpg", noise(6, 4, 3), exif=exif)
    Image.new("CMYK", (6, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    save(tmp_path / "clear.png", np.full((4, 6, 4), 9, np.uint8))
    Image.new("P", (6, 4)).save(tmp_path / "palette.png")
    save(tmp_path / "grey.png", noise(4, 6))
    (tmp_path / "photo.dng").write_bytes(b"?")
    facts = look(tmp_path)
    assert facts.conversions == {
        "CMYK converted to RGB": 1,
        "EXIF rotation applied": 1,
        "alpha composited on white": 1,
        "grey promoted to RGB": 1,
        "lossy JPEG source": 2,
        "palette expanded to RGB": 1,
    }
    assert facts.conversions == {
        note: int(count.split(" ")[0])
        for count, note in (stated.split(": ", 1) for stated in load_images(str(tmp_path)).conversions)
    }
    assert facts.channels == {1: 1, 3: 4} and facts.sizes == {"6x4": 5}
    assert warned(facts, "lossy", "PNG") and warned(facts, ".dng (1)")
    levels = load_images(str(tmp_path)).images[:].double()
    assert [of.mean_level for of in facts.statistics] == pytest.approx(levels.mean((0, 2, 3)).tolist(), rel=1e-12)


# ---- sets that cannot be used ----


def test_mixed_sizes_state_the_remedy(tmp_path: Path, script: Script):
    save(good(tmp_path) / "dog" / "tall.png", noise(9, 5, 3))
    done = script("data", "check", tmp_path)
    assert done.code == DATA and "6x4 (20), 5x9 (1)" in done.out
    assert "pass --resize N" in done.err and "smallest side here is 4" in done.err and "Traceback" not in done.err
    done = script("data", "check", tmp_path, "--resize", 4)
    assert done.code == OK and "4x4 (21)" in done.out


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_a_split(tmp_path: Path, script: Script, count: int):
    for index in range(count):
        save(tmp_path / f"{index}.png", noise(4, 4, seed=index))
    done = script("data", "check", tmp_path, "--held-out", 0.5)
    assert done.code == DATA
    assert ("leaves one side of the split empty" if count == 1 else "side of the split has 1 image") in done.err
    assert load_images(str(tmp_path)).fingerprint in done.out  # it can be loaded, though not split


def test_both_sides_need_two(tmp_path: Path):
    for index in range(4):
        save(tmp_path / f"{index}.png", noise(4, 4, seed=index))
    assert look(tmp_path, held_out=0.5).problems == ()
    sides = [look(tmp_path, held_out=share).problems[0].what for share in (0.25, 0.75)]
    assert [what.split(" ")[1] for what in sides] == ["held-out", "training"]


def test_folders_that_are_no_classes_are_one_problem_beside_others(tmp_path: Path):
    save(good(tmp_path) / "loose.png", noise(5, 6, 3))
    facts = look(tmp_path)
    assert ["lie beside" in facts.problems[0].what, "differ in size" in facts.problems[1].what] == [True, True]
    assert facts.split is None and facts.fingerprint is None and facts.images == 21


# ---- the same pixels ----


def sides(folder: Path, seed: int = 0) -> tuple[list[str], list[str]]:
    """Names in the training and held-out side of `split`, found by the pixels of a set of different images."""
    names = {noise(4, 6, 3, seed=index).tobytes(): f"{('cat', 'dog')[index % 2]}/{index:03}.png" for index in range(20)}
    parts = split(load_images(str(folder)), 0.2, seed)
    train, held_out = [[names[i.permute(1, 2, 0).numpy().tobytes()] for i in part.images[:]] for part in parts]
    return train, held_out


def test_a_leak_between_the_sides_is_distinguished_from_copies_within_one(tmp_path: Path, script: Script):
    train, held_out = sides(good(tmp_path), seed=7)
    within, source = [name for name in train if name.startswith("cat")][:2]
    (tmp_path / within).write_bytes((tmp_path / source).read_bytes())
    facts = look(tmp_path, split_seed=7)
    assert facts.duplicates.groups == facts.duplicates.copies == 1 and facts.duplicates.first == ((within, source),)
    assert facts.split is not None and facts.split.leak.count == 0 and facts.other_label.groups == 0
    for leaked in held_out[:2]:
        (tmp_path / leaked).write_bytes((tmp_path / source).read_bytes())
    facts = look(tmp_path, split_seed=7)
    assert (facts.duplicates.groups, facts.duplicates.copies) == (1, 3)
    assert facts.split is not None and facts.split.leak.count == 2
    first = min(within, source)
    assert facts.split.leak.first == tuple((leaked, first) for leaked in sorted(held_out[:2]))
    assert warned(facts, "2 of 4 held-out images have the pixels of a training image", f"{held_out[0]} = {first}")
    assert script("data", "check", tmp_path).code == OK  # training accepts them: a warning


def test_same_pixels_with_another_label(tmp_path: Path):
    good(tmp_path)
    save(tmp_path / "dog" / "same.bmp", noise(4, 6, 3, seed=0))
    save(tmp_path / "cat" / "same.bmp", noise(4, 6, 3, seed=2))
    facts = look(tmp_path)
    assert (facts.duplicates.groups, facts.other_label.groups) == (2, 1)
    assert facts.other_label.first == (("cat/000.png", "dog/same.bmp"),)
    assert warned(facts, "1 picture has more than one label (cat/000.png = dog/same.bmp)")


def test_what_counts_as_the_same():
    def content(pixels: NDArray[np.uint8]) -> bytes:
        return examine(Decoded("any", pixels)).content

    grey, colour = noise(2, 4), noise(2, 4, 3)
    one_off = colour.copy()
    one_off[1, 3, 2] ^= 1
    assert content(grey) == content(np.stack([grey] * 3, 2)) == content(grey.copy())
    assert len({content(p) for p in (grey, grey.T, grey.reshape(4, 2), colour, one_off, colour[..., ::-1])}) == 6


def test_against_another_source(tmp_path: Path):
    _, held_out = sides(good(tmp_path / "a"))
    other = tmp_path / "b"
    save(other / "x.png", noise(4, 6, 3, seed=int(held_out[0][4:7])))
    save(other / "y.png", noise(4, 6, 3, seed=99))
    (other / "z.png").write_bytes(b"")
    facts = look(tmp_path / "a", str(other))
    found = facts.against
    assert found is not None and (found.images, found.bad, found.held_out) == (2, 1, 1)
    assert (found.shared.count, found.shared.first) == (1, ((held_out[0], "x.png"),)) and facts.problems == ()
    assert warned(facts, "1 image (1 held out) with the pixels of an image in") and warned(facts, "not compared")
    save(tmp_path / "c" / "x.png", noise(5, 5))
    assert warned(look(tmp_path / "a", str(tmp_path / "c")), "no size occurs in both", "--resize")
    resized = look(tmp_path / "a", str(tmp_path / "c"), resize=3)
    assert not warned(resized, "no size") and resized.against is not None and resized.against.sizes == {"3x3": 1}


# ---- warnings and files ----


def test_few_held_out_images_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    good(tmp_path)
    assert warned(look(tmp_path), "4 images held out", "bias-dominated")
    monkeypatch.setattr(checks, "FEW", 4)
    assert look(tmp_path).warnings == ()


def test_classes_on_one_side(tmp_path: Path):
    save(good(tmp_path) / "emu" / "0.png", noise(4, 6, 3, seed=50))
    assert warned(look(tmp_path, held_out=0.1), "one side of the split only (1): emu")


def test_classes_without_training_images(tmp_path: Path):
    """Only where no class has two; else each keeps one."""
    for index in range(10):
        save(tmp_path / str(index) / "0.png", noise(4, 6, 3, seed=index))
    facts = look(tmp_path, held_out=0.5)
    assert facts.split is not None and len(facts.split.untrained) == 5
    assert warned(
        facts, "classes without training images, which are not sampled (5): ", ", ".join(facts.split.untrained)
    )
    save(tmp_path / "0" / "1.png", noise(4, 6, 3, seed=99))
    assert not warned(look(tmp_path, held_out=0.5), "classes without training images")


def test_files_are_written_on_request_and_an_old_list_is_removed(tmp_path: Path, script: Script):
    folder, out = good(tmp_path / "set"), tmp_path / "new" / "out"
    before = sorted(tmp_path.rglob("*"))
    assert script("data", "check", folder).code == OK
    assert sorted(tmp_path.rglob("*")) == before
    (folder / "cat" / "zero.png").write_bytes(b"")
    assert f"written      {out / 'bad_files.txt'}" in script("data", "check", folder, "--out", out).out
    assert sorted(path.name for path in out.iterdir()) == ["bad_files.txt", "data.json"]
    (folder / "cat" / "zero.png").unlink()
    assert script("data", "check", folder, "--out", out).code == OK
    assert [path.name for path in out.iterdir()] == ["data.json"]
    assert json.loads((out / "data.json").read_text())["problems"] == []


def test_an_out_that_cannot_be_written(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = script("data", "check", "digits", "--out", out)
        assert done.code == DISK and "choose another --out" in done.err and done.out == ""  # before any decoding
    (tmp_path / "out" / "data.json").mkdir(parents=True)
    done = script("data", "check", "digits", "--out", tmp_path / "out")
    assert done.code == USAGE and [path.name for path in (tmp_path / "out").iterdir()] == ["data.json"]
    monkeypatch.setattr(check_report.os, "access", lambda path, mode: False)
    assert script("data", "check", "digits", "--out", tmp_path / "new").code == DISK and not (tmp_path / "new").exists()


def test_names_that_are_not_unicode(tmp_path: Path):
    facts = look(good(tmp_path / "set"))
    odd = replace(facts, bad=(checks.Undecodable("\udcff.png", "a\nb"),))
    check_report.write_data_report(tmp_path, odd)
    assert (tmp_path / "bad_files.txt").read_bytes() == b"\xff.png\ta b\n"
    assert "\\xff.png" in check_report.text(odd)


def test_names_of_any_kind_are_one_line_each(tmp_path: Path, script: Script):
    """In the terminal as in the description that training prints, and a line of bad_files.txt each."""
    folder = tmp_path / "a\nset"
    for number, name in enumerate(("new\nline", "tab\tstop", "\x1b[31mred", "\u202eleft", "byte\udcff")):
        for index in range(4):
            save(folder / name / f"{index}.png", noise(4, 6, 3, seed=10 * number + index))
        (folder / name / "bad\n.png").write_bytes(b"")
        (folder / f"{name}.txt").touch()
        (folder / f"{name} empty").mkdir()
    done = script("data", "check", folder, "--out", tmp_path / "out")
    heads = {line[:13].strip() for line in done.out.splitlines()}
    assert heads <= {
        "data",
        "sizes",
        "classes",
        "levels",
        "fingerprint",
        "duplicates",
        "split",
        "bad",
        "warning",
        "problem",
    } | {*("written", *(f"channel {number}" for number in range(3)))}
    assert not set("\x1b\u202e\t") & set(done.out)
    assert all(name in done.out for name in (r"new\nline", r"tab\tstop", r"\x1b[31mred", r"\u202eleft", r"byte\xff"))
    lines = (tmp_path / "out" / "bad_files.txt").read_bytes().splitlines()
    assert len(lines) == 5 and all(line.count(b"\t") == 1 for line in lines)


def test_help_and_every_flag(script: Script, tmp_path: Path):
    assert "check" in script("data").out and script("data", "--help").code == OK
    done = script("data", "check", "--help")
    flags = ("against", "held-out", "split-seed", "channels", "resize", "on-bad-image", "download", "out")
    assert done.code == OK and all(f"--{flag} " in done.out or f"--{flag}," in done.out for flag in flags)
    assert "%%" not in done.out
    done = script("data", "check", good(tmp_path), "--channels", 3, "--resize", 4, "--download", "--held-out", "0.4")
    assert done.code == OK and "12 training, 8 held out" in done.out
    with pytest.raises(UsageError):
        data_script.run(data_script.CheckTask("digits", held_out=1.0))
