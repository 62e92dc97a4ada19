"""Pipelines that diffusers saved: the same samples as its own scheduler draws, measured like our models, or an error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import TEXTS, mutations
from pipelines import Pipeline, Script
from safetensors.torch import load_file, save_file
from sweeps import images_task, measured, npz

from midway.gen.commands import evaluate
from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.images import to_float
from midway.gen.diffusion.samplers import SamplerConfig
from midway.gen.diffusion.sampling import SamplingConfig, noise_of
from midway.gen.evaluation.diffusers import (
    DiffusersModel,
    DiffusersSource,
)
from midway.gen.evaluation.diffusers_files import load_diffusers
from midway.samplers.discrete import Discrete
from midway.samplers.grids import logsnr
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
SMALL = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
TYPES = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}


def unet(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **SMALL, **TYPES, **options})


def saved(folder: Path, network: Any = None, scheduler: Any = None) -> Path:
    scheduler = scheduler or diffusers.DDPMScheduler(clip_sample=False)
    diffusers.DDPMPipeline(network or unet(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("diffusers") / "ddpm")


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent pipeline: 4x4 states of three channels, 8x8 images of three channels, scaling factor 0.5."""
    folder = tmp_path_factory.mktemp("diffusers") / "ldm"
    network = unet(sample_size=4, in_channels=3, out_channels=3)
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (4, 8), "norm_num_groups": 2, "num_vq_embeddings": 16, "scaling_factor": 0.5}
    vqvae = diffusers.VQModel(**blocks, **size, latent_channels=3, vq_embed_dim=3)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # codes near 0 would not see the scale of a latent
    diffusers.LDMPipeline(vqvae, network, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def source(model: DiffusersModel, steps: int = 3, solver: str = "ddim", **sampling: Any) -> DiffusersSource:
    table = SOLVERS[solver].build(model.schedule, logsnr(model.schedule, steps, 80.0, 0.02))
    return DiffusersSource(model, table, SamplingConfig(**sampling))


def samples_of_diffusers(folder: Path, noise: torch.Tensor, steps: int, **given: Any) -> tuple[torch.Tensor, list[int]]:
    """What its own DDIM scheduler makes of the same noise, and the timesteps it visits."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, **given).sample, t, x).prev_sample
    return x, scheduler.timesteps.tolist()


def on_its_timesteps(schedule: Schedule, timesteps: list[int]) -> Any:
    assert isinstance(schedule, Discrete)
    return SOLVERS["ddim"].build(schedule, schedule.grid(timesteps))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_gives_the_samples_of_diffusers(prediction: str, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, prediction_type=prediction, beta_schedule="squaredcos_cap_v2"
    )
    folder = saved(tmp_path / "p", scheduler=scheduler)
    seeds = torch.arange(3, 8)
    theirs, timesteps = samples_of_diffusers(folder, noise_of(seeds, (1, 8, 8)), 10)
    model = load_diffusers(folder)
    ours = DiffusersSource(model, on_its_timesteps(model.schedule, timesteps), SamplingConfig()).sample(seeds)
    assert ours.nfe == 10
    assert ((ours.values - theirs).abs().max() / theirs.std()).item() < 1e-3
    expected = ((theirs.clamp(-1, 1) + 1) * 127.5).round()
    made = DiffusersSource(model, on_its_timesteps(model.schedule, timesteps), SamplingConfig()).images(ours)
    assert made.dtype == torch.uint8 and (made.float() - expected).abs().max() <= 1


def test_a_class_is_that_of_the_seed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "p", unet(num_class_embeds=4))
    model, seeds = load_diffusers(folder), torch.tensor([2, 7, 9])
    given = {"class_labels": torch.tensor([2, 3, 1])}
    theirs, timesteps = samples_of_diffusers(folder, noise_of(seeds, (1, 8, 8)), 4, **given)
    ours = DiffusersSource(model, on_its_timesteps(model.schedule, timesteps), SamplingConfig()).sample(seeds)
    assert model.classes == 4 and ((ours.values - theirs).abs().max() / theirs.std()).item() < 1e-3


def test_latents_are_decoded_as_the_pipeline_decodes_them(latent: Path) -> None:
    model = load_diffusers(latent)
    states = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0))
    vqvae = diffusers.LDMPipeline.from_pretrained(latent).vqvae
    with torch.no_grad():
        images = vqvae.decode(states / 0.5).sample
    expected = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
    made = model.decode(states).float()
    assert model.shape == (3, 4, 4) and made.shape == (3, 3, 8, 8) and (made - expected).abs().max() <= 1
    assert made.std() > 1, "not all alike"


def test_the_ceiling_is_the_autoencoders_own_round_trip(latent: Path, ddpm: Path) -> None:
    model = load_diffusers(latent)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model.reconstruct(images)
    assert found is not None and found.shape == images.shape and found.dtype == torch.uint8
    decoder: Any = model.decoder
    with torch.no_grad():
        by_hand = decoder.decode(decoder.encode(to_float(images)).latents).sample
    assert (found.float() - (by_hand.clamp(-1, 1) + 1) * 127.5).abs().max() <= 1
    assert load_diffusers(ddpm).reconstruct(images) is None


def test_an_image_is_a_function_of_its_seed(ddpm: Path) -> None:
    model = load_diffusers(ddpm)
    whole = source(model, solver="heun").sample(torch.arange(10))
    assert whole.nfe == 6 and whole.values.device.type == "cpu"
    some = source(model, solver="heun", batch_size=3).sample(torch.arange(4, 9))
    torch.testing.assert_close(some.values, whole.values[4:9], rtol=1e-4, atol=1e-4)


def test_the_identity_is_weights_configuration_and_plan(ddpm: Path, tmp_path: Path) -> None:
    model = load_diffusers(ddpm)
    assert source(model).identity == source(load_diffusers(ddpm), batch_size=7).identity
    shutil.copytree(ddpm, tmp_path / "moved")
    assert source(load_diffusers(tmp_path / "moved")).identity == source(model).identity
    weights = saved(tmp_path / "weights", unet(seed=1))
    process = saved(tmp_path / "process", scheduler=diffusers.DDPMScheduler(beta_end=0.03))
    frequencies = saved(tmp_path / "frequencies", unet(flip_sin_to_cos=False))
    others = [source(load_diffusers(path)) for path in (weights, process, frequencies)]
    others += [source(model, 4), source(model, precision="bf16")]
    keys = {json.dumps(one.identity, sort_keys=True) for one in [source(model), *others]}
    assert len(keys) == 6


# ---- errors ----


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    shutil.copytree(folder, to)
    found = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**found, **values}))
    return to


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel"),
        ("model_index.json", {"unet": ["own_code", "UNet2DModel"]}, "own_code"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "CLIPTextModel"),
        ("model_index.json", {"unet": [None, None]}, "components scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "scheduler is not known"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("unet/config.json", {"layers_per_block": 2}, "missing|expected shape"),
        ("unet/config.json", {"_class_name": "UNet1DModel"}, "UNet1DModel"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_pipelines_raise(file: str, values: dict[str, Any], words: str, ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as output:
        load_diffusers(changed(ddpm, tmp_path / "p", file, **values))
    assert "UNet2DModel" in output.value.fix


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"],
)
def test_every_damage_of_a_configuration_is_an_error_or_none(file: str, latent: Path, tmp_path: Path) -> None:
    """Of any type and size, or no object at all."""
    folder = Path(shutil.copytree(latent, tmp_path / "p"))
    text = (folder / file).read_text()
    changes = [(change, json.dumps(value).encode()) for change, value in mutations(json.loads(text), depth=1)]
    for change, content in [*changes, *((f"text {text[:9]!r}", text) for text in TEXTS)]:
        (folder / file).write_bytes(content)
        try:
            load_diffusers(folder)
        except DataError as error:
            assert str(folder) in error.what, change
        except Exception as error:
            raise AssertionError(f"{change}: {error!r}") from error


def test_damaged_and_pickled_weights_raise(ddpm: Path, tmp_path: Path) -> None:
    for name in ("pickled", "cut", "none"):
        shutil.copytree(ddpm, tmp_path / name)
    (file,) = (tmp_path / "pickled" / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
    file.unlink()
    with pytest.raises(DataError, match=r"pickled weights .* are not loaded"):
        load_diffusers(tmp_path / "pickled")
    (file,) = (tmp_path / "cut" / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cut"):
        load_diffusers(tmp_path / "cut")
    state = load_file(file := next((tmp_path / "none" / "unet").glob("*.safetensors")))
    save_file({name: value for name, value in state.items() if "conv_out" not in name}, file, {"format": "pt"})
    with pytest.raises(DataError, match="conv_out"):
        load_diffusers(tmp_path / "none")
    with pytest.raises(DataError, match=r"model_index\.json"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("solver", "changes", "words"),
    [
        ("amed-predictor", {}, "learned for a model of ours"),
        ("dddim", {}, "did you mean 'ddim'"),
        ("ddim", {"grids": ("gits",)}, "gits"),
        ("ddim", {"guidance": 2.0}, "no missing class"),
        ("ddim", {"guidance": 2.0, "interval": (0.3, 5.0)}, "no missing class"),
        ("ddim", {"interval": (0.3, 5.0)}, "nothing is guided"),
        ("ddim", {"guidance": float("nan")}, "finite number"),
        ("euler", {"eta": 1.0}, "--eta"),
        ("heun", {"nfe": 5}, "NFE 5"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_raise(solver: str, changes: dict[str, Any], words: str, ddpm: Path) -> None:
    nfe = changes.pop("nfe", 4)
    with pytest.raises(UsageError, match=words):
        load_diffusers(ddpm).samplers(solver, nfe, SamplerConfig(**changes))


def test_grids_stay_on_the_noise_levels_of_training(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    model = load_diffusers(saved(tmp_path / "p", scheduler=scheduler))
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for plan in model.samplers("ddim", 4, SamplerConfig()).values():
        found = model.schedule.rho(torch.tensor([plan.grid[0], plan.grid[-1]], dtype=torch.float64))
        assert found[0] <= levels[-1] * 1.0001 and found[1] >= levels[0] * 0.9999


# ---- measured ----


def test_the_sweep_measures_it_beside_external_images(
    ddpm: Path, pipeline: Pipeline, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = npz(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    flags: tuple[object, ...] = (
        "--diffusers",
        ddpm,
        "--data",
        "digits",
        "--features",
        pipeline.features,
        "--out",
        tmp_path / "out",
    )
    flags += (
        "--solvers",
        "ddim,heun",
        "--nfe",
        4,
        "--grids",
        "logsnr",
        "--n",
        20,
        "--blocks",
        2,
        "--exact-nfe",
        16,
        "--metrics",
        "",
    )
    done = script("evaluate", *flags, "--images", images, "--export-npz", tmp_path / "npz")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["solver"], row["nfe"]) for row in rows] == [
        ("floor", 0),
        ("exact", 16),
        ("ddim", 4),
        ("heun", 4),
        ("images: a.npz", 0),
    ]
    model = load_diffusers(ddpm)
    (plan,) = model.samplers("ddim", 4, SamplerConfig(grids=("logsnr",))).values()
    near = DiffusersSource(model, plan, SamplingConfig()).sample(torch.arange(40)).values
    (finer,) = model.samplers("dpmpp3m", 16, SamplerConfig(grids=("logsnr",))).values()
    far = DiffusersSource(model, finer, SamplingConfig()).sample(torch.arange(40)).values
    assert rows[2]["rmse"] == pytest.approx((near - far).double().square().mean().sqrt().item(), rel=1e-4)
    assert "diffusers ddpm" in (tmp_path / "out" / "report.md").read_text()
    exported = replace(images_task(pipeline, tmp_path / "again", tmp_path / "npz" / "ddim-logsnr-nfe4.npz"), n=20)
    assert list(measured(evaluate.run(exported))[0].distances) == rows[2]["distance_blocks"]
    monkeypatch.setattr(DiffusersSource, "sample", None)
    assert script("evaluate", *flags).code == 0, "nothing is sampled twice"


def test_images_of_another_shape_raise(latent: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    asked = replace(images_task(pipeline, tmp_path / "out"), diffusers=latent)
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        evaluate.run(asked)
    load_diffusers(latent).check_images(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UsageError, match="--model and --diffusers"):
        evaluate.run(replace(asked, model=pipeline.model))
