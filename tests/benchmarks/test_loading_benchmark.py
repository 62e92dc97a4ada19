"""benchmarks/loading.py: all sides do the same work; what is judged, printed and written. No test looks at a time."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_modules import as_before, benchmark, run_main

from midway.gen.files.file_set import open_files

pytest.importorskip("torchvision", reason="the peer that the loader is measured beside")

SMALL = {
    "images": 8,
    "side": 16,
    "small": 8,
    "batch": 4,
    "turns": 2,
    "steps": 4,
    "training_batch": 8,
    "training_turns": 2,
}


@pytest.fixture(scope="module")
def loading() -> ModuleType:
    return benchmark("loading")


@pytest.mark.slow
def test_every_row_is_there_printed_and_judged(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "UNTIMED_TURNS", 0)
    flags = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = run_main(loading, tmp_path / "made" / "loading.json", *flags, "--width", 8, "--workers", 1, 2)
    reading = [
        f"{side}x{side} JPEG, {name}"
        for side in (16, 8)
        for name in (
            *("1 worker(s)", "1 worker(s)", "2 worker(s)", "2 worker(s)"),
            *("decoding alone, 2 workers", "ImageFolder, 2 workers"),
        )
    ]
    locks = [f"{side}x{side} JPEG, holding the interpreter lock" for side in (8, 16)]
    training = [f"training from {what}, {count} worker(s)" for what in ("image files", "records") for count in (1, 2)]
    rows = done.json["rows"]
    assert [row["name"] for row in rows] == reading + locks + training
    targets = [0.9, 1.0, 0.9, 1.0, *[None] * 10, *[0.95] * 4]
    assert [row["target"] for row in rows] == ["" if t is None else f"peer / ours >= {t:g}" for t in targets]
    assert done.code == int(any(row["held"] is False for row in rows))
    for row, line in zip(rows, done.lines[1:], strict=False):
        assert line.startswith(row["name"]) and row["turns"] == 2
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert all(row["ratio"] > 1 for row in rows if row["name"] in locks)
    assert done.json["sizes"] == {**SMALL, "width": 8}


def test_a_ratio_is_the_median_of_the_turns(loading: ModuleType) -> None:
    """Of 2 images in 4, 5 and 10 seconds, beside 2, 5 and 8: ratios 0.5, 1 and 0.8."""
    for least, held in ((0.8, True), (0.81, False), (None, None)):
        row = loading.row("a", [4.0, 5.0, 10.0], "b", [2.0, 5.0, 8.0], 2, least)
        assert (row.ours, row.peer, row.ratio, row.quartiles, row.held) == (2500.0, 2500.0, 0.8, (0.65, 0.9), held)


def test_the_untimed_turn_is_left_out(loading: ModuleType) -> None:
    times: Callable[[float], Callable[[], float]] = lambda start: iter([start, 1.0, 2.0]).__next__  # noqa: E731
    assert loading.take_turns({"a": times(9.0), "b": times(8.0)}, 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_all_sides_decode_every_file_once_to_the_same_pixels(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.write_images(tmp_path, 8, 16)
    decoded, pixels = list[str](), loading.pixels
    monkeypatch.setattr(loading, "pixels", lambda name, read: decoded.append(Path(name).name) or pixels(name, read))
    with as_before(), open_files(tmp_path) as files:
        batch = loading.read_batch(files, 16, torch.arange(8)).images
        assert batch.shape == (8, 3, 16, 16) and batch.is_contiguous()
        assert torch.equal(batch, torch.stack([loading.file_of(str(tmp_path / name)) for name in files.names]))
        decoded.clear()
        loading.decoding_alone(files, 2, 4)
        assert sorted(decoded) == sorted(Path(name).name for name in files.names)
        decoded.clear()
        with loading.reading_sides(tmp_path, 16, [0], 4) as sides:
            sides["the loader 0"]()
        assert sorted(decoded) == sorted(Path(name).name for name in files.names)
