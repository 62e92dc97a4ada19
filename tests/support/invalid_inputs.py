"""Invalid inputs by name: damaged, unfinished and foreign runs, bad configurations and images, made from the pipeline's runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from artefacts import WRONG_AMED, WRONG_TABLES, Change, add_table, change_solver
from damages import damage
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers_models import AUTOENCODER
from pictures import noise, save
from pipelines import TINY, TINY_DIT, Pipeline
from resuming import seal
from safetensors.torch import load, load_file
from safetensors.torch import save as save_tensors

from midway.gen.baselines.flow_config import glow, nice
from midway.gen.commands import import_tokenizer
from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.baseline_tasks import FlowTask
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.objectives.jump_config import JumpConfig
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.trainings import train_baseline, train_features, train_latent, train_tokenizer

Maker = Callable[[Pipeline, Path], Path]
"""(pipeline, an empty folder) -> what is made in it."""
P = ParamSpec("P")


def maker(make: Callable[Concatenate[Pipeline, Path, P], Path]) -> Callable[P, Maker]:
    """The function without its first two arguments, which returns a Maker."""
    return lambda *args, **options: lambda pipeline, folder: make(pipeline, folder, *args, **options)


@maker
def changed(pipeline: Pipeline, folder: Path, kind: str, change: Callable[[Path], object]) -> Path:
    """A copy of a run of the pipeline, changed in place."""
    run = Path(shutil.copytree(getattr(pipeline, kind), folder / "run"))
    change(run)
    return run


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


def reconfigured(kind: str, key: str, *value: object) -> Maker:
    """A run whose config.yaml has another value of this key, or none."""

    def change(run: Path) -> None:
        config = {name: own for name, own in read_yaml(run / "config.yaml").items() if name != key}
        write_yaml(run / "config.yaml", {**config, **({key: value[0]} if value else {})})

    return changed(kind, change)


def with_tensors(kind: str, pattern: str, harm: str) -> Maker:
    """A run with other tensors in a file of a checkpoint that agrees with them."""

    def change(run: Path) -> None:
        (file,) = run.glob(pattern)
        damage(file, harm)
        seal(next(parent for parent in file.parents if parent.name.startswith("step-")))

    return changed(kind, change)


def pickled(run: Path) -> None:
    """The tokenizer's weights as an honest pickle alone."""
    (file,) = run.glob(f"{STEP}/{MODEL_FILES['inner']}")
    torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
    file.unlink()
    seal(file.parents[1])


def in_a_folder(run: Path) -> None:
    """config.yaml is a folder."""
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()


def scaled(data: bytes) -> bytes:
    """Weights a little off."""
    return save_tensors(
        {name: value * 1.001 if value.is_floating_point() else value for name, value in load(data).items()}
    )


def of_another_tokenizer(run: Path) -> None:
    """Other weights of a model, and of the tokenizer inside."""
    for pattern in (f"{STEP}/ema.safetensors", f"{STEP}/tokenizer/*.safetensors"):
        edit_checkpoint(pattern, scaled, sealed=True)(run)


def as_guide(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Other weights and another model.json."""

    def edit(run: Path) -> None:
        edit_checkpoint(f"{STEP}/ema.safetensors", scaled, sealed=True)(run)
        rewritten(change)(run)

    return edit


def with_data(kind: str, **values: object) -> Maker:
    """A run trained on other data, as its config.yaml has it."""

    def change(run: Path) -> None:
        config = read_yaml(run / "config.yaml")
        write_yaml(run / "config.yaml", {**config, "data": {**config["data"], **values}})

    return changed(kind, change)


@maker
def with_file(pipeline: Pipeline, folder: Path, name: str, content: str | bytes) -> Path:
    """A folder with this file alone."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@maker
def edited(pipeline: Pipeline, folder: Path, **changes: Any) -> Path:
    """The configuration of the latent model with other values."""
    config = read_yaml(pipeline.model / "config.yaml")
    write_yaml(folder / "c.yaml", {**config, "out": str(folder / "x"), **changes})
    return folder / "c.yaml"


@maker
def photos(
    pipeline: Pipeline, folder: Path, *sizes: tuple[int, int], classes: str = "ab", broken: bool = False
) -> Path:
    """Random RGB images of these sizes (width, height), two each, in class folders."""
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate(4 * sizes if len(sizes) == 1 else 2 * sizes):
        for label in classes or ".":
            image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            save(folder / label / f"{i}{label.strip('.')}.png", image)
    if broken:
        (folder / "a/0a.png").write_bytes((folder / "a/0a.png").read_bytes()[:60])
    return folder


@maker
def samples(pipeline: Pipeline, folder: Path, damage: Callable[[bytearray], bytes]) -> Path:
    """30 images of 8x8 pixels, one of them damaged."""
    for index, image in enumerate(noise(30, 8, 8)):
        save(folder / f"{index:03d}.png", image)
    file = folder / "007.png"
    file.write_bytes(damage(bytearray(file.read_bytes())))
    return folder


def flipped(data: bytearray) -> bytes:
    """The data with the byte in the middle inverted."""
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


@maker
def cache(pipeline: Pipeline, folder: Path, change: str) -> Path:
    """Latents of another tokenizer, or of another split."""
    run = pipeline.tokenizer
    if change == "tokenizer":
        task = TokenizerTask(folder / "t", model=TokenizerConfig(width=16, downsample=4), train=replace(TINY, steps=1))
        train_tokenizer.train(task)
        run = task.out
    tokenizer, data = load_tokenizer(run)
    split = replace(data, split_seed=1) if change == "split" else data
    encode(folder / "latents", tokenizer, load_splits(split).train, Encoding())
    return folder / "latents"


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


@maker
def with_wrong_table(pipeline: Pipeline, folder: Path, change: Change) -> Path:
    """A latent model with a learned table that is changed."""
    model = Path(shutil.copytree(pipeline.model, folder / "run"))
    change_solver(add_table(model), change)
    return model


def large_features(pipeline: Pipeline, folder: Path) -> Path:
    """A feature run of the pipeline's images that takes larger ones."""
    task = train_features.FeaturesTask(folder, DataConfig(resize=16), width=8, dim=8, train=replace(TINY, steps=1))
    config = train_features.train(task).path / "config.yaml"  # pyright: ignore[reportOptionalMemberAccess]
    write_yaml(config, {**read_yaml(config), "data": read_yaml(pipeline.features / "config.yaml")["data"]})
    return folder


def rgb_autoencoder(pipeline: Pipeline, folder: Path) -> Path:
    AutoencoderKL(**AUTOENCODER, latent_channels=2).save_pretrained(folder)
    return folder


def constant_autoencoder(pipeline: Pipeline, folder: Path) -> Path:
    """A VQ model of grey images whose latents are the same for all images."""
    model = VQModel(**AUTOENCODER, in_channels=1, out_channels=1, num_vq_embeddings=16)
    torch.nn.init.zeros_(model.quant_conv.weight)
    model.save_pretrained(folder)
    return folder


def blueless(pipeline: Pipeline, folder: Path) -> Path:
    """The pixel tokenizer of images without blue."""
    for index, image in enumerate(noise(30, 8, 8)):
        rgb = np.stack([image, image, 0 * image], -1)
        save(folder / "images" / "ab"[index % 2] / f"{index}.png", rgb)
    model, data = TokenizerConfig(quantizer="identity", downsample=1), DataConfig(str(folder / "images"), held_out=0.2)
    train_tokenizer.train(TokenizerTask(folder / "run", data, model=model, train=replace(TINY, steps=0)))
    return folder / "run"


def imported(pipeline: Pipeline, folder: Path) -> Path:
    """The run of an imported VQ model."""
    VQModel(**AUTOENCODER, in_channels=1, out_channels=1, num_vq_embeddings=16).save_pretrained(folder / "source")
    data = DataConfig(held_out=0.9)
    import_tokenizer.run(import_tokenizer.ImportTask(str(folder / "source"), folder / "run", data=data))
    return folder / "run"


@maker
def jumps(pipeline: Pipeline, folder: Path, **options: Any) -> Path:
    """A latent model that jumps, trained for one step."""
    model = LatentModelConfig(objective="alphaflow", dit=TINY_DIT, jump=JumpConfig(**options))
    train = replace(TINY, steps=1, batch_size=32)
    train_latent.train(LatentTask(folder / "run", pipeline.tokenizer, model=model, train=train))
    return folder / "run"


@maker
def flow(pipeline: Pipeline, folder: Path, **options: Any) -> Path:
    """A flow baseline trained for no step or one."""
    train = replace(TINY, batch_size=32, validate_every=0, **{"steps": 1, **options.pop("train", {})})
    train_baseline.train(FlowTask(out=folder, **{"model": nice(8, 2), **options}, train=train))
    return folder


def new_flow(pipeline: Pipeline, folder: Path) -> Path:
    """A flow whose ActNorms have seen no data, as if its training had never begun."""
    run = flow(model=glow(8, 1, 2), train={"steps": 0})(pipeline, folder)

    def emptied(data: bytes) -> bytes:
        found = load(data)
        return save_tensors({k: torch.zeros_like(v) if k.endswith("initialised") else v for k, v in found.items()})

    for file in sorted(run.glob(f"{STEP}/*.safetensors")):
        edit_checkpoint(f"{STEP}/{file.name}", emptied, sealed=True)(run)
    return run


@maker
def of_levels(pipeline: Pipeline, folder: Path, levels: int) -> Path:
    """A flow of this number of grey levels."""
    run = flow()(pipeline, folder)
    rewritten(lambda description: description.update(levels=levels))(run)
    return run


@maker
def linked(pipeline: Pipeline, folder: Path, kind: str) -> Path:
    """A link to a copy of a run of the pipeline, which holds a sweep's folder of cells as well."""
    run = Path(shutil.copytree(getattr(pipeline, kind), folder / "run"))
    (run / "cells").mkdir()
    (run / "cells" / f"{0:016x}.json").write_text("{}")
    (folder / "link").symlink_to(run)
    return folder / "link"


def loop(pipeline: Pipeline, folder: Path) -> Path:
    """A link to itself."""
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@maker
def with_images(pipeline: Pipeline, folder: Path) -> Path:
    """A tokenizer run with images among its samples."""
    run = Path(shutil.copytree(pipeline.tokenizer, folder / "run"))
    photos((12, 12))(pipeline, run / "samples" / "photos")
    return run


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
    **{f"{kind}_without_data": reconfigured(kind, "data") for kind in ("model", "tokenizer", "features", "baseline")},
    **{
        f"{kind}_of_null_data": reconfigured(kind, "data", None)
        for kind in ("model", "tokenizer", "features", "baseline")
    },
    "model_without_training": reconfigured("model", "train"),
    "model_of_listed_training": reconfigured("model", "train", ["steps", 3]),
    "model_of_odd_average": reconfigured("model", "posthoc", {"source": "x", "std": "narrow", "step": 3}),
    "config_in_a_folder": changed("model", in_a_folder),
    "pickled_tokenizer": changed("tokenizer", pickled),
    "half_tokenizer": with_tensors("tokenizer", f"{STEP}/{MODEL_FILES['inner']}", "half the tensors"),
    "half_inner": with_tensors("model", f"{STEP}/{MODEL_FILES['inner']}", "half the tensors"),
    "whole_numbers": with_tensors("model", f"{STEP}/{MODEL_FILES['ema']}", "all of int64"),
    "diverged_features": with_tensors("features", f"{STEP}/features.safetensors", "NaN"),
    **{f"{name}_table": with_wrong_table(change) for name, change in WRONG_TABLES.items()},
    **{
        f"{name}_amed": changed("model", lambda run, change=change: change_solver(run / SOLVER_RUN, change))
        for name, change in WRONG_AMED.items()
    },
    "moved_amed": changed("model", lambda run: (run / SOLVER_RUN).rename(run / "solvers/amed-karras-nfe4")),
    "no_snapshots": changed("model", lambda run: shutil.rmtree(run / "posthoc")),
    "other_width": changed("model", rewritten(lambda description: description["config"]["dit"].update(width=64))),
    "one_class": changed("model", rewritten(lambda description: description.update(empty=list(range(1, 10))))),
    "without_dropout": changed("model", rewritten(lambda description: description["config"].update(label_dropout=0.0))),
    "without_labels": changed("model", rewritten(lambda description: description["config"].update(label_dropout=1.0))),
    "twin": changed("model", lambda run: None),
    "other_tokenizer": changed("model", of_another_tokenizer),
    "other_schedule": changed("model", as_guide(lambda description: description["config"].update(schedule="vp"))),
    "other_names": changed("model", as_guide(lambda description: description.update(class_names=[*"abcdefghij"]))),
    "tokenizer_of_another_split": with_data("tokenizer", split_seed=7),
    "tokenizer_of_another_size": with_data("tokenizer", resize=16),
    "large_features": large_features,
    "rgb": rgb_autoencoder,
    "constant": constant_autoencoder,
    "blueless": blueless,
    "imported": imported,
    "empty_sample": samples(lambda data: b""),
    "flipped_sample": samples(flipped),
    "halved_sample": samples(lambda data: bytes(data[: len(data) // 2])),
    "no_kind": with_file("config.yaml", ""),
    "list_kind": with_file("config.yaml", "- a\n- b\n"),
    "number_kind": with_file("config.yaml", "kind: 3\n"),
    "bad_yaml": with_file("config.yaml", "a: [1, 2\n"),
    "list_yaml": with_file("config.yaml", "- 1\n"),
    "binary_yaml": with_file("config.yaml", b"\xff\xfe\x00"),
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
    "empty": lambda pipeline, folder: folder,
    "a_file": with_file("me.png", b"x"),
    "a_report": with_file("report.md", "somebody's"),
    "a_results_json": with_file("results.json", "[]"),
    "link": linked("tokenizer"),
    "loop": loop,
    "with_images": with_images(),
    "not_a_demo": lambda pipeline, folder: Path(shutil.copytree(pipeline.tokenizer, folder / "tokenizer")).parent,
    "no_weights": with_file("pt_inception-2015-12-05-6726825d.pth", "not the published weights"),
    "cache_of_tokenizer": cache("tokenizer"),
    "cache_of_split": cache("split"),
    "weights_of_features": weights_of_features,
    "other_features": other_features,
    "foreign_solvers": with_foreign_solvers,
    "jumps": jumps(),
    "consistent": jumps(ends="data"),
    "new_flow": new_flow,
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
        (self.root / name).mkdir()
        self[name] = PLACES[name](self.pipeline, self.root / name)
        return self[name]
