"""A named source and a folder of its name: an error where it is written, the named source where it is recorded."""

from pathlib import Path

import numpy as np
import pytest
from pictures import noise, save
from pipelines import Pipeline, Script

from midway.gen.core.errors import UsageError
from midway.gen.data.images import describe, load_images
from midway.gen.data.splits import DataConfig, load, load_splits
from midway.gen.features.open import check_feature_names

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
USAGE = 2


@pytest.fixture
def beside_a_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a folder `digits` of two classes of 8 x 8 images."""
    for index in range(40):
        save(tmp_path / "here" / "digits" / "ab"[index % 2] / f"{index}.png", noise(8, 8, seed=index))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_name_is_ambiguous_where_a_folder_has_it(beside_a_namesake: Path) -> None:
    with pytest.raises(UsageError, match="digits is ambiguous") as caught:
        load_images("digits")
    assert (
        "./digits" in caught.value.fix and "rename" in caught.value.fix and str(beside_a_namesake) in caught.value.why
    )
    assert load_images("./digits").classes == ("a", "b") == load_images(str(beside_a_namesake / "digits")).classes


def test_a_recorded_name_is_the_named_source(beside_a_namesake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(DataConfig())
    assert len(data.images) == 1797 and data.left_out == ("./digits, since digits is a named source",)
    assert "left out     ./digits" in describe(load_splits(DataConfig()).train)
    monkeypatch.chdir(beside_a_namesake.parent)
    assert load_images("digits").fingerprint == data.fingerprint and load_images("digits").left_out == ()


def test_a_file_that_is_no_zip_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("notes")
    assert len(load_images("digits").images) == 1797
    np.savez("digits.npz", np.zeros(1))
    Path("digits.npz").replace("digits")
    with pytest.raises(UsageError, match="ambiguous"):
        load_images("digits")


@pytest.mark.parametrize(
    "line",
    [
        "train_tokenizer digits-fsq --steps 1 --data digits --out {out}",
        "train_tokenizer digits-fsq --steps 1 --data=digits --out {out}",
        "train_features --data digits --out {out}",
        "train_baseline digits-vae --data digits --out {out}",
        "evaluate --data digits --features {features} --images ./digits --out {out}",
        "evaluate_tokenizer --tokenizers {tokenizer} --data digits --features none --out {out}",
        "data check digits",
        "data check ./digits --against digits",
        "encode --tokenizer {tokenizer} --data-path digits --out {out}",
    ],
)
def test_commands_raise_for_an_ambiguous_name(
    beside_a_namesake: Path, pipeline: Pipeline, script: Script, line: str
) -> None:
    out = beside_a_namesake / "out"
    done = script(*line.format(out=out, features=pipeline.features, tokenizer=pipeline.tokenizer).split())
    assert done.code == USAGE and "ambiguous" in done.err and "./digits" in done.err and not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --data digits --features pixels,inception --images x --out {out}",
        "check_metric --data ./photos --features=inception --out {out}",
        "train_latent digits-dit --tokenizer {tokenizer} --measure-every 1 --early.features inception --out {out}",
    ],
)
def test_a_network_and_a_run_of_its_name_are_ambiguous(
    line: str, pipeline: Pipeline, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no run is not meant; the run can be named by a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception").mkdir()
    check_feature_names("inception")
    (tmp_path / "inception/config.yaml").write_text((pipeline.features / "config.yaml").read_text())
    done = script(*line.format(out="out", tokenizer=pipeline.tokenizer).split())
    assert done.code == USAGE and "the feature space inception is ambiguous" in done.err
    assert "write ./inception" in done.err and str(tmp_path / "inception") in done.err and not Path("out").exists()
    check_feature_names("./inception,pixels")


def test_recipes_and_runs_keep_their_named_source(
    beside_a_namesake: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """A recipe, a recorded configuration, and evaluations of runs; the folder can be named by its path."""
    tiny = "--steps 1 --batch-size 8 --model.width 16 --ema 0"
    for start in ("digits-fsq", f"--config {pipeline.tokenizer}/config.yaml"):
        done = succeed(f"train_tokenizer {start} {tiny} --overwrite --out {tmp_path / 'run'}")
        assert "1438 images" in done.out and "left out     ./digits" in done.out
    done = succeed(f"train_tokenizer digits-fsq {tiny} --data ./digits --out {tmp_path / 'folder'}")
    assert "32 images" in done.out
    done = succeed(
        f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} --features none --n 20 --out {tmp_path / 'r'}"
    )
    assert "digits-heldout" in (tmp_path / "r" / "report.md").read_text()
    succeed(f"data check {beside_a_namesake}/digits")


# ---- tokenizers on other images ----


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Two classes of 20 images, 8 x 8, grey."""
    for index in range(40):
        save(tmp_path / "other" / "ab"[index % 2] / f"{index}.png", noise(8, 8, seed=index))
    return tmp_path / "other"


def test_tokenizers_are_measured_on_another_source(
    other: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """By the plain computation, on the held-out side of that source."""
    from midway.gen.diffusion.load import load_tokenizer
    from midway.gen.tokenizer.objective import evaluate_tokenizer

    call = f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} --data {other} --held-out 0.5 --noise 0"
    call = f"{call} --out {tmp_path / 'out'}"
    done = succeed(f"{call} --features none")
    held_out = load_splits(DataConfig(str(other), held_out=0.5)).held_out
    quality = evaluate_tokenizer(load_tokenizer(pipeline.tokenizer)[0], held_out.images)
    row = (tmp_path / "out" / "results.csv").read_text().splitlines()[1]
    assert f"other-heldout@{held_out.fingerprint[:12]}" in row and f"{quality['psnr']:.4f}"[:6] in row
    assert f"Measured on {other.name}; trained: tokenizer on digits." in done.out
    assert "trained: tokenizer on digits" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    succeed(f"train_features --data {other} --held-out 0.5 --steps 1 --width 8 --dim 4 --out {tmp_path / 'features'}")
    done = succeed(f"{call} --features {tmp_path / 'features'}")
    assert "other-train@" in (tmp_path / "out" / "results.csv").read_text()


def test_tokenizers_of_different_images_can_be_compared_on_others(
    other: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    tiny = "--steps 1 --batch-size 8 --model.width 16 --ema 0 --model.downsample 4"
    succeed(f"train_tokenizer digits-fsq {tiny} --held-out 0.4 --out {tmp_path / 'second'}")
    call = f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} {tmp_path / 'second'} --features none --noise 0"
    succeed(f"{call} --data {other} --held-out 0.5")
    assert (pipeline.tokenizer.parent / "tokenizer-report-other" / "report.md").exists()
    no_text = other.rename(other.with_name("byte\udcff"))  # which no folder is named after
    succeed(f"{call} --held-out 0.5 --data", no_text)
    assert (pipeline.tokenizer.parent / r"tokenizer-report-byte\xff" / "report.md").exists()


def test_one_folder_by_two_names_is_one_source(
    other: Path, pipeline: Pipeline, succeed: Script, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a feature network and a tokenizer, and of --data."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(other)
    steps = "--steps 1 --batch-size 8 --ema 0"
    succeed(f"train_features --data other {steps} --width 8 --dim 4 --out features")
    succeed(f"train_tokenizer digits-fsq --data ./other {steps} --model.width 8 --out tokenizer")
    for data in ("", f"--data {other}", "--data link"):
        succeed(f"evaluate_tokenizer --tokenizers tokenizer --features features --noise 0 {data} --out report")
    call = "evaluate_tokenizer --tokenizers tokenizer --features features --data digits --out report"
    done = script(*call.split())
    assert done.code == 3
    split = "--held-out 0.2 --split-seed 0"
    assert f"its data are --data {Path('other').absolute()} {split}, the others are --data digits {split}" in done.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--data {large}", 3, ("takes (1, 8, 8) images", "--data gives (3, 12, 12)", "--channels 1 --resize 8")),
        ("--data digits --held-out 0.4", 2, ("of another split", "--held-out 0.2")),
        ("--data digits --split-seed 3", 2, ("of another split", "--split-seed 0")),
        ("--held-out 0.3", 2, ("--data is not given", "drop")),
        ("--resize 8", 2, ("--data is not given", "drop")),
        ("--data nowhere/at/all", 3, ("does not exist",)),
        ("--data {other} --held-out 0.5 --features {features}", 3, ("trained on other images than --data",)),
    ],
)
def test_images_that_do_not_fit_raise(
    other: Path, pipeline: Pipeline, script: Script, tmp_path: Path, flags: str, code: int, words: tuple[str, ...]
) -> None:
    for index in range(10):
        save(tmp_path / "large" / "ab"[index % 2] / f"{index}.png", noise(12, 12, 3, seed=index))
    places = {"other": other, "large": tmp_path / "large", "features": pipeline.features}
    out, call = tmp_path / "out", flags.format_map(places)
    call += "" if "--features" in call else " --features none"
    done = script(*f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} --out {out} {call}".split())
    assert done.code == code and all(word in done.err for word in words), done.err
    assert not out.exists()


def test_the_same_split_of_the_same_source_is_the_tokenizers_own(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    call = f"evaluate_tokenizer --tokenizers {pipeline.tokenizer} --features none --n 20 --noise 0 --out"
    rows = []
    for number, flags in enumerate(("", "--data digits", "--data digits --resize 8 --channels 1")):
        succeed(f"{call} {tmp_path / str(number)} {flags}")
        rows.append((tmp_path / str(number) / "results.csv").read_text().splitlines()[1].split(",")[:10])
    assert rows[0] == rows[1] == rows[2]


# ---- images that are others than in training ----


def test_images_that_changed_since_training_are_a_warning(
    other: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """Of the tokenizer, of a model of its latents, and of a baseline; none while nothing changed."""
    steps = "--steps 1 --batch-size 8 --ema 0"
    tokenizer, model, features, vae = (tmp_path / name for name in ("tokenizer", "model", "features", "vae"))
    succeed(f"train_tokenizer digits-fsq --data {other} {steps} --model.width 8 --out {tokenizer}")
    succeed(
        f"train_latent digits-dit --tokenizer {tokenizer} {steps} --model.dit.width 16 --model.dit.depth 1 --out {model}"
    )
    succeed(f"train_features --data {other} {steps} --width 8 --dim 4 --out {features}")
    succeed(f"train_baseline digits-vae --data {other} {steps} --validate-every 0 --patience-validations 0 --out {vae}")
    calls = {
        f"evaluate_tokenizer --tokenizers {tokenizer} --features none --noise 0 --out {tmp_path / 't'}": tmp_path / "t",
        f"evaluate_tokenizer --tokenizers {tokenizer} --data {other} --features none --noise 0 --out {tmp_path / 'n'}": (
            tmp_path / "n"
        ),
        f"evaluate --model {model} --features {features} --solvers ddim --nfe 4 --grids uniform --n 8 --blocks 1 --metrics= "
        "--exact-nfe 0": model / "report",
        f"evaluate_likelihood --models {vae} --features none --n 8 --iwae 0 --draws 1 --out {tmp_path / 'l'}": tmp_path
        / "l",
    }
    for call in calls:
        assert "was trained on other images" not in succeed(call).out
    save(other / "a" / "new.png", noise(8, 8, seed=99))
    for call, out in calls.items():
        assert "was trained on other images than other-train now has" in succeed(call).out
        assert "was trained on other images" in (out / "report.md").read_text()


def test_samples_name_the_classes(pipeline: Pipeline, succeed: Script, script: Script, tmp_path: Path) -> None:
    call = f"sample --model {pipeline.model} --n 2 --nfe 4 --grid uniform --out {tmp_path / 'grid.png'}"
    assert "classes: 0: 0, 1: 1, 2: 2" in succeed(call).out
    assert pipeline.load().model.class_names == tuple("0123456789")
    refused = script(*f"{call} --labels 12".split())
    assert refused.code == USAGE and "9: 9" in refused.err
