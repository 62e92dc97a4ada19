"""midway train prior: what a run holds and logs, named codes, online evaluation, sizes from the codes, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from multiprocess import launch
from pipelines import SCRIPTS, Pipeline, Script
from regression import records
from safetensors.torch import load_file

from midway.gen.core.config import from_dict, to_dict
from midway.gen.data.places import data_of, splits_of
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import PriorTask
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.likelihood import code_bits
from midway.gen.priors.load import load_prior
from midway.gen.priors.registry import Prior, layout_for, make_prior
from midway.gen.priors.sampling import encode_codes
from midway.gen.recipes.prior_recipes import GENERIC_PRIORS, PRIOR_RECIPES
from midway.gen.recipes.recipes import TOKENIZER_RECIPES
from midway.gen.tokenizer.codes import codes_path
from midway.gen.tokenizer.stored import Views
from midway.gen.training.batches import CodeBatch
from midway.gen.training.power_ema import find_snapshots, reconstruct
from midway.gen.trainings import train_prior
from midway.gen.trainings.dry_run import random_splits
from midway.gen.trainings.train_tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu")
TINY = "--model.width 16 --model.depth 1 --model.heads 2 --batch-size 64 --warmup 2 --lr 1e-2 --ema 0.9 --log-every 4"


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked prior of 4 tokens with mirrored images, validated, previewed and measured."""
    out = tmp_path_factory.mktemp("prior") / "run"
    early = f"--measure-every 8 --early.nfe 2 4 --early.n 24 --early.features {pipeline.features}"
    flags = f"{TINY} {early} --steps 8 --validate-every 4 --masks 3 --validation-images 30 --flip"
    train_prior.command(f"digits-masked --tokenizer {pipeline.tokenizer} --out {out} {flags}".split())
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_holds_the_prior_its_bits_and_what_others_take(run: Path, pipeline: Pipeline) -> None:
    trained = load_prior(run)
    best = min((record["validation"], record["step"]) for record in lines(run) if "validation" in record)
    assert trained.weights == f"averaged, EMA 0.9, step {best[1]}, the best in validation"
    assert Prior.from_pretrained(run).hash == trained.hash
    (final,) = (record for record in lines(run) if record.get("final"))
    held_out = splits_of(trained.run, data_of(trained.run)).held_out
    assert final["n"] == 30 and final["held_out_bits"] == pytest.approx(best[0], abs=1e-5)
    assert final["bits_are"] == "bound, 3 mask(s) an image"
    assert isinstance(trained.prior.layout, CodeLayout)
    assert final["fixed_length_bits"] == trained.prior.layout.bits > final["independent_bits"] > 0
    tokens = encode_codes(trained, held_out.images[:])
    bits = code_bits(trained.prior, CodeBatch(tokens, held_out.labels), masks=3).mean().item()
    assert bits == pytest.approx(final["held_out_bits"], rel=0.1)  # of all of them
    (measured,) = (record for record in lines(run) if record.get("early"))
    assert {"distance_nfe_2", "distance_nfe_4", "rule"} <= measured.keys() and measured["rule"] == "halton"
    assert [path.name for path in (run / "samples").iterdir()] == ["averaged-000008-nfe4.png"]
    text = (run / "log.txt").read_text()
    assert re.search(r"masked: codes 4 x .*bits an image at a fixed length", text)
    assert re.search(r"held-out bits per image .* independent codes .*, fixed length ", text)
    card = (run / "model" / "README.md").read_text()
    assert "| held-out bits per image |" in card and "Prior.from_pretrained" in card and str(run) not in card
    train = splits_of(trained.run, trained.data).train
    assert codes_path(pipeline.tokenizer, train, trained.tokenizer, Views(mirrored=True)).exists()


def test_another_width_of_its_average_is_a_prior(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    """midway posthoc-ema: weights of the snapshots, which other commands take, beside the best ones of a validated run."""
    flags = f"{TINY} --steps 4 --validate-every 2 --posthoc .05 .1 --posthoc-every 2"
    train_prior.command(f"digits-causal --tokenizer {pipeline.tokenizer} --out {tmp_path}/run {flags}".split())
    succeed(f"posthoc_ema {tmp_path}/run --std 0.08 --out {tmp_path}/wide")
    trained, expected = load_prior(tmp_path / "wide"), reconstruct(find_snapshots(tmp_path / "run/posthoc"), 4, 0.08)
    assert all(torch.equal(value, expected[name]) for name, value in trained.prior.state_dict().items())
    assert trained.weights == "averaged post hoc, width 0.08, step 4"
    own = load_prior(tmp_path / "run")
    assert trained.hash != own.hash and trained.data == own.data and trained.decoder_hash == own.decoder_hash
    done = succeed(f"sample --model {tmp_path}/wide --n 4 --out {tmp_path}/a.png")
    assert "width 0.08" in done.out
    succeed(f"posthoc_ema {tmp_path}/run --std 0.1 --step 2 --out {tmp_path}/tracked")
    (stored,) = (each for each in find_snapshots(tmp_path / "run/posthoc") if (each.step, each.std) == (2, 0.1))
    made = load_prior(tmp_path / "tracked").prior.state_dict()
    for name, value in load_file(stored.path).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)


def test_it_starts_from_the_vectors_of_its_codes_or_at_random(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """Of 6 codes of FSQ the tokenizer has vectors of few channels, and rows at random are of more."""
    ranks = {}
    for start in ("codes", "random"):
        flags = f"{TINY} --steps 0 --preview-seconds 0 --model.start {start}"
        succeed(f"train_prior digits-causal --tokenizer {pipeline.tokenizer} --out {tmp_path / start} {flags}")
        weights = load_file(tmp_path / start / "checkpoints/step-0/model.safetensors")
        ranks[start] = [int(torch.linalg.matrix_rank(w, rtol=1e-4)) for name, w in weights.items() if "embed" in name]
    assert all(few < many for few, many in zip(ranks["codes"], ranks["random"], strict=True))


def test_it_resumes_exactly_and_named_codes_are_the_same_training(
    run: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    assert succeed("verify_resume", run, "--steps", 4).out.endswith("resume is exact\n")
    codes = tmp_path / "codes"
    done = succeed(f"encode --tokenizer {pipeline.tokenizer} --kind codes --flip --out {codes}")
    assert "codes (1438, 2, 2, 2), int32" in done.out
    succeed(f"train_prior --config {run}/config.yaml --codes {codes} --out {tmp_path}/again --measure-every 0")
    ours, theirs = (load_file(path / "checkpoints/step-8/ema.safetensors") for path in (run, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_train_what_one_does(run: Path, tmp_path: Path) -> None:
    launch(SCRIPTS / "train_prior.py", "--config", run / "config.yaml", "--out", tmp_path / "two", "--measure-every", 0)
    # not weights: Adam makes a whole step of a gradient that is rounding alone
    one, two = ([r["loss"] for r in records(path) if "loss" in r] for path in (run, tmp_path / "two"))
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in PRIOR_RECIPES if name not in GENERIC_PRIORS])
def test_a_recipe_builds_and_its_configuration_survives_yaml(name: str) -> None:
    task = resolve(PriorTask, PRIOR_RECIPES, [name])
    assert task == PRIOR_RECIPES[name]() == from_dict(PriorTask, to_dict(task))
    make = PRIOR_RECIPES[name]
    assert f"midway train prior {name}" in (make.__doc__ or "") and task.out == Path("runs", name)
    tokenizer = TOKENIZER_RECIPES[task.tokenizer.name]()
    planned = make_tokenizer(tokenizer, random_splits(tokenizer.data, 10).train)
    with torch.device("meta"):
        assert make_prior(task.model, layout_for(task.model, planned), 10).layout.length in (4, 16, 64)


def test_sizes_of_small_follow_from_the_codes(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    done = succeed(
        f"train_prior small --tokenizer {pipeline.tokenizer} --out {tmp_path}/small --steps 1 --batch-size 16"
    )
    assert re.search(r"small for 4 tokens: width \d+, depth \d+, batch 16", done.out)
    few, many = (GENERIC_PRIORS["small"](CodeLayout(((side, side),), ((512,),))) for side in (4, 16))
    assert few.model.width < many.model.width and few.train.batch_size >= many.train.batch_size


def test_what_cannot_be_trained_is_said_before_a_folder_is_made(
    pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    succeed(f"train_tokenizer digits-kl --out {tmp_path}/kl --steps 1 --model.width 8 --batch-size 8")
    succeed(f"encode --tokenizer {pipeline.tokenizer} --kind codes --out {tmp_path}/codes")
    base = f"train_prior digits-causal --out {tmp_path}/out {TINY} --tokenizer"

    def refused(line: str, *words: str) -> None:
        done = script(*line.split())
        assert done.code == 2 or done.code == 3, done.err
        assert len(done.err.strip().splitlines()) == 3 and all(word in done.err for word in words), done.err
        assert not (tmp_path / "out").exists()

    refused(f"{base} {tmp_path}/kl", "no codes: its quantizer is kl", "fsq, vq")
    refused(f"{base} {tmp_path}/kl --dry-run", "no codes: its quantizer is kl")
    refused(
        f"{base} {pipeline.tokenizer} --codes {tmp_path}/codes --flip",
        "no codes of mirrored images",
        "--kind codes --flip",
    )
    refused(f"{base} {pipeline.tokenizer} --model.width 18", "2-D rotations")
    refused(f"{base} {pipeline.tokenizer} --model.kind masked --model.shuffle-steps 3", "shuffle_steps is for causal")
    refused(f"{base} {pipeline.tokenizer} --masks 0", "--masks 0")
    refused(f"{base} {pipeline.tokenizer} --measure-every 1 --early.nfe 3", "--early.nfe 3", "of 4 tokens takes 4")
    refused(
        f"encode --tokenizer {pipeline.tokenizer} --kind codes --dtype float16 --out {tmp_path}/out", "whole numbers"
    )
    refused(f"encode --tokenizer {tmp_path}/kl --kind codes --out {tmp_path}/out", "no codes: its quantizer is kl")
    other = tmp_path / "other"
    shutil.copytree(pipeline.tokenizer, other, ignore=shutil.ignore_patterns("codes-*", "latents-*"))
    succeed(f"train_tokenizer --config {other}/config.yaml --out {tmp_path}/other-2 --steps 2 --seed 5")
    refused(f"{base} {tmp_path}/other-2 --codes {tmp_path}/codes", "stale", "its tokenizer is")
