"""--dry-run: two steps on random images, a report, and nothing read or written."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipelines import Outcome, Pipeline, Script

from midway.gen.core.errors import UsageError
from midway.gen.data import images as image_files
from midway.gen.data.splits import DataConfig
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.trainings import dry_run
from midway.gen.trainings.dry_run import micro_batch, random_splits
from midway.tokenizers.memory import Need

pytestmark = pytest.mark.usefixtures("on_the_cpu")
Refuse = Callable[[str], Outcome]
GB = 2**30
KEYS = ["parameters", "step", "operations", "memory", "speed", "time"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and no reading of images."""

    def reads(*_: object, **__: object) -> None:
        raise AssertionError("a dry run reads images")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_files, "load_recorded", reads)
    return tmp_path


def rows(out: str) -> dict[str, str]:
    """The report as key -> the rest of the line."""
    lines = out.strip().splitlines()
    assert lines[0] == "dry run: two steps on random images; nothing is read or written"
    return {line[:14].strip(): line[14:] for line in lines[1:] if line[13:14] == " "}


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


TOKENIZER = "train_tokenizer digits-fsq --model.width 16 --model.blocks 1 --batch-size 8"
LATENT = "train_latent digits-dit --tokenizer runs/digits-fsq --model.dit.width 16 --model.dit.depth 1 --batch-size 8"

PRIOR = "train_prior digits-masked --tokenizer runs/digits-vq --model.width 16 --model.depth 1 --batch-size 8"


@pytest.mark.parametrize(
    "line",
    [
        TOKENIZER,
        LATENT,
        PRIOR,
        f"{PRIOR} --model.kind continuous",
        "train_baseline digits-vae --model.width 8 --batch-size 8",
        "train_features --width 8 --batch-size 8 --out nowhere",
    ],
)
def test_every_training_reports_and_leaves_nothing(line: str, succeed: Script, nowhere: Path) -> None:
    found = rows(succeed(f"{line} --dry-run --dry-run-classes 10 --steps 7200").out)
    assert list(found) == KEYS
    assert found["step"] == "8 images: 1 process(es) x 1 micro-batch(es) of 8"
    speed = number(found["speed"], r"^([\d.e+-]+) images/s")
    hours = number(found["time"], r"7,200 steps in ([\d.,]+) hours")
    assert hours == pytest.approx(7200 * 8 / speed / 3600, abs=0.06, rel=0.01)
    assert not list(nowhere.rglob("*"))


def test_the_numbers_are_those_of_the_model(succeed: Script) -> None:
    """A DiT of one layer on 6 x 2 x 2 latents: parameters by hand, 4 + 4 + 8 + 4 bytes each, and 3 x 2 operations a weight."""
    found = rows(succeed(f"{LATENT} --dry-run --dry-run-classes 10").out)
    width, channels, tokens = 16, 6, 4
    block = 3 * width * width + 3 * width + 2 * 4 + width * width + width + 8 * width * width + 5 * width
    block += 6 * width * width + 6 * width
    ends = (channels + 1) * width + (256 + 1) * width + (width + 1) * width + 11 * width
    ends += 2 * width * width + 2 * width + (width + 1) * channels
    assert number(found["parameters"], r"([\d,]+)") == block + ends
    kept = 20 * (block + ends) + 2 * tokens * width * 4  # positions are a buffer, which is averaged too
    assert number(found["memory"], r"^([\d.]+) GiB kept") == pytest.approx(kept / GB, rel=0.01)
    products = tokens * (12 * width * width + 2 * channels * width) + 8 * width * width + 256 * width + width * width
    attention = 2 * tokens * tokens * width
    assert number(found["operations"], r"^([\d.e-]+) GFLOP") == pytest.approx(6 * (products + attention) / 1e9, rel=0.1)


def test_flags_of_the_training_count(succeed: Script) -> None:
    found = rows(succeed(f"{LATENT} --dry-run --accumulation 2 --precision bf16 --gradient-checkpointing").out)
    assert found["step"] == "8 images: 1 process(es) x 2 micro-batch(es) of 4"
    assert "precision bf16" in found["speed"]


def test_recomputed_activations_take_less(succeed: Script) -> None:
    plain, less = (
        number(rows(succeed(f"{LATENT} --dry-run --model.dit.depth 6 {flag}").out)["memory"], r"kept, ([\d.e-]+) GiB")
        for flag in ("", "--gradient-checkpointing")
    )
    assert less < 0.7 * plain


def test_a_tokenizer_with_a_discriminator_has_it_from_the_first_step(succeed: Script, vgg: Path) -> None:
    line = f"{TOKENIZER} --dry-run --loss.adversary hinge --loss.adversary-start 500 --loss.perceptual 1"
    done = succeed(line.replace("--batch-size 8", "--batch-size 2"), "--resize", "32")
    alone = succeed(f"{TOKENIZER} --dry-run --batch-size 2 --resize 32")
    assert "LPIPS is left out" in done.out
    more, less = (number(rows(each.out)["operations"], r"^([\d.]+)") for each in (done, alone))
    assert more > 1.2 * less
    with_it = succeed(
        f"{TOKENIZER} --dry-run --batch-size 2 --resize 32 --loss.perceptual 1 --loss.perceptual-weights {vgg}"
    )
    assert "LPIPS" not in with_it.out
    assert number(rows(with_it.out)["operations"], r"^([\d.]+)") > 2 * less


def test_the_run_of_a_tokenizer_serves_as_well(pipeline: Pipeline, succeed: Script) -> None:
    found = rows(succeed(f"train_latent digits-dit --tokenizer {pipeline.tokenizer} --dry-run --batch-size 4").out)
    assert list(found) == KEYS


def test_a_model_that_cannot_be_counted_runs_all_the_same(succeed: Script) -> None:
    """ActNorm starts from data, which it asks for on the host."""
    found = rows(succeed("train_baseline digits-glow --dry-run --batch-size 4 --model.network.width 8").out)
    assert list(found) == [key for key in KEYS if key != "operations"]
    assert "activations" not in found["memory"]


# ---- what is assumed of the images ----


def test_images_have_the_size_that_is_configured() -> None:
    for config, shape in (
        (DataConfig(), (1, 8, 8)),
        (DataConfig(data="cifar10"), (3, 32, 32)),
        (DataConfig(data="somewhere", resize=40), (3, 40, 40)),
        (DataConfig(data="somewhere", resize=40, crop=32, channels=1), (1, 32, 32)),
    ):
        splits = random_splits(config, 3)
        assert tuple(splits.train.images.shape[1:]) == shape
        assert splits.train.classes == ("0", "1", "2")
        assert len(splits.train.images[torch.arange(dry_run.IMAGES)].unique()) == 256


def test_without_a_size_the_error_names_the_flag(script: Script) -> None:
    done = script("train_tokenizer", "digits-fsq", "--data", "pictures", "--dry-run")
    assert done.code == 2 and "--resize 256" in done.err and len(done.err.strip().splitlines()) == 3


def test_a_tokenizer_that_is_neither_a_run_nor_a_recipe_is_an_error(script: Script) -> None:
    done = script("train_latent", "digits-dit", "--tokenizer", "runs/digits-fsk", "--dry-run")
    assert done.code == 2 and "did you mean 'digits-fsq'?" in done.err


def test_unusable_sizes_are_errors(script: Script) -> None:
    done = script("train_tokenizer", "digits-fsq", "--dry-run", "--resize", "30", "--model.downsample", "4")
    assert done.code == 2 and "this tokenizer cannot be built" in done.err


# ---- micro-batches ----


@pytest.mark.parametrize(
    ("share", "each", "flops", "expected"),
    [
        (128, 1, 1, 128),
        (128, GB, 1, 64),
        (96, GB, 1, 48),
        (128, 1, 3 * 10**11, 2),
        (128, GB, 10**14, 1),
        (7, GB * 5, 1, 7),
    ],
)
def test_a_micro_batch_divides_its_share_and_fits(
    share: int, each: int, flops: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 GiB, 90 % of which are used: 10 are kept, 80 are left."""
    monkeypatch.setattr(dry_run, "memory_of", lambda device: (200 * GB, 100 * GB))
    assert micro_batch(share, Need(0, each), flops, 10 * GB, torch.device("cpu")) == expected


# ---- recipes for ImageNet ----


def test_recipes_of_imagenet_have_the_published_sizes() -> None:
    vq, fsq, kl = (TOKENIZER_RECIPES[f"imagenet256-{name}"]() for name in ("vq", "fsq", "kl"))
    assert (vq.model.codebook_size, vq.model.dim, vq.model.downsample) == (16384, 8, 16)
    assert torch.tensor(fsq.model.levels).prod() == 15360
    assert (kl.model.downsample, kl.model.dim, kl.model.multipliers) == (8, 4, (1, 2, 4, 4))
    for task in (vq, fsq, kl):
        assert (task.train.lr, task.train.batch_size, task.data.resize) == (1e-4, 128, 256)
    for name, dit in (("dit-b", (768, 12, 12)), ("dit-xl", (1152, 28, 16))):
        task = LATENT_RECIPES[f"imagenet256-{name}"]()
        assert (task.model.dit.width, task.model.dit.depth, task.model.dit.heads, task.model.dit.patch) == (*dit, 2)
        assert (task.train.lr, task.train.batch_size, task.train.ema) == (1e-4, 256, 0.9999)
        assert task.model.label_dropout == 0.1 and task.tokenizer == kl.out


def test_every_recipe_has_a_docstring_that_names_its_command() -> None:
    for recipes, kind in ((TOKENIZER_RECIPES, "tokenizer"), (LATENT_RECIPES, "latent")):
        for name, make in recipes.items():
            assert f"midway train {kind} {name}" in (make.__doc__ or "")
    assert BASELINE_RECIPES


@pytest.mark.slow
def test_a_dit_b_is_rehearsed_in_four_gigabytes(succeed: Script) -> None:
    found = rows(succeed("train_latent imagenet256-dit-b --dry-run").out)
    assert number(found["parameters"], r"([\d,]+)") == pytest.approx(130.3e6, rel=0.01)
    assert found["step"].startswith("256 images: 1 process(es) x 1 micro-batch(es) of 256; here micro-batches of 4")
    assert number(found["memory"], r"peak ([\d.]+) GiB") < 4


def test_random_sizes_are_asked_for_in_words() -> None:
    with pytest.raises(UsageError, match="does not read somewhere"):
        random_splits(DataConfig(data="somewhere"), 1)
