"""One table of invalid calls: exit code, three lines (what, why, fix) with the words that matter, and nothing written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import import_tokenizer
import numpy as np
import pytest
import torch
import train_baseline
import train_features
import train_latent
import train_tokenizer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image
from pipelines import TINY, TINY_DIT, Pipeline, Script

from baseline_tasks import FlowTask
from midway.gen.baselines.flow_config import glow, nice
from midway.gen.core import checkpoints
from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.evaluation import tokenizers
from midway.gen.tokenizer.latents import encode, save_latents
from tasks import LatentTask, TokenizerConfig, TokenizerTask

# ---- inputs, made once and only if a row names them ----

Maker = Callable[[Pipeline, Path], Path]


def seal(checkpoint: Path) -> None:
    """A manifest that agrees with the files, as if they had been saved so."""
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.write_manifest(checkpoint, int(checkpoint.name[5:]), {})


def changed(kind: str, change: Callable[[Path], object]) -> Maker:
    """A copy of a run of the pipeline, changed in place."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        run = Path(shutil.copytree(getattr(pipeline, kind), folder / "run"))
        change(run)
        return run

    return make


def edit_checkpoint(pattern: str, edit: Callable[[bytes], bytes], sealed: bool) -> Callable[[Path], None]:
    """Edit one file of a checkpoint; `sealed`: its manifest agrees with that."""

    def change(run: Path) -> None:
        (file,) = run.glob(pattern)
        file.write_bytes(edit(file.read_bytes()))
        if sealed:
            seal(next(parent for parent in file.parents if parent.name.startswith("step-")))

    return change


def cut(kind: str, pattern: str, sealed: bool = False) -> Maker:
    """A run in which half of a file of a checkpoint is missing."""
    return changed(kind, edit_checkpoint(pattern, lambda data: data[: len(data) // 2], sealed))


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another model.json, in a checkpoint that agrees with its manifest."""

    def edit(data: bytes) -> bytes:
        description = json.loads(data)
        change(description)
        return json.dumps(description).encode()

    return edit_checkpoint("checkpoints/step-*/model.json", edit, sealed=True)


def with_data(kind: str, **values: object) -> Maker:
    """A run trained on other data, as its config.yaml has it."""

    def change(run: Path) -> None:
        config = read_yaml(run / "config.yaml")
        write_yaml(run / "config.yaml", {**config, "data": {**config["data"], **values}})

    return changed(kind, change)


def config_text(text: str | bytes) -> Maker:
    """A folder with this config.yaml."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return make


def edited(**changes: Any) -> Maker:
    """The configuration of the latent model with other values."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        folder.mkdir(parents=True)
        write_yaml(
            folder / "c.yaml", {**read_yaml(pipeline.model / "config.yaml"), "out": str(folder / "x"), **changes}
        )
        return folder / "c.yaml"

    return make


def photos(*sizes: tuple[int, int], classes: str = "ab", broken: bool = False) -> Maker:
    """Random RGB images of these sizes (width, height), two each, in class folders."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        generator = np.random.default_rng(0)
        for i, (width, height) in enumerate(4 * sizes if len(sizes) == 1 else 2 * sizes):
            for label in classes or ".":
                path = folder / label / f"{i}{label.strip('.')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if broken:
            path = folder / "a/0a.png"
            path.write_bytes(path.read_bytes()[:60])
        return folder

    return make


def samples(damage: Callable[[bytearray], bytes]) -> Maker:
    """30 images of 8x8 pixels, one of them damaged."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)):
            Image.fromarray(image).save(folder / f"{index:03d}.png")
        file = folder / "007.png"
        file.write_bytes(damage(bytearray(file.read_bytes())))
        return folder

    return make


def flipped(data: bytearray) -> bytes:
    """The data with the byte in the middle inverted."""
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def cache(change: str) -> Maker:
    """Latents of another tokenizer, or of another split."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        run = pipeline.tokenizer
        if change == "tokenizer":
            task = TokenizerTask(
                folder / "t", model=TokenizerConfig(width=16, downsample=4), train=replace(TINY, steps=1)
            )
            train_tokenizer.train(task)
            run = task.out
        tokenizer, data = load_tokenizer(run)
        split = replace(data, split_seed=1) if change == "split" else data
        folder.mkdir(exist_ok=True)
        save_latents(encode(tokenizer, load_splits(split).train), folder / "latents.safetensors")
        return folder / "latents.safetensors"

    return make


def weights_of_features(pipeline: Pipeline, folder: Path) -> Path:
    return next(pipeline.features.glob("checkpoints/step-*/features.safetensors"))


def other_features(pipeline: Pipeline, folder: Path) -> Path:
    """A feature network of other images."""
    task = train_features.FeaturesTask(folder, DataConfig(held_out=0.4), width=8, dim=8, train=replace(TINY, steps=1))
    train_features.train(task)
    return folder


def with_foreign_solvers(pipeline: Pipeline, folder: Path) -> Path:
    """A latent model with the learned solvers of another."""
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    train_latent.train(LatentTask(folder, pipeline.tokenizer, model=config, train=replace(TINY, steps=1)))
    shutil.copytree(pipeline.model / "solvers", folder / "solvers")
    return folder


def two_feature_runs(pipeline: Pipeline, folder: Path) -> Path:
    """A tokenizer `a` beside two feature runs of its images, of which `large` takes larger ones."""
    for name, run in (("a", pipeline.tokenizer), ("features", pipeline.features)):
        shutil.copytree(run, folder / name)
    task = train_features.FeaturesTask(
        folder / "large", DataConfig(resize=16), width=8, dim=8, train=replace(TINY, steps=1)
    )
    config = train_features.train(task).path / "config.yaml"  # pyright: ignore[reportOptionalMemberAccess]
    write_yaml(config, {**read_yaml(config), "data": read_yaml(pipeline.features / "config.yaml")["data"]})
    return folder


BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def rgb_autoencoder(pipeline: Pipeline, folder: Path) -> Path:
    AutoencoderKL(**BLOCKS, latent_channels=2).save_pretrained(folder)
    return folder


def constant_autoencoder(pipeline: Pipeline, folder: Path) -> Path:
    """A VQ model of grey images whose latents are the same for all images."""
    model = VQModel(**BLOCKS, in_channels=1, out_channels=1, num_vq_embeddings=16)
    torch.nn.init.zeros_(model.quant_conv.weight)
    model.save_pretrained(folder)
    return folder


def imported(pipeline: Pipeline, folder: Path) -> Path:
    """The run of an imported VQ model."""
    VQModel(**BLOCKS, in_channels=1, out_channels=1, num_vq_embeddings=16).save_pretrained(folder / "source")
    data = DataConfig(held_out=0.9)
    import_tokenizer.run(import_tokenizer.ImportTask(str(folder / "source"), folder / "run", data=data))
    return folder / "run"


def flow(**options: Any) -> Maker:
    """A flow baseline trained for no step or one."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        train = replace(TINY, batch_size=32, validate_every=0, **{"steps": 1, **options.pop("train", {})})
        train_baseline.train(FlowTask(out=folder, **{"model": nice(8, 2), **options}, train=train))
        return folder

    return make


def of_levels(levels: int) -> Maker:
    """A flow of this number of grey levels."""

    def make(pipeline: Pipeline, folder: Path) -> Path:
        run = flow()(pipeline, folder)
        rewritten(lambda description: description.update(levels=levels))(run)
        return run

    return make


def a_file(pipeline: Pipeline, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "me.png").write_bytes(b"x")
    return folder


def empty(pipeline: Pipeline, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


STEP, SOLVER_RUN = "checkpoints/step-*", "solvers/amed-uniform-nfe4"
MODEL_FILES = {
    "ema": "ema.safetensors",
    "json": "model.json",
    "inner": "tokenizer/*.safetensors",
    "config": "tokenizer/config.json",
}
CUT: dict[str, tuple[str, str]] = {
    **{name: ("model", f"{STEP}/{pattern}") for name, pattern in MODEL_FILES.items()},
    **{f"tokenizer_{name}": ("tokenizer", f"{STEP}/{MODEL_FILES[name]}") for name in ("inner", "config")},
    "features": ("features", f"{STEP}/features.safetensors"),
    "solver": ("model", f"{SOLVER_RUN}/{STEP}/solver.safetensors"),
}
PLACES: dict[str, Maker] = {
    **{f"cut_{name}": cut(*where) for name, where in CUT.items()},
    **{f"sealed_{name}": cut(*where, sealed=True) for name, where in CUT.items()},
    "cut_optimizer": cut("model", f"{STEP}/optimizer.safetensors"),
    "cut_best": cut("baseline", "best/step-*/ema.safetensors"),
    **{
        f"unfinished_{kind}": changed(kind, lambda run: shutil.rmtree(run / "checkpoints"))
        for kind in ("model", "tokenizer", "features")
    },
    "unfinished_solver": changed("model", lambda run: shutil.rmtree(run / SOLVER_RUN / "checkpoints")),
    "no_snapshots": changed("model", lambda run: shutil.rmtree(run / "posthoc")),
    "other_width": changed("model", rewritten(lambda description: description["config"]["dit"].update(width=64))),
    "tokenizer_of_another_split": with_data("tokenizer", split_seed=7),
    "tokenizer_of_another_size": with_data("tokenizer", resize=16),
    "two_feature_runs": two_feature_runs,
    "rgb": rgb_autoencoder,
    "constant": constant_autoencoder,
    "imported": imported,
    "empty_sample": samples(lambda data: b""),
    "flipped_sample": samples(flipped),
    "halved_sample": samples(lambda data: bytes(data[: len(data) // 2])),
    "no_kind": config_text(""),
    "list_kind": config_text("- a\n- b\n"),
    "number_kind": config_text("kind: 3\n"),
    "bad_yaml": config_text("a: [1, 2\n"),
    "list_yaml": config_text("- 1\n"),
    "binary_yaml": config_text(b"\xff\xfe\x00"),
    "extra_key": edited(tokeniser="x"),
    "extra_inner_key": edited(train={"step": 3}),
    "wrong_type": edited(train={"steps": "many"}),
    "negative_rate": edited(train={"lr": -1.0}),
    "wrong_target": edited(model={"target": "noise"}),
    "wrong_heads": edited(model={"dit": {"width": 30}}),
    "no_mapping": edited(model=3),
    "images": photos((12, 12)),
    "wide": photos((16, 12)),
    "sizes": photos((12, 12), (20, 20)),
    "broken": photos((12, 12), broken=True),
    "flat": photos((8, 8), classes=""),
    "empty": empty,
    "a_file": a_file,
    "cache_of_tokenizer": cache("tokenizer"),
    "cache_of_split": cache("split"),
    "weights_of_features": weights_of_features,
    "other_features": other_features,
    "foreign_solvers": with_foreign_solvers,
    "new_flow": flow(model=glow(8, 1, 2), train={"steps": 0}),
    "flow": flow(),
    "flow_of_other_images": flow(data=DataConfig(held_out=0.3)),
    "flow_of_256_levels": of_levels(256),
    "flow_of_4_levels": of_levels(4),
}


class Places(dict[str, object]):
    """Paths by name, made when a row first asks for them."""

    def __init__(self, pipeline: Pipeline, root: Path, known: dict[str, object]) -> None:
        super().__init__(known)
        self.pipeline, self.root = pipeline, root

    def __missing__(self, name: str) -> object:
        self[name] = PLACES[name](self.pipeline, self.root / name)
        return self[name]


@pytest.fixture(scope="module")
def places(pipeline: Pipeline, unconditional: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    runs = {name: getattr(pipeline, name) for name in ("model", "tokenizer", "features", "baseline")}
    root = tmp_path_factory.mktemp("places")
    return Places(pipeline, root, {**runs, "unconditional": unconditional, "gone": root / "gone"})


# ---- the table ----

SAMPLE = "sample --model {model} --n 2 --out {out}/grid.png --nfe 4 --grid uniform"
EVALUATE = (
    "evaluate --model {model} --features {features} --out {out} --n 16 --reference-nfe 8 --solvers ddim --nfe 4 "
    "--grids uniform"
)
SOLVER = "train_solver amed --model {model}"
TOKENIZER = "train_tokenizer digits-fsq --steps 1 --batch-size 4 --model.width 16 --out {out}"
LATENT = "train_latent digits-dit --out {out} --tokenizer {tokenizer}"
CONFIG = "train_latent --config"
ENCODE = "encode --tokenizer"
BASELINE = "train_baseline vae --out {out} --steps 1"
LIKELIHOOD = "evaluate_likelihood --out {out} --n 20 --models"
TOKENIZERS = "evaluate_tokenizer --out {out} --tokenizers"
IMAGES = "evaluate --data digits --features {features} --out {out} --blocks 1 --images"
IMPORT = "import_tokenizer --data digits --held-out 0.9 --out {out} --source"
USAGE, DATA, DIVERGED = 2, 3, 4
TABLE: dict[int, dict[str, list[tuple[str, str]]]] = {
    # exit code: what is tested: (arguments, words separated by |)
    USAGE: {
        "unknown names": [
            (f"{SAMPLE} --solver hune", "'hune'|did you mean 'heun'?|amed-constants"),
            (f"{EVALUATE} --solvers hune", "'hune'|did you mean 'heun'?|amed-constants"),
            *[
                (f"{call} {solver} {grid} karas", "'karas'|did you mean 'karras'?")
                for call, solver, grid in (
                    (SAMPLE, "--solver ddim", "--grid"),
                    (SAMPLE, "--solver amed", "--grid"),
                    (EVALUATE, "--solvers ddim", "--grids"),
                    (EVALUATE, "--solvers amed", "--grids"),
                )
            ],
            ("train_tokenizer digit-fsq --out {out}", "'digit-fsq'|did you mean 'digits-fsq'?"),
            ("train_latent digits-dti --out {out}", "'digits-dti'|did you mean 'digits-dit'?"),
            ("train_solver amedd --out {out}", "'amedd'|did you mean 'amed'?"),
            ("train_baseline digits-gloww", "'digits-gloww'|did you mean 'digits-glow'?"),
            ("train_baseline --steps 3", "digits-glow"),
            ("train_solver --model {model} --solver amde", "amde|did you mean 'amed'?"),
            ("train_solver --model {model} --grid unifrom", "unifrom|did you mean 'uniform'?"),
            ("train_solver --model {model} --distill.teacher hein", "hein|did you mean 'heun'?"),
        ],
        "budgets": [
            (f"{SAMPLE} --solver heun --nfe 7", "heun|NFE 7|6 or 8|analytic first step"),
            (f"{EVALUATE} --solvers heun --nfe 7", "heun|NFE 7|6 or 8|analytic first step"),
            (f"{SAMPLE} --solver heun --nfe 6 --analytic-first", "NFE 6|5 or 7|analytic first step"),
            (f"{EVALUATE} --solvers heun --nfe 6 --analytic-first", "NFE 6|5 or 7|analytic first step"),
            (f"{SOLVER} --nfe 2,7 --distill.analytic-first False", "NFE 7|6 or 8"),
            *[
                (f"{call} --nfe={text}", "--nfe|4,6,8")
                for call in (EVALUATE, SOLVER)
                for text in ("", "4,x", "0", "4,-2", "4.5")
            ],
        ],
        "evaluate": [
            (f"{EVALUATE} {flags}", word)
            for flags, word in (
                ("--n 1", "--n"),
                ("--n 0", "--n"),
                ("--blocks 0", "--blocks"),
                ("--batch-size 0", "--batch-size"),
                ("--reference-nfe 1", "--reference-nfe"),
                ("--reference-nfe 7", "--reference-nfe"),
                ("--solvers ,", "--solvers"),
                ("--grids=", "--grids"),
                ("--eta 0.5 --solvers ddim,heun", "--eta"),
                ("--eta 0.5 --solvers ddim,amed", "--eta"),
                ("--eta 1.5", "eta"),
                ("--analytic-first --solvers amed", "analytic first step"),
            )
        ],
        "sample": [
            (f"{SAMPLE} {flags}", word)
            for flags, word in (
                ("--n 0", "--n"),
                ("--seed -1", "--seed"),
                ("--batch-size 0", "--batch-size"),
                ("--label 10", "classes 0 to 9"),
                ("--label -1", "classes 0 to 9"),
                ("--out grid.jpg", ".png"),
                ("--out grid", ".png"),
                ("--solver heun --eta 0.5", "--eta"),
                ("--solver amed --eta 0.5", "--eta"),
                ("--solver ddim --eta -0.5", "eta"),
                ("--solver amed-constants --analytic-first", "analytic first step"),
                ("--solver amed --nfe 4 --parallel gaussian", "-constants"),
                ("--parallel picard --tolerance -1", "tolerance"),
                ("--parallel picard --window 0", "window"),
            )
        ],
        "guidance": [
            *[
                (f"{call} {flags}", word)
                for call in (SAMPLE, EVALUATE)
                for flags, word in (
                    ("--guidance-interval 0.1 5", "nothing is guided"),
                    ("--guide {model}", "nothing is guided"),
                    ("--guidance 2 --guidance-interval 5 0.1", "low < high"),
                    ("--model {unconditional} --guidance 2", "without classes|--guidance"),
                )
            ],
            ("train_solver amed --model {unconditional} --guidance 2", "without classes|--guidance"),
            (f"{SAMPLE} --model {{unconditional}} --label 0", "without classes|--label"),
        ],
        "learned solvers": [
            (f"{SAMPLE} --solver amed --nfe 6", "amed at NFE 6|train_solver.py amed --model {model} --nfe 6"),
            (f"{EVALUATE} --solvers ddim,amed --nfe 4,6", "amed at NFE 6|train_solver.py amed --model {model} --nfe 6"),
            (f"{SAMPLE} --solver amed --guidance 2", "guidance 1.0|guidance 2.0|--guidance 1.0"),
            (f"{EVALUATE} --solvers amed --guidance 2", "guidance 1.0|guidance 2.0|--guidance 1.0"),
        ],
        "existing outputs": [
            ("train_tokenizer digits-fsq --out {tokenizer}", "--overwrite"),
            ("train_features --out {features}", "--overwrite"),
            (f"{CONFIG} {{model}}/config.yaml", "--overwrite"),
            (f"{SOLVER} --nfe 4 --grid uniform", "--overwrite"),
            ("train_tokenizer digits-fsq --overwrite --out {a_file}", "no run directory"),
            ("train_tokenizer digits-fsq --overwrite --out {a_file}/me.png", "no run directory"),
            (f"{ENCODE} {{tokenizer}}", "exists|--overwrite"),
            (f"{ENCODE} {{tokenizer}} --batch-size 0", "--batch-size 0"),
            ("evaluate_likelihood --n 20 --models {baseline} --out {baseline}", "run directory"),
        ],
        "configuration files": [
            (f"{CONFIG} {{extra_key}}", "'tokeniser'|did you mean 'tokenizer'?"),
            (f"{CONFIG} {{extra_inner_key}}", "'step'|did you mean 'steps'?"),
            (f"{CONFIG} {{wrong_type}}", "train.steps|'many'|int"),
            (f"{CONFIG} {{negative_rate}}", "train|lr"),
            (f"{CONFIG} {{wrong_target}}", "model.target|'noise'|'eps'"),
            (f"{CONFIG} {{wrong_heads}}", "model.dit|width 30"),
            (f"{CONFIG} {{no_mapping}}", "model|not a mapping"),
            (f"{CONFIG} {{gone}}.yaml", "no file"),
            (f"{CONFIG} {{bad_yaml}}/config.yaml", "not YAML"),
            (f"{CONFIG} {{binary_yaml}}/config.yaml", "not YAML"),
            (f"{CONFIG} {{list_yaml}}/config.yaml", "not a mapping"),
            (CONFIG, "--config needs a file"),
            (f"{CONFIG} {{features}}/config.yaml", "unknown key"),
            ("train_features --config {model}/config.yaml", "unknown key"),
        ],
        "images and sizes": [
            (f"{TOKENIZER} --data {{wide}} --held-out 0.5", "12x16|square|--resize 12"),
            (f"{TOKENIZER} --data digit", "data source|did you mean 'digits'?"),
            (f"{TOKENIZER} --data {{images}} --held-out 0.5 --resize 0", "resize"),
            (f"{TOKENIZER} --data {{images}} --held-out 1", "held_out=1.0"),
            (f"{TOKENIZER} --model.downsample 3", "downsample"),
            (f"{TOKENIZER} --model.downsample 16", "downsample"),
            (f"{TOKENIZER} --model.levels 1", "level"),
            (f"{TOKENIZER} --accumulation 3", "multiple of 3"),
            (f"{TOKENIZER} --model.options normalize", "--model.options"),
            (f"{TOKENIZER} --model.options [1]", "--model.options"),
            (f'{TOKENIZER} --model.options {{{{"no":1}}}}', "tokenizer cannot be built"),
            (f"{LATENT} --model.dit.patch 4", "patches of 4"),
            (f"{LATENT} --accumulation 3", "multiple of 3"),
            ("train_features --out {out} --width 9", "width"),
            ("train_features --out {out} --accumulation 3", "multiple of 3"),
        ],
        "baselines": [
            (f"{BASELINE} --model.downsample 16", "downsample 16|--model"),
            (f"{BASELINE} --conditional --data {{flat}} --held-out 0.5", "--conditional|no classes"),
            (f"{BASELINE} --draws 0", "--draws 0"),
            (f"{BASELINE} --validation-images 0", "--validation-images 0"),
            (
                "train_baseline tarflow --out {out} --model.noise gaussian --validate-every 3",
                "--validate-every 3|uniform",
            ),
            (f"{LIKELIHOOD} {{baseline}} {{baseline}}", "twice"),
            (f"{LIKELIHOOD} {{baseline}} --n 1", "--n 1"),
            (f"{LIKELIHOOD} {{baseline}} --draws 0", "draws is 0"),
            (f"{LIKELIHOOD} {{baseline}} --iwae -1", "--iwae -1"),
        ],
        "tokenizers": [
            *[
                (f"{TOKENIZERS} {{tokenizer}} {flags}", words)
                for flags, words in (
                    ("--n 1", "--n 1"),
                    ("--n 100000", "359 images are held out"),
                    ("--noise 0.1 -1", "sigma is finite and >= 0"),
                    ("--batch-size 0", "--batch-size 0"),
                    ("--lpips-weights nowhere.pth", "LPIPS cannot be measured"),
                    ("{model}/../tokenizer", "named twice"),
                )
            ],
            (f"{TOKENIZERS} {{tokenizer_of_another_split}}", "found: none"),
            (f"{TOKENIZERS} {{two_feature_runs}}/a", "found: features, large"),
            (f"{IMPORT} {{rgb}} --resize 16", "this takes 3|pass --channels 3"),
            (f"{IMPORT} {{rgb}} --channels 3 --resize 9", "image_size is 9"),
            (f"{IMPORT} {{rgb}} --batch-size 0", "--batch-size 0"),
        ],
        "averages": [
            ("posthoc_ema {model} --out {out} --std 0.5", "width"),
            ("posthoc_ema {model} --out {out} --std nan", "width"),
            ("posthoc_ema {model} --out {out} --std 0.08 --step 26", "step 26"),
        ],
        "data": [
            ("data check digit --out {out}", "did you mean 'digits'?"),
            ("data check digits --held-out 0 --out {out}", "held_out"),
            ("data check digits --channels 2 --out {out}", "channels"),
            ("data check digits --against digit --out {out}", "did you mean 'digits'?"),
            ("data chek digits", "did you mean 'check'"),
        ],
        "weights": [("download_weights incepton", "incepton|did you mean 'inception'?")],
    },
    DATA: {
        "missing runs": [
            (f"{SAMPLE} --model {{gone}}", "{gone}|config.yaml|latent_model"),
            (f"{EVALUATE} --model {{gone}}", "{gone}|config.yaml|latent_model"),
            (f"{EVALUATE} --features {{gone}}", "{gone}|config.yaml|features"),
            (f"{ENCODE} {{gone}}", "{gone}|config.yaml|tokenizer"),
            (f"{LATENT} --tokenizer {{gone}}", "{gone}|config.yaml|tokenizer"),
            ("train_solver amed --model {gone}", "{gone}|config.yaml|latent_model"),
            (f"{LIKELIHOOD} {{empty}}", "{empty}"),
            ("verify_resume {empty}", "{empty}"),
            (f"{TOKENIZERS} {{tokenizer}} --features {{gone}}", "{gone} is not a run directory"),
            (f"{TOKENIZERS} {{tokenizer}} {{gone}}", "{gone} is not a run directory"),
            (f"{IMPORT} {{gone}}/vae", "has no configuration"),
        ],
        "other kinds": [
            (f"{SAMPLE} --model {{tokenizer}}", "'tokenizer'|'latent_model'"),
            (f"{EVALUATE} --model {{tokenizer}}", "'tokenizer'|'latent_model'"),
            ("train_solver amed --model {tokenizer}", "'tokenizer'|'latent_model'"),
            (f"{EVALUATE} --features {{model}}", "'latent_model'|'features'"),
            (f"{ENCODE} {{features}}", "'features'|'tokenizer'"),
            (f"{LATENT} --tokenizer {{features}}", "'features'|'tokenizer'"),
            (f"{LIKELIHOOD} {{features}}", "'features'"),
            (f"{TOKENIZERS} {{features}}", "kind 'features'"),
            ("verify_resume {imported}", "imported, not trained"),
            ("train_tokenizer --config {imported}/config.yaml --out {out}", "imported, not trained"),
            *[
                (f"{SAMPLE} --model {{{name}}}", "of kind|'latent_model'")
                for name in ("no_kind", "list_kind", "number_kind")
            ],
        ],
        "unfinished runs": [
            (f"{ENCODE} {{unfinished_tokenizer}}", "no checkpoint|--resume auto|--overwrite"),
            (f"{EVALUATE} --features {{unfinished_features}}", "no checkpoint|--resume auto|--overwrite"),
            (f"{SAMPLE} --model {{unfinished_model}}", "no checkpoint|--resume auto|--overwrite"),
            (f"{SAMPLE} --model {{unfinished_solver}} --solver amed", "no checkpoint|--resume auto|--overwrite"),
        ],
        "damaged runs": [
            *[
                (f"{SAMPLE} --model {{cut_{name}}}", f"damaged|{pattern.split('*')[0]}|--resume auto")
                for name, pattern in {**MODEL_FILES, "optimizer": "optimizer.safetensors"}.items()
            ],
            *[(f"{SAMPLE} --model {{sealed_{name}}}", "cannot be read|again") for name in MODEL_FILES],
            (f"{SAMPLE} --model {{other_width}}", "cannot be read|again"),
            *[(f"{ENCODE} {{cut_tokenizer_{name}}}", "damaged|tokenizer/") for name in ("inner", "config")],
            *[(f"{ENCODE} {{sealed_tokenizer_{name}}}", "cannot be read|again") for name in ("inner", "config")],
            (f"{EVALUATE} --features {{cut_features}}", "damaged|features.safetensors"),
            (f"{EVALUATE} --features {{sealed_features}}", "features.safetensors|cannot be read|train_features"),
            (f"{SAMPLE} --model {{cut_solver}} --solver amed", "damaged|solver.safetensors"),
            (f"{LIKELIHOOD} {{cut_best}}", "damaged|ema.safetensors"),
            (
                f"{SAMPLE} --model {{sealed_solver}} --solver amed",
                "solver.safetensors|cannot be read|train_solver.py amed|--nfe 4|--overwrite",
            ),
        ],
        "runs that do not fit": [
            (f"{EVALUATE} --features {{other_features}}", "trained on other images|train features"),
            (f"{LATENT} --latents {{cache_of_tokenizer}}", "stale|tokenizer is|encode.py"),
            (f"{LATENT} --latents {{cache_of_split}}", "stale|data is|encode.py"),
            (f"{LATENT} --latents {{weights_of_features}}", "latent cache|encode.py"),
            (f"{LATENT} --latents {{gone}}", "no latents at|encode.py"),
            (
                f"{SAMPLE} --model {{foreign_solvers}} --solver amed",
                "other weights|--model {foreign_solvers} --nfe 4 --grid uniform --overwrite",
            ),
            (
                f"{EVALUATE} --model {{foreign_solvers}} --solvers amed",
                "other weights|--model {foreign_solvers} --nfe 4 --grid uniform --overwrite",
            ),
            (f"{LIKELIHOOD} {{new_flow}} --features none", "not been initialised from data"),
            (f"{LIKELIHOOD} {{flow}} {{flow_of_256_levels}}", "other levels"),
            (f"{LIKELIHOOD} {{flow_of_4_levels}} --features none", "none of 4 levels"),
            (f"{LIKELIHOOD} {{flow}} {{flow_of_other_images}}", "trained on other images"),
            ("posthoc_ema {no_snapshots} --std 0.1 --out {out}", "--posthoc 0.05 0.10"),
            (f"{TOKENIZERS} {{tokenizer}} {{tokenizer_of_another_split}}", "trained on other images"),
            (
                f"{TOKENIZERS} {{tokenizer_of_another_split}} --features {{features}}",
                "trained on other images than the tokenizers",
            ),
            (f"{TOKENIZERS} {{tokenizer_of_another_size}} --features none", "takes (1, 8, 8) images"),
            (
                f"{TOKENIZERS} {{two_feature_runs}}/a --features {{two_feature_runs}}/large",
                "measures (1, 16, 16) images",
            ),
            (f"{IMPORT} {{constant}}", "cannot be standardised"),
        ],
        "images": [
            *[(f"{IMAGES} {{{damage}_sample}}", "007.png") for damage in ("empty", "flipped", "halved")],
            (f"{IMAGES} {{images}}", "12|--images-resize"),
            ("data check {empty}", "empty"),
            ("data check {empty}/nowhere", "does not exist"),
            (f"{TOKENIZER} --held-out 0.5 --data {{empty}}/nowhere", "does not exist"),
            (f"{TOKENIZER} --held-out 0.5 --data {{empty}}", "empty"),
            (f"{TOKENIZER} --held-out 0.01 --data {{images}}", "split"),
            (f"{TOKENIZER} --held-out 0.5 --data {{broken}}", "0a.png"),
            (f"{TOKENIZER} --held-out 0.5 --data {{sizes}}", "--resize"),
        ],
    },
    DIVERGED: {"samples": [(f"{SAMPLE} --guidance 1e38 --nfe 8", "diverged|finite")]},
}
ROWS = [
    pytest.param(code, arguments, words, id=f"{topic}-{i}")
    for code, topics in TABLE.items()
    for topic, rows in topics.items()
    for i, (arguments, words) in enumerate(rows)
]


def files(*roots: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file, and every directory, under these folders."""
    found = (path for root in roots for path in root.rglob("*"))
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0) for p in found}


@pytest.mark.parametrize(("code", "arguments", "words"), ROWS)
def test_an_invalid_call_exits_with_three_lines_and_writes_nothing(
    code: int,
    arguments: str,
    words: str,
    script: Script,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it measure a tokenizer first."""
    monkeypatch.setattr(tokenizers, "measure", None)
    places["out"] = tmp_path / "out"
    call = [part.format_map(places) for part in arguments.split(" ")]
    roots = (places.pipeline.root, places.root, tmp_path)
    before = files(*roots)
    done = script(*call)
    assert done.code == code, done
    assert files(*roots) == before
    lines = done.err.strip().splitlines()
    assert [line[:7] for line in lines[-3:]] == ["error: ", "  why: ", "  fix: "], done.err
    assert all(len(line) > 11 for line in lines[-3:]) and "Traceback" not in done.err
    assert [word for word in words.format_map(places).split("|") if word not in "\n".join(lines[-3:])] == [], done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sample --model m --solvr ddim", "Unrecognized|--solver"),
        ("evaluate --model m --features f --solver ddim", "Unrecognized|--solvers"),
        ("train_tokenizer digits-fsq --levels 8", "Unrecognized|--model.levels"),
        ("train_latent digits-dit --model.width 64", "Unrecognized|--model.dit.width"),
        ("train_features --withd 8", "Unrecognized|--width"),
        ("train_solver amed --model m --trajectories 9", "Unrecognized|--distill.trajectories"),
        ("encode --tokeniser t --tokenizer t", "Unrecognized|--tokenizer"),
        ("sample", "--model"),
        ("evaluate", "--model"),
        ("encode", "--tokenizer"),
        ("train_solver amed", "--model"),
        ("sample --model m --nfe few", "--nfe|few"),
        ("train_latent digits-dit --model.dit.width 30", "width 30"),
        ("train_latent digits-dit --model.target noise", "noise|eps"),
        ("train_tokenizer digits-fsq --betas 0.9", "betas"),
        ("train_tokenizer digits-fsq --lr -1", "lr"),
        ("train_tokenizer digits-fsq --ema 1", "ema"),
        ("train_tokenizer digits-fsq --batch-size 0", "batch_size"),
        ("train_tokenizer digits-fsq --log-every 0", "log_every"),
        ("train_tokenizer digits-fsq --accumulation 0", "accumulation"),
    ],
)
def test_a_flag_that_cannot_be_parsed_exits_with_2(arguments: str, words: str, script: Script) -> None:
    done = script(*arguments.split(" "))
    assert done.code == USAGE
    assert all(word in done.err for word in words.split("|")) and "Traceback" not in done.err


# ---- other endings ----


def test_training_that_diverges_exits_with_4(script: Script, pipeline: Pipeline, tmp_path: Path) -> None:
    done = script(
        *("train_latent", "--config", pipeline.model / "config.yaml", "--out", tmp_path / "m"),
        *("--lr", 1e30, "--warmup", 0, "--patience", 3),
    )
    assert done.code == DIVERGED and "diverged by step" in done.err and "--lr" in done.err
    assert not (tmp_path / "m/checkpoints").exists()


def test_valid_neighbours_of_the_table_run(script: Script, places: Places, tmp_path: Path) -> None:
    """An unconditional model samples, and an image folder trains."""
    places["out"] = tmp_path
    done = script(*f"{SAMPLE} --model {{unconditional}}".format_map(places).split())
    assert done.code == 0 and (tmp_path / "grid.png").exists(), done.err
    places["out"] = tmp_path / "run"
    done = script(*f"{TOKENIZER} --data {{images}} --held-out 0.5".format_map(places).split())
    assert done.code == 0 and "4 images, 12x12" in done.out, done.err


def test_debug_prints_the_traceback_as_well(script: Script, tmp_path: Path) -> None:
    done = script("encode", "--tokenizer", tmp_path, "--debug")
    assert done.code == DATA
    assert "Traceback" in done.err and done.err.strip().splitlines()[-1].startswith("  fix: ")


def test_an_interrupt_exits_with_130(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("midway.gen.diffusion.load.load_model", interrupt)
    done = script("sample", "--model", tmp_path)
    assert done.code == 130 and done.err == "interrupted\n"
