"""midway sample of priors: every flag, the same images by every way to write them, and errors that name what works."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Pipeline, Script
from prior_runs import open_prior, prior_run

from midway.gen.core.errors import UsageError
from midway.gen.core.processes import ProcessInfo
from midway.gen.flags import sample_outputs
from midway.gen.flags.sample_outputs import Drawing, by_prior, draw_set
from midway.gen.priors.decoding import Decoding
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.sampling import CodeSampling, decode_codes, sample_codes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def causal(pipeline: Pipeline) -> Path:
    return prior_run(pipeline.root / "sampled-causal", pipeline.tokenizer)


@pytest.fixture(scope="module")
def masked(pipeline: Pipeline) -> Path:
    return prior_run(pipeline.root / "sampled-masked", pipeline.tokenizer, kind="masked")


def images_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def expected(path: Path, how: Decoding, count: int = 11) -> np.ndarray:
    trained = open_prior(path)
    found = sample_codes(trained, torch.arange(3, 3 + count), CodeSampling(how))
    return decode_codes(trained, found.tokens)[:, 0].numpy()


def test_a_prior_is_sampled_as_latent_models_are(
    causal: Path, masked: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    """By default causal, or halton in one evaluation a token; --nfe, --grid and every flag of priors reach the decoder."""
    begin = "--seed 3 --n 11 --batch-size 4"
    done = succeed(f"sample --model {causal} {begin} --out {tmp_path}/causal")
    assert "11 images, 4 evaluations (4 token-evaluations) each" in done.out and "classes: 0, 1, 2" in done.out
    assert np.array_equal(images_in(tmp_path / "causal"), expected(causal, Decoding()))
    done = succeed(f"sample --model {masked} {begin} --out {tmp_path}/masked")
    assert "4 evaluations (20 token-evaluations) each" in done.out
    assert np.array_equal(images_in(tmp_path / "masked"), expected(masked, Decoding("halton")))
    more = (
        "--solver maskgit --nfe 2 --grid arccos --temperature .7 --top-k 90 --top-p .9 --guidance 2 --guidance-ramp .5"
    )
    done = succeed(f"sample --model {masked} {begin} {more} --choice-noise 2 --precision no --out {tmp_path}/all")
    assert "4 evaluations (20 token-evaluations) each" in done.out, "guidance runs the trunk twice"
    how = Decoding("maskgit", 2, "arccos", 0.7, 90, 0.9, 2.0, 0.5, 2.0)
    assert np.array_equal(images_in(tmp_path / "all"), expected(masked, how))
    settings = json.loads((tmp_path / "all/sampling.json").read_text())
    assert settings["decoding"]["rule"] == "maskgit" and settings["--labels"] == "in turn"
    other = script(*f"sample --model {masked} {begin} {more} --choice-noise 1 --out {tmp_path}/all".split())
    assert other.code == 2 and "holds samples of other settings" in other.err
    succeed(
        f"sample --model {masked} --n 4 --tile 8 --tile-margin 0 --labels 3,7 --precision bf16 --out {tmp_path}/x.npz"
    )
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [3, 7, 3, 7]
    succeed(f"sample --model {masked} --n 4 --out {tmp_path}/x.png")
    warned = succeed(f"sample --model {masked} --n 4 --nfe 2 --temperature 0 --out {tmp_path}/x.png")
    assert (
        "warning: at temperature 0 the tokens of one evaluation (4 in 2)" in warned.err
        and warned.err.count("at temperature") == 1
    )
    assert "are nearly all the same" in succeed(f"sample --model {causal} --temperature 0 --out {tmp_path}/x.png").err


def test_processes_and_kills_do_not_show(masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes drew, the other was killed; one process goes on, and draws what is missing."""
    trained: TrainedPrior = open_prior(masked)
    sampling = CodeSampling(Decoding("random", 2), batch_size=4)
    drawn = list[int]()

    def drawing() -> Drawing:
        make = by_prior(trained, sampling)
        seeds = torch.arange(3, 14)
        return Drawing(make, trained.prior, seeds, 4, lambda some: some % 10, {"x": 1})

    monkeypatch.setattr(ProcessInfo, "wait", lambda self: None)
    real = sample_outputs.decode_codes
    monkeypatch.setattr(sample_outputs, "decode_codes", lambda a, b: [drawn.append(len(b)), real(a, b)][1])
    draw_set(drawing(), tmp_path / "one", "folder", ProcessInfo())
    folder = tmp_path / "several"
    with sample_outputs.SampleFolder(folder, {"x": 1}, 10, trained.prior.class_names).claimed():
        pass
    draw_set(drawing(), folder, "folder", ProcessInfo(1, 2))
    assert drawn == [4, 4, 3, 4] and len([*folder.glob("*.png")]) == 4
    made = draw_set(drawing(), folder, "folder", ProcessInfo())
    assert drawn[4:] == [4, 3] and made.images == 7
    assert np.array_equal(images_in(folder), images_in(tmp_path / "one"))
    assert np.array_equal(images_in(folder), expected(masked, Decoding("random", 2)))


@pytest.mark.parametrize(
    ("which", "flags", "words"),
    [
        ("masked", "--solver ddim", "use one of random, halton, certain, maskgit"),
        ("masked", "--solver causal", "it is a rule of causal priors, and this model is a masked prior"),
        ("causal", "--solver halton", "it is a rule of masked priors, and this model is a causal prior"),
        ("causal", "--solver dpmpp2m", "drop --solver: its rule is causal"),
        ("causal", "--nfe 2", "a causal prior takes one evaluation a token, and its images have 4"),
        ("masked", "--nfe 5", "give 1 to 4"),
        ("masked", "--grid karras", "choose one of cosine, arccos, linear"),
        ("causal", "--grid cosine", "a causal prior decides one token at a time"),
        ("masked", "--choice-noise 1", "only maskgit keeps tokens by noisy confidences"),
        ("masked", "--guidance-ramp 1", "at scale 1 nothing is guided"),
        ("masked", "--temperature -1", "--temperature -1"),
        ("masked", "--top-p 0", "--top-p 0"),
        ("masked", "--labels 11", "the model has classes 0 to 9"),
        ("masked", "--eta 1", "--eta on "),
        ("masked", "--guide x", "--guide on "),
        ("masked", "--parallel picard", "it is for models that are solved, and this is a prior"),
        ("unconditional", "--guidance 2", "this model was trained without classes"),
        ("labelled", "--guidance 2", "needs label dropout"),
        ("latent", "--solver halton", "it is a rule by which codes are drawn from a prior"),
        ("latent", "--top-k 5", "--top-k 5"),
        ("latent", "--temperature .5", "it is for priors over codes, and this is a latent model"),
    ],
)
def test_what_a_prior_cannot_be_asked(
    pipeline: Pipeline, causal: Path, masked: Path, script: Script, tmp_path: Path, which: str, flags: str, words: str
) -> None:
    """Exit code 2 and three lines; nothing is written."""
    runs = {"masked": masked, "causal": causal, "latent": pipeline.model}
    if which in ("unconditional", "labelled"):
        config = {"unconditional": {"conditional": False}, "labelled": {"label_dropout": 0.0}}[which]
        runs[which] = prior_run(tmp_path / which, pipeline.tokenizer, kind="masked", **config)
    done = script(*f"sample --model {runs[which]} {flags} --out {tmp_path}/x.png".split())
    assert done.code == UsageError.exit_code and words in done.err and done.err.count("\n") == 3, done.err
    assert not (tmp_path / "x.png").exists()


def test_a_continuous_prior_has_two_budgets(
    pipeline: Pipeline, causal: Path, succeed: Script, script: Script, tmp_path: Path
) -> None:
    """--nfe of the trunk and --head-nfe of its head, by any solver; what its tokens cannot have is an error."""
    run = prior_run(pipeline.root / "sampled-continuous", pipeline.tokenizer, kind="continuous")
    begin = f"sample --model {run} --seed 3 --n 11 --batch-size 4"
    done = succeed(f"{begin} --out {tmp_path}/plain")
    assert "11 images, 4 evaluations (20 token-evaluations, 20 of the head a token) each" in done.out
    assert np.array_equal(images_in(tmp_path / "plain"), expected(run, Decoding("halton")))
    head = "--head-solver euler --head-nfe 3 --head-grid uniform"
    done = succeed(f"{begin} --solver random --nfe 2 --guidance 2 --temperature .5 {head} --out {tmp_path}/more")
    assert "11 images, 4 evaluations (20 token-evaluations, 6 of the head a token) each" in done.out
    for flags, words in (
        ("--solver certain", "use one of random, halton"),
        ("--solver dpmpp2m", "--head-solver"),
        ("--top-k 4", "drop --top-k"),
        ("--nfe 5", "give 1 to 4"),
        ("--head-solver eulr", "euler"),
        ("--head-solver table", "midway train solver table"),
        ("--head-nfe 0", "--head-nfe 0"),
    ):
        failed = script("sample", *f"--model {run} {flags} --out {tmp_path}/none".split())
        assert failed.code == 2 and words in failed.err and "Traceback" not in failed.err, failed.err
    failed = script("sample", "--model", causal, "--head-nfe", 3, "--out", tmp_path / "none")
    assert failed.code == 2 and "drop --head-nfe" in failed.err
