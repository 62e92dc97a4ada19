"""Bad input to the scripts: the exit code, what, why and how to fix it on stderr, and nothing half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_features
import train_latent
from PIL import Image
from pipelines import TINY, TINY_DIT, Outcome, Pipeline, Script

from midway.gen.core import checkpoints
from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.diffusion.model import LatentModelConfig
from tasks import LatentTask

USAGE, DATA, DIVERGED = 2, 3, 4


def _files(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file, and every directory, under `root`."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns if p.is_file() else 0) for p in root.rglob("*")}


@contextmanager
def _untouched(*roots: Path) -> Iterator[None]:
    """Nothing under these folders appears, disappears or changes."""
    before = [_files(root) for root in roots]
    yield
    assert [_files(root) for root in roots] == before


def _assert_teaches(told: Outcome, code: int, *words: str) -> None:
    """Three lines on stderr: what, why, fix; with these words."""
    assert told.code == code, told
    assert "Traceback" not in told.err
    lines = told.err.strip().splitlines()[-3:]
    assert [line[:7] for line in lines] == ["error: ", "  why: ", "  fix: "], told.err
    assert all(len(line) > 12 for line in lines)
    assert [word for word in words if word not in "\n".join(lines)] == [], told.err


@pytest.fixture
def refuse(script: Script, pipeline: Pipeline, tmp_path: Path) -> Callable[..., None]:
    """`refuse(code, words, script, *arguments)`: the call fails like that and leaves every file as it was."""

    def check(code: int, words: tuple[str, ...], name: str, *arguments: object) -> None:
        with _untouched(pipeline.root, tmp_path):
            told = script(name, *arguments)
        _assert_teaches(told, code, *words)

    return check


Refuse = Callable[..., None]


def _sample(pipeline: Pipeline, tmp_path: Path, *flags: object) -> tuple[object, ...]:
    base = ("sample", "--model", pipeline.model, "--n", 2, "--out", tmp_path / "grid.png")
    return (*base, "--nfe", 4, "--grid", "uniform", *flags)


def _evaluate(pipeline: Pipeline, tmp_path: Path, *flags: object) -> tuple[object, ...]:
    base = ("evaluate", "--model", pipeline.model, "--features", pipeline.features, "--out", tmp_path / "report")
    sizes = ("--n", 16, "--reference-nfe", 8)
    return (*base, *sizes, "--solvers", "ddim", "--nfe", 4, "--grids", "uniform", *flags)


# ---- names ----


@pytest.mark.parametrize("call", [_sample, _evaluate])
def test_an_unknown_solver_is_refused_with_the_nearest_name(
    call: Callable[..., tuple[object, ...]], refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    flag = "--solver" if call is _sample else "--solvers"
    words = ("unknown solver 'hune'", "did you mean 'heun'?", "amed-constants")
    refuse(USAGE, words, *call(pipeline, tmp_path, flag, "hune"))


@pytest.mark.parametrize("call", [_sample, _evaluate])
@pytest.mark.parametrize("solver", ["ddim", "amed"])
def test_an_unknown_grid_is_refused_with_the_nearest_name(
    solver: str, call: Callable[..., tuple[object, ...]], refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    plural = "" if call is _sample else "s"
    flags = (f"--solver{plural}", solver, f"--grid{plural}", "karas")
    refuse(USAGE, ("unknown grid 'karas'", "did you mean 'karras'?"), *call(pipeline, tmp_path, *flags))


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("train_tokenizer", "digit-fsq", "digits-fsq"),
        ("train_latent", "digits-dti", "digits-dit"),
        ("train_solver", "amedd", "amed"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest_name(
    name: str, wrong: str, right: str, refuse: Refuse, tmp_path: Path
) -> None:
    refuse(USAGE, (f"unknown recipe '{wrong}'", f"did you mean '{right}'?"), name, wrong, "--out", tmp_path / "x")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--solver", "amde"), "did you mean 'amed'?"),
        (("--grid", "unifrom"), "did you mean 'uniform'?"),
        (("--distill.teacher", "hein"), "did you mean 'heun'?"),
    ],
)
def test_train_solver_refuses_unknown_names(
    flags: tuple[str, str], word: str, refuse: Refuse, pipeline: Pipeline
) -> None:
    refuse(USAGE, ("unknown", flags[1], word), "train_solver", "--model", pipeline.model, *flags)


@pytest.mark.parametrize(
    ("name", "arguments", "hint"),
    [
        ("sample", ("--model", "m", "--solvr", "ddim"), "--solver"),
        ("evaluate", ("--model", "m", "--features", "f", "--solver", "ddim"), "--solvers"),
        ("train_tokenizer", ("digits-fsq", "--levels", "8"), "--model.levels"),
        ("train_latent", ("digits-dit", "--model.width", "64"), "--model.dit.width"),
        ("train_features", ("--withd", "8"), "--width"),
        ("train_solver", ("amed", "--model", "m", "--trajectories", "9"), "--distill.trajectories"),
        ("encode", ("--tokeniser", "t", "--tokenizer", "t"), "--tokenizer"),
    ],
)
def test_an_unknown_flag_ends_with_2_and_names_the_near_one(
    name: str, arguments: tuple[str, ...], hint: str, script: Script
) -> None:
    told = script(name, *arguments)
    assert told.code == USAGE
    assert "Unrecognized" in told.err and hint in told.err and "Traceback" not in told.err


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sample", (), ("--model",)),
        ("evaluate", (), ("--model",)),
        ("encode", (), ("--tokenizer",)),
        ("train_solver", ("amed",), ("--model",)),
        ("sample", ("--model", "m", "--nfe", "few"), ("--nfe", "few")),
        ("train_latent", ("digits-dit", "--model.dit.width", "30"), ("width 30",)),
        ("train_latent", ("digits-dit", "--model.target", "noise"), ("noise", "eps")),
        ("train_tokenizer", ("digits-fsq", "--betas", "0.9"), ("betas",)),
        ("train_tokenizer", ("digits-fsq", "--lr", "-1"), ("lr",)),
        ("train_tokenizer", ("digits-fsq", "--ema", "1"), ("ema",)),
        ("train_tokenizer", ("digits-fsq", "--batch-size", "0"), ("batch_size",)),
        ("train_tokenizer", ("digits-fsq", "--log-every", "0"), ("log_every",)),
        ("train_tokenizer", ("digits-fsq", "--accumulation", "0"), ("accumulation",)),
    ],
)
def test_a_missing_flag_or_an_impossible_value_ends_with_2(
    name: str, arguments: tuple[str, ...], words: tuple[str, ...], script: Script
) -> None:
    told = script(name, *arguments)
    assert told.code == USAGE
    assert all(word in told.err for word in words) and "Traceback" not in told.err


# ---- budgets ----


@pytest.mark.parametrize("call", [_sample, _evaluate])
def test_an_unreachable_budget_names_its_neighbours(
    call: Callable[..., tuple[object, ...]], refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    flag = "--solver" if call is _sample else "--solvers"
    words = ("heun", "NFE 7", "use 6 or 8", "with the analytic first step")
    refuse(USAGE, words, *call(pipeline, tmp_path, flag, "heun", "--nfe", 7))
    words = ("NFE 6", "use 5 or 7", "without the analytic first step")
    refuse(USAGE, words, *call(pipeline, tmp_path, flag, "heun", "--nfe", 6, "--analytic-first"))


def test_train_solver_refuses_an_unreachable_budget_before_it_learns_another(
    refuse: Refuse, pipeline: Pipeline
) -> None:
    refuse(
        USAGE,
        ("NFE 7", "use 6 or 8"),
        "train_solver",
        "amed",
        "--model",
        pipeline.model,
        "--nfe",
        "2,7",
        "--distill.analytic-first",
        "False",
    )


@pytest.mark.parametrize("text", ["", "4,x", "0", "4,-2", "4.5"])
def test_a_list_of_budgets_must_be_positive_whole_numbers(
    text: str, refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    words = ("--nfe", "positive whole numbers", "4,6,8")
    refuse(USAGE, words, *_evaluate(pipeline, tmp_path, f"--nfe={text}"))
    refuse(USAGE, words, "train_solver", "amed", "--model", pipeline.model, f"--nfe={text}")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--n", 1), "--n"),
        (("--n", 0), "--n"),
        (("--blocks", 0), "--blocks"),
        (("--batch-size", 0), "--batch-size"),
        (("--reference-nfe", 1), "--reference-nfe"),
        (("--reference-nfe", 7), "--reference-nfe"),
        (("--solvers", ","), "--solvers"),
        (("--grids", ""), "--grids"),
        (("--eta", 0.5, "--solvers", "ddim,heun"), "--eta"),
        (("--eta", 0.5, "--solvers", "ddim,amed"), "--eta"),
        (("--eta", 1.5), "eta"),
        (("--analytic-first", "--solvers", "amed"), "analytic first step"),
    ],
)
def test_evaluate_refuses_what_cannot_be_measured(
    flags: tuple[object, ...], word: str, refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    refuse(USAGE, (word,), *_evaluate(pipeline, tmp_path, *flags))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--n", 0), "--n"),
        (("--seed", -1), "--seed"),
        (("--batch-size", 0), "--batch-size"),
        (("--label", 10), "classes 0 to 9"),
        (("--label", -1), "classes 0 to 9"),
        (("--out", "grid.jpg"), ".png"),
        (("--out", "grid"), ".png"),
        (("--solver", "heun", "--eta", 0.5), "--eta"),
        (("--solver", "amed", "--eta", 0.5), "--eta"),
        (("--solver", "ddim", "--eta", -0.5), "eta"),
        (("--solver", "amed-constants", "--analytic-first"), "analytic first step"),
    ],
)
def test_sample_refuses_what_cannot_be_drawn(
    flags: tuple[object, ...], word: str, refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    refuse(USAGE, (word,), *_sample(pipeline, tmp_path, *flags))


def test_samples_that_are_not_finite_are_a_divergence(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    refuse(DIVERGED, ("diverged", "finite"), *_sample(pipeline, tmp_path, "--guidance", "1e38", "--nfe", 8))


def test_training_that_diverges_ends_with_4(script: Script, pipeline: Pipeline, tmp_path: Path) -> None:
    told = script(
        *("train_latent", "--config", pipeline.model / "config.yaml", "--out", tmp_path / "m"),
        *("--lr", 1e30, "--warmup", 0, "--patience", 3),
    )
    _assert_teaches(told, DIVERGED, "diverged by step", "lower --lr")
    assert not (tmp_path / "m/checkpoints").exists()


# ---- run directories ----


def test_a_missing_run_is_named(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    words = (str(gone), "no config.yaml")
    refuse(DATA, (*words, "latent_model run"), *_sample(pipeline, tmp_path, "--model", gone))
    refuse(DATA, (*words, "latent_model run"), *_evaluate(pipeline, tmp_path, "--model", gone))
    refuse(DATA, (*words, "features run"), *_evaluate(pipeline, tmp_path, "--features", gone))
    refuse(DATA, (*words, "tokenizer run"), "encode", "--tokenizer", gone)
    refuse(DATA, (*words, "tokenizer run"), "train_latent", "digits-dit", "--tokenizer", gone, "--out", tmp_path / "x")
    refuse(DATA, (*words, "latent_model run"), "train_solver", "amed", "--model", gone)


def test_a_run_of_another_kind_is_refused(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    model = ("kind 'tokenizer'", "needs a 'latent_model' run")
    refuse(DATA, model, *_sample(pipeline, tmp_path, "--model", pipeline.tokenizer))
    refuse(DATA, model, *_evaluate(pipeline, tmp_path, "--model", pipeline.tokenizer))
    refuse(DATA, model, "train_solver", "amed", "--model", pipeline.tokenizer)
    words = ("kind 'latent_model'", "needs a 'features' run")
    refuse(DATA, words, *_evaluate(pipeline, tmp_path, "--features", pipeline.model))
    words = ("kind 'features'", "needs a 'tokenizer' run")
    refuse(DATA, words, "encode", "--tokenizer", pipeline.features)
    call = ("train_latent", "digits-dit", "--tokenizer", pipeline.features, "--out", tmp_path / "x")
    refuse(DATA, words, *call)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "kind: 3\n"])
def test_a_run_whose_config_says_no_kind_is_refused(
    text: str, refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(text)
    refuse(DATA, ("of kind", "'latent_model'"), *_sample(pipeline, tmp_path, "--model", tmp_path / "run"))


@pytest.fixture
def copies(pipeline: Pipeline, tmp_path: Path) -> Pipeline:
    """The pipeline's runs in a folder of one's own, to damage."""
    root = tmp_path / "copies"
    shutil.copytree(pipeline.root, root)
    parts = {k: root / getattr(pipeline, k).name for k in ("tokenizer", "features", "model", "baseline")}
    return Pipeline(root, **parts)


def test_a_run_without_a_checkpoint_is_unfinished(refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    words = ("has no checkpoint", "did not reach the end", "--resume auto", "--overwrite")
    for run in (copies.model, copies.features, copies.tokenizer, copies.model / "solvers/amed-uniform-nfe4"):
        shutil.move(run / "checkpoints", run / "elsewhere")
    refuse(DATA, words, "encode", "--tokenizer", copies.tokenizer)
    refuse(DATA, words, *_evaluate(copies, tmp_path))
    refuse(DATA, words, *_sample(copies, tmp_path))
    shutil.move(copies.model / "elsewhere", copies.model / "checkpoints")
    refuse(DATA, words, *_sample(copies, tmp_path, "--solver", "amed"))


def _truncate(run: Path, pattern: str, seal: bool = False) -> None:
    """Cut a file of the checkpoint in half; `seal` writes a manifest that agrees, as if it had been saved so."""
    (file,) = (run / "checkpoints").glob(f"step-*/{pattern}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if seal:
        _seal(run)


def _seal(run: Path) -> None:
    (folder,) = (run / "checkpoints").glob("step-*")
    (folder / checkpoints.MANIFEST).unlink()
    checkpoints.write_manifest(folder, int(folder.name[5:]), {})


MODEL_FILES = ["ema.safetensors", "model.json", "tokenizer/*.safetensors", "tokenizer/config.json"]


@pytest.mark.parametrize("pattern", [*MODEL_FILES, "optimizer.safetensors"])
def test_a_damaged_model_is_refused(pattern: str, refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    _truncate(copies.model, pattern)
    refuse(DATA, ("is damaged", pattern.split("*")[0], "--resume auto"), *_sample(copies, tmp_path))


@pytest.mark.parametrize("pattern", MODEL_FILES)
def test_a_model_that_was_never_whole_is_refused(
    pattern: str, refuse: Refuse, copies: Pipeline, tmp_path: Path
) -> None:
    _truncate(copies.model, pattern, seal=True)
    refuse(DATA, ("cannot be read", "again"), *_sample(copies, tmp_path))


def test_weights_that_do_not_fit_the_model_are_refused(refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    (file,) = copies.model.glob("checkpoints/step-*/model.json")
    description = json.loads(file.read_text())
    description["config"]["dit"]["width"] = 64
    file.write_text(json.dumps(description))
    _seal(copies.model)
    refuse(DATA, ("cannot be read", "again"), *_sample(copies, tmp_path))


@pytest.mark.parametrize("pattern", ["tokenizer/*.safetensors", "tokenizer/config.json"])
def test_a_damaged_tokenizer_is_refused(pattern: str, refuse: Refuse, copies: Pipeline) -> None:
    _truncate(copies.tokenizer, pattern)
    refuse(DATA, ("is damaged", "tokenizer/"), "encode", "--tokenizer", copies.tokenizer)
    _seal(copies.tokenizer)
    refuse(DATA, ("cannot be read", "train the tokenizer again"), "encode", "--tokenizer", copies.tokenizer)


def test_a_damaged_feature_network_is_refused(refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    _truncate(copies.features, "features.safetensors")
    refuse(DATA, ("is damaged", "features.safetensors"), *_evaluate(copies, tmp_path))
    _seal(copies.features)
    refuse(DATA, ("features.safetensors", "cannot be read", "train_features"), *_evaluate(copies, tmp_path))


def test_a_damaged_learned_solver_is_refused(refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    run = copies.model / "solvers/amed-uniform-nfe4"
    _truncate(run, "solver.safetensors")
    refuse(DATA, ("is damaged", "solver.safetensors"), *_sample(copies, tmp_path, "--solver", "amed"))
    _seal(run)
    words = ("solver.safetensors cannot be read", "train_solver.py amed", "--nfe 4", "--overwrite")
    refuse(DATA, words, *_sample(copies, tmp_path, "--solver", "amed"))


# ---- existing outputs ----


def test_a_run_is_not_overwritten_unasked(refuse: Refuse, pipeline: Pipeline) -> None:
    words = ("already holds a run", "--overwrite")
    config = ("--config", pipeline.model / "config.yaml")
    refuse(USAGE, words, "train_tokenizer", "digits-fsq", "--out", pipeline.tokenizer)
    refuse(USAGE, words, "train_features", "--out", pipeline.features)
    refuse(USAGE, words, "train_latent", *config)
    call = ("train_solver", "amed", "--model", pipeline.model, "--nfe", 4, "--grid", "uniform")
    refuse(USAGE, words, *call)


def test_a_folder_with_other_files_never_becomes_a_run(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"x")
    call = ("train_tokenizer", "digits-fsq", "--overwrite", "--out")
    refuse(USAGE, ("no run directory",), *call, tmp_path / "photos")
    refuse(USAGE, ("no run directory",), *call, tmp_path / "photos/me.png")


def test_a_cache_is_not_overwritten_unasked(refuse: Refuse, pipeline: Pipeline) -> None:
    refuse(USAGE, ("exists", "--overwrite"), "encode", "--tokenizer", pipeline.tokenizer)
    refuse(USAGE, ("--batch-size 0",), "encode", "--tokenizer", pipeline.tokenizer, "--batch-size", 0)


# ---- things that do not belong together ----


def test_features_of_other_images_are_refused(refuse: Refuse, pipeline: Pipeline, tmp_path: Path, folder: Path) -> None:
    other = replace(train_features.FeaturesTask(), out=tmp_path / "features", width=8, dim=8)
    data = replace(other.data, data=str(folder), held_out=0.5)
    train_features.train(replace(other, data=data, train=replace(TINY, steps=1, batch_size=4)))
    words = ("trained on other images than the model", "train features")
    refuse(DATA, words, *_evaluate(pipeline, tmp_path, "--features", tmp_path / "features"))


def test_a_stale_cache_is_refused(refuse: Refuse, pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    """A cache of another tokenizer, of other images, of another format, and none."""
    other = tmp_path / "other"
    call = ("train_tokenizer", "--config", pipeline.tokenizer / "config.yaml")
    assert script(*call, "--out", other, "--steps", 1).code == 0
    assert script("encode", "--tokenizer", other, "--out", tmp_path / "a.safetensors").code == 0
    split = tmp_path / "split"
    shutil.copytree(pipeline.tokenizer, split)
    config = read_yaml(split / "config.yaml")
    write_yaml(split / "config.yaml", {**config, "data": {**config["data"], "split_seed": 1}})
    assert script("encode", "--tokenizer", split, "--out", tmp_path / "b.safetensors").code == 0
    (weights,) = pipeline.features.glob("checkpoints/step-*/features.safetensors")
    train = ("train_latent", "digits-dit", "--tokenizer", pipeline.tokenizer, "--out", tmp_path / "m", "--latents")
    refuse(DATA, ("stale", "its tokenizer is", "encode.py"), *train, tmp_path / "a.safetensors")
    refuse(DATA, ("stale", "its data is", "encode.py"), *train, tmp_path / "b.safetensors")
    refuse(DATA, ("not a latent cache", "encode.py"), *train, weights)
    refuse(DATA, ("no latents at", "encode.py"), *train, tmp_path / "c.safetensors")


def test_a_solver_that_was_not_learned_names_the_command(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    words = ("amed at NFE 6 has not been learned", f"train_solver.py amed --model {pipeline.model} --nfe 6")
    refuse(USAGE, words, *_sample(pipeline, tmp_path, "--solver", "amed", "--nfe", 6))
    refuse(USAGE, words, *_evaluate(pipeline, tmp_path, "--solvers", "ddim,amed", "--nfe", "4,6"))


def test_a_solver_of_another_model_is_refused(refuse: Refuse, copies: Pipeline, tmp_path: Path) -> None:
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    task = LatentTask(tmp_path / "other", copies.tokenizer, model=config, train=replace(TINY, steps=1))
    train_latent.train(task)
    shutil.copytree(copies.model / "solvers", task.out / "solvers")
    words = ("learned for other weights", "this model is", f"--model {task.out} --nfe 4 --grid uniform --overwrite")
    refuse(DATA, words, *_sample(copies, tmp_path, "--solver", "amed", "--model", task.out))
    refuse(DATA, words, *_evaluate(copies, tmp_path, "--solvers", "amed", "--model", task.out))


def test_a_solver_learned_at_another_guidance_is_refused(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    words = ("learned at guidance 1.0", "samples at guidance 2.0", "--guidance 1.0")
    refuse(USAGE, words, *_sample(pipeline, tmp_path, "--solver", "amed", "--guidance", 2))
    refuse(USAGE, words, *_evaluate(pipeline, tmp_path, "--solvers", "amed", "--guidance", 2))


@pytest.mark.parametrize("command", [_sample, _evaluate])
def test_guidance_that_cannot_act_is_refused(
    command: Callable[..., Any], refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    refuse(USAGE, ("nothing is guided",), *command(pipeline, tmp_path, "--guidance-interval", 0.1, 5))
    refuse(USAGE, ("nothing is guided",), *command(pipeline, tmp_path, "--guide", pipeline.model))
    backwards = ("--guidance", 2, "--guidance-interval", 5, 0.1)
    refuse(USAGE, ("low < high",), *command(pipeline, tmp_path, *backwards))


def test_sampling_in_parallel_that_cannot_be_is_refused(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    amed = ("--solver", "amed", "--nfe", 4, "--parallel", "gaussian")
    refuse(USAGE, ("network's features", "-constants"), *_sample(pipeline, tmp_path, *amed))
    refuse(
        USAGE,
        ("tolerance must be at least 0",),
        *_sample(pipeline, tmp_path, "--parallel", "picard", "--tolerance", -1),
    )
    refuse(USAGE, ("window",), *_sample(pipeline, tmp_path, "--parallel", "picard", "--window", 0))


def test_an_unconditional_model_has_neither_guidance_nor_labels(
    refuse: Refuse, pipeline: Pipeline, unconditional: Path, tmp_path: Path
) -> None:
    model, without = ("--model", unconditional), "trained without classes"
    refuse(USAGE, (without, "drop --guidance"), *_sample(pipeline, tmp_path, *model, "--guidance", 2))
    refuse(USAGE, (without, "drop --guidance"), *_evaluate(pipeline, tmp_path, *model, "--guidance", 2))
    refuse(USAGE, (without, "drop --guidance"), "train_solver", "amed", *model, "--guidance", 2)
    refuse(USAGE, (without, "drop --label"), *_sample(pipeline, tmp_path, *model, "--label", 0))


def test_an_unconditional_model_samples(
    script: Script, pipeline: Pipeline, unconditional: Path, tmp_path: Path
) -> None:
    told = script(*_sample(pipeline, tmp_path, "--model", unconditional))
    assert told.code == 0, told.err
    assert (tmp_path / "grid.png").exists()


# ---- configuration files ----


def _edited(pipeline: Pipeline, tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "edited.yaml"
    write_yaml(path, {**read_yaml(pipeline.model / "config.yaml"), "out": str(tmp_path / "x"), **changes})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokeniser": "x"}, ("unknown key 'tokeniser'", "did you mean 'tokenizer'?")),
        ({"train": {"step": 3}}, ("unknown key 'step'", "did you mean 'steps'?")),
        ({"train": {"steps": "many"}}, ("train.steps", "'many'", "int")),
        ({"train": {"lr": -1.0}}, ("train", "lr")),
        ({"model": {"target": "noise"}}, ("model.target", "'noise'", "'eps'")),
        ({"model": {"dit": {"width": 30}}}, ("model.dit", "width 30")),
        ({"model": 3}, ("model", "not a mapping")),
    ],
)
def test_a_config_file_is_read_strictly(
    changes: dict[str, object], words: tuple[str, ...], refuse: Refuse, pipeline: Pipeline, tmp_path: Path
) -> None:
    refuse(USAGE, words, "train_latent", "--config", _edited(pipeline, tmp_path, **changes))


def test_a_config_file_must_be_there_and_be_yaml(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1, 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refuse(USAGE, ("no file",), "train_latent", "--config", tmp_path / "none.yaml")
    refuse(USAGE, ("not YAML",), "train_latent", "--config", tmp_path / "bad.yaml")
    refuse(USAGE, ("not YAML",), "train_latent", "--config", tmp_path / "binary.yaml")
    refuse(USAGE, ("not a mapping",), "train_latent", "--config", tmp_path / "list.yaml")
    refuse(USAGE, ("--config needs a file",), "train_latent", "--config")


def test_the_config_of_another_kind_of_run_is_refused(refuse: Refuse, pipeline: Pipeline) -> None:
    refuse(USAGE, ("unknown key",), "train_latent", "--config", pipeline.features / "config.yaml")
    refuse(USAGE, ("unknown key",), "train_features", "--config", pipeline.model / "config.yaml")


# ---- images and sizes ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight RGB images of 12x12 in two classes."""
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    for i, pixels in enumerate(values):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def _tokenizer(tmp_path: Path, *flags: object) -> tuple[object, ...]:
    sizes = ("--steps", 1, "--batch-size", 4, "--model.width", 16)
    return ("train_tokenizer", "digits-fsq", *sizes, "--out", tmp_path / "run", *flags)


def test_an_image_folder_trains(script: Script, folder: Path, tmp_path: Path) -> None:
    told = script(*_tokenizer(tmp_path, "--data", folder, "--held-out", 0.5))
    assert told.code == 0, told.err
    assert "4 images, 12x12" in told.out


def test_images_that_are_not_square_are_refused(refuse: Refuse, folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.open(path).resize((16, 12)).save(path)
    words = ("images are 12x16", "square", "--resize 12")
    refuse(USAGE, words, *_tokenizer(tmp_path, "--data", folder, "--held-out", 0.5))


def test_images_that_cannot_be_used_are_refused(refuse: Refuse, folder: Path, tmp_path: Path) -> None:
    call = _tokenizer(tmp_path, "--held-out", 0.5, "--data")
    refuse(DATA, ("does not exist",), *call, tmp_path / "nowhere")
    refuse(USAGE, ("unknown data source", "did you mean 'digits'?"), *call, "digit")
    refuse(USAGE, ("resize",), *call, folder, "--resize", 0)
    refuse(USAGE, ("held_out=1.0",), *_tokenizer(tmp_path, "--data", folder, "--held-out", 1))
    refuse(DATA, ("one side of the split empty",), *_tokenizer(tmp_path, "--data", folder, "--held-out", 0.01))
    broken = folder / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refuse(DATA, ("0.png",), *call, folder)
    broken.unlink()
    Image.new("RGB", (20, 20)).save(broken)
    refuse(DATA, ("--resize",), *call, folder)
    (tmp_path / "empty").mkdir()
    refuse(DATA, ("empty",), *call, tmp_path / "empty")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--model.downsample", 3), "downsample"),
        (("--model.downsample", 16), "downsample"),
        (("--model.levels", 1), "level"),
        (("--accumulation", 3), "multiple of 3"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_leaves_nothing(
    flags: tuple[object, ...], word: str, refuse: Refuse, tmp_path: Path
) -> None:
    refuse(USAGE, (word,), *_tokenizer(tmp_path, *flags))


def test_a_model_that_cannot_be_built_leaves_nothing(refuse: Refuse, pipeline: Pipeline, tmp_path: Path) -> None:
    call = ("train_latent", "--config", pipeline.model / "config.yaml", "--out", tmp_path / "x")
    refuse(USAGE, ("patches of 4",), *call, "--model.dit.patch", 4)
    refuse(USAGE, ("batch size 64", "multiple of 3"), *call, "--accumulation", 3)
    call = ("train_features", "--out", tmp_path / "x")
    refuse(USAGE, ("width",), *call, "--width", 9)
    refuse(USAGE, ("multiple of 3",), *call, "--accumulation", 3)


def test_debug_shows_the_traceback_as_well(script: Script, tmp_path: Path) -> None:
    told = script("encode", "--tokenizer", tmp_path, "--debug")
    assert told.code == DATA
    assert "Traceback" in told.err and told.err.strip().splitlines()[-1].startswith("  fix: ")


def test_an_interrupt_ends_with_130(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("midway.gen.diffusion.load.load_model", interrupt)
    told = script("sample", "--model", tmp_path)
    assert told.code == 130 and told.err == "interrupted\n"
