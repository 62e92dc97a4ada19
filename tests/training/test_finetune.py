"""Fine-tuning: what trains, what stays, and adapters as files, in commands and merged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from other_digits import other_digits
from pipelines import TINY, Pipeline
from safetensors.torch import load_file
from tensors import normal

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.files import state_hash
from midway.gen.core.runs import Run
from midway.gen.data.images import to_float
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.adapters import AdaptedModel, Adapter, load_adapted, merged
from midway.gen.diffusion.load import CPU, TrainedModel, load_model, origin_of
from midway.gen.flags.tasks import FinetuneTask
from midway.gen.networks.adapters import AdapterConfig
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.optim import checkpoint_activations, make_optimizers, set_rate
from midway.gen.trainings import finetune, merge_adapter

pytestmark = pytest.mark.usefixtures("on_the_cpu", "one_thread")
TRAIN = replace(TINY, steps=3, batch_size=32, lr=3e-2, warmup=0)
ADAPTER = AdapterConfig(rank=4, alpha=8.0, start="gradient", b_rate=4.0)
Tuned = Callable[..., Run]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_digits(tmp_path_factory.mktemp("photos"))


def task_of(pipeline: Pipeline, photos: Path, out: Path, **options: Any) -> FinetuneTask:
    given = {"adapter": ADAPTER, "train": TRAIN, **options}
    return FinetuneTask(out, pipeline.model, DataConfig(data=str(photos)), **given)


def tuned(task: FinetuneTask) -> Run:
    run = finetune.train(task)
    assert run is not None
    return run


@pytest.fixture(scope="module")
def trained(pipeline: Pipeline, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An adapter of the pipeline's model."""
    return tuned(task_of(pipeline, photos, tmp_path_factory.mktemp("adapter") / "run"))


def begun(task: FinetuneTask) -> AdaptedModel:
    """Before its first step, from the gradient of its first batch."""
    parts = finetune.make_parts(task, Accelerator(cpu=True))
    model = parts.model
    assert isinstance(model, AdaptedModel)
    context = Context(0, 0, torch.arange(32))
    model.start(parts.items.augment(parts.items.read(torch.arange(32)), context), context)  # pyright: ignore[reportOptionalCall]
    return model


def states(model: TrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(4, *model.model.latent_shape), torch.tensor([0.2, 0.5, 0.7, 0.9])


@torch.no_grad()
@pytest.mark.parametrize("start", ["zero", "gradient"])
def test_an_adapted_model_begins_as_its_base_bit_for_bit(
    start: str, pipeline: Pipeline, photos: Path, tmp_path: Path
) -> None:
    """Known classes by their names; a new one as no class. A model of all weights begins there too."""
    config = replace(ADAPTER, start=start)
    task, base = task_of(pipeline, photos, tmp_path / "run", adapter=config), pipeline.load()
    model, (x, t) = begun(task), states(base)
    assert model.class_names == ("3", "5", "negative")
    expected = base.model.conditional_field(x, t, torch.tensor([3, 5, 10, 10])).x0
    assert torch.equal(model.conditional_field(x, t, torch.tensor([0, 1, 2, 3])).x0, expected)
    whole = finetune.make_parts(replace(task, method="full"), Accelerator(cpu=True)).model
    whole.requires_grad_(False)  # torch may choose other kernels for weights that train
    assert torch.equal(whole.conditional_field(x, t, torch.tensor([0, 1, 2, 3])).x0, expected)


def test_only_adapters_and_new_labels_train_and_are_stored(trained: Run, pipeline: Pipeline, photos: Path) -> None:
    """The base in memory and on the disk is what it was, and the checkpoint is small."""
    base = pipeline.load()
    task = task_of(pipeline, photos, trained.path)
    model = begun(task)
    before = state_hash("", {name: p for name, p in model.named_parameters() if not p.requires_grad})
    optimizers = make_optimizers(model, TRAIN, CPU)
    set_rate(optimizers, 1e-2)
    batch = LatentBatch(normal(8, *model.latent_shape), torch.arange(8) % 3)
    model.loss(batch, Context(0, 1, torch.arange(8)))[0].backward()
    learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizers[0].step()
    assert all(not torch.equal(value, model.get_parameter(name)) for name, value in learned.items())
    assert state_hash("", {name: p for name, p in model.named_parameters() if not p.requires_grad}) == before
    stored = load_file(trained.checkpoint / "model.safetensors")
    starts = {name for name in stored if name.endswith((".start_A", ".start_B"))}
    assert stored.keys() - starts == learned.keys() and len(starts) == 16
    assert learned["network.label.new"].shape == (1, 32)
    assert load_model(pipeline.model, CPU).hash == base.hash


def test_blocks_that_are_computed_again_have_the_same_gradients(
    pipeline: Pipeline, photos: Path, tmp_path: Path
) -> None:
    """Although nothing that trains comes before the first of them."""
    batch, found = LatentBatch(normal(8, *pipeline.load().model.latent_shape), torch.arange(8) % 3), []
    for again in (False, True):
        model = begun(task_of(pipeline, photos, tmp_path / "run"))
        if again:
            checkpoint_activations(model)
        model.train().loss(batch, Context(0, 1, torch.arange(8)))[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_second_matrix_learns_faster_by_its_rate(pipeline: Pipeline, photos: Path, tmp_path: Path) -> None:
    """AdamW's first step is the rate in every number that has a gradient: 4 times as much in B as in A."""
    model = begun(task_of(pipeline, photos, tmp_path / "run"))
    optimizers = make_optimizers(model, TRAIN, CPU)
    set_rate(optimizers, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for name in before:
        model.get_parameter(name).grad = torch.ones_like(before[name])
    optimizers[0].step()
    for name, value in before.items():
        rate = 4e-3 if ".lora_B." in name else 1e-3
        torch.testing.assert_close(
            value - model.get_parameter(name).detach(), torch.full_like(value, rate), rtol=1e-3, atol=0
        )


@torch.no_grad()
def test_what_is_stored_is_what_was_learned(trained: Run, pipeline: Pipeline, photos: Path) -> None:
    """A start is subtracted by twice the rank; peft's names; the weights with it give what the adapters give."""
    model = begun(task_of(pipeline, photos, trained.path))
    averaged = load_file(trained.checkpoint / "ema.safetensors")
    model.load_state_dict(averaged)
    found, base = Adapter.load(trained.checkpoint / "adapter"), pipeline.load()
    whole, (x, t) = load_adapted(pipeline.model, trained.path, CPU), states(base)
    labels = torch.tensor([0, 1, 2, 3])
    expected = model.conditional_field(x, t, labels).x0
    assert (expected - base.model.conditional_field(x, t, torch.tensor([3, 5, 10, 10])).x0).abs().max() > 1e-2
    torch.testing.assert_close(whole.model.conditional_field(x, t, labels).x0, expected, rtol=1e-6, atol=5e-6)
    tensors = load_file(trained.path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.network.blocks.0.attention.qkv"
    assert tensors[f"{name}.lora_A.weight"].shape == (8, 32) and tensors[f"{name}.lora_B.weight"].shape == (96, 8)
    settings = json.loads((trained.path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16.0, "LORA")
    assert settings["revision"] == base.hash and settings["target_modules"] == list(found.factors)
    again = merged(base.model, Adapter.load(trained.path / "adapter"))
    assert again.class_names == ("3", "5", "negative") and again.hash == whole.model.hash == whole.hash
    assert "| layers | 8 |" in (trained.path / "adapter" / "README.md").read_text()


def test_costs_add_up_and_data_are_those_of_the_adapter(trained: Run, pipeline: Pipeline, photos: Path) -> None:
    whole, base = load_adapted(pipeline.model, trained.path, CPU), pipeline.load()
    assert whole.data.data == str(photos) and whole.run.path == trained.path
    assert origin_of(whole).images == origin_of(base).images + TRAIN.steps * TRAIN.batch_size
    assert trained.config["origin"]["init"] == base.hash
    torch.testing.assert_close(whole.tokenizer.latent_std, base.tokenizer.latent_std, rtol=0, atol=0)


def test_a_merged_run_is_a_latent_model(trained: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    run = merge_adapter.make(merge_adapter.MergeTask(trained.path, pipeline.model, tmp_path / "merged"))
    whole, again = load_adapted(pipeline.model, trained.path, CPU), load_model(run.path, CPU)
    assert again.hash == whole.hash and again.data == whole.data
    with pytest.raises(UsageError, match="the merged model is made from it"):
        merge_adapter.make(merge_adapter.MergeTask(trained.path, pipeline.model, pipeline.model, overwrite=True))


def test_latents_are_standardised_as_those_of_the_model(pipeline: Pipeline, tmp_path: Path) -> None:
    """Also by the call that encodes the images."""
    photos, base = other_digits(tmp_path / "new", 30), pipeline.load()
    for _ in range(2):
        parts = finetune.make_parts(task_of(pipeline, photos, tmp_path / "run"), Accelerator(cpu=True))
        for name in ("latent_mean", "latent_std"):
            assert torch.equal(getattr(parts.tokenizer, name), getattr(base.tokenizer, name))
        assert parts.items.augment is not None
        found = parts.items.augment(parts.items.read(torch.arange(9)), Context(0, 0, torch.arange(9)))
        expected = base.tokenizer.encode_latents(to_float(parts.images.images[:9]))
        torch.testing.assert_close(found.latents, expected, rtol=1e-5, atol=1e-5)


def test_all_weights_are_trained_into_a_latent_model(pipeline: Pipeline, photos: Path, tmp_path: Path) -> None:
    run = tuned(task_of(pipeline, photos, tmp_path / "run", method="full"))
    found, base = load_model(run.path, CPU), pipeline.load()
    assert found.model.class_names == ("3", "5", "negative")
    name = "network.blocks.0.modulation.weight"
    assert not torch.equal(found.model.state_dict()[name], base.model.state_dict()[name])
    assert load_model(pipeline.model, CPU).hash == base.hash


def test_an_adapter_goes_with_its_own_model_alone(
    trained: Run, unconditional: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"is of another model than .*\n.*trained for [0-9a-f]{12}, and this one is .*\n.*model@25"
    ):
        load_adapted(unconditional, trained.path, CPU)
    found = Adapter.load(trained.path / "adapter")
    for folder, change, words in (
        ("dora", {"use_dora": True}, "use_dora is True, and only False is supported"),
        ("other", {"peft_type": "IA3"}, "peft_type is IA3, not LORA"),
    ):
        found.save(tmp_path / folder)
        file = tmp_path / folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(DataError, match=words):
            Adapter.load(tmp_path / folder)
    free = replace(found, base="", factors={"network.blocks.7.attention.qkv": next(iter(found.factors.values()))})
    free.save(tmp_path / "free")
    with pytest.raises(DataError, match=r"adds a matrix .* to network.blocks.7.attention.qkv"):
        load_adapted(pipeline.model, tmp_path / "free", CPU)
    with pytest.raises(DataError, match="give a folder of an adapter"):
        load_adapted(pipeline.model, tmp_path / "nothing", CPU)


def test_what_does_not_fit_raises_an_error(pipeline: Pipeline, photos: Path, tmp_path: Path) -> None:
    """No run is left behind."""
    out = tmp_path / "run"
    for words, task in {
        "rank 30 of blocks.0.attention.qkv": task_of(pipeline, photos, out, adapter=replace(ADAPTER, rank=30)),
        "no layer has a name that ends with": task_of(
            pipeline, photos, out, adapter=replace(ADAPTER, targets=("lin",))
        ),
        "nothing to do": task_of(pipeline, photos, out, train=replace(TRAIN, optimizer="muon")),
        "pass --channels 1 --resize 8": replace(
            task_of(pipeline, photos, out), data=DataConfig(data=str(photos), channels=3)
        ),
    }.items():
        with pytest.raises(UsageError, match=words):
            finetune.train(task)
        assert not (out / "checkpoints").exists()
