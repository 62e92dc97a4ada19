"""The latent model: targets, conditioning, start, time distributions, dropout, and learning on data with a known answer."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from scipy import stats
from tensors import normal, randomised
from torch import Tensor

from midway.gen.diffusion.field import pool, start_state
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.layers import drop
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.optim import checkpoint_activations
from midway.samplers.grids import uniform
from midway.samplers.prediction import TARGETS, expand
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.schedule import SCHEDULES
from midway.samplers.solvers import heun

TINY = DiTConfig(width=16, depth=2, heads=2, patch=1)


def _model(schedule: str = "linear", target: str = "velocity", dropout: float = 0.0, **options: object) -> LatentModel:
    torch.manual_seed(0)
    dit = replace(TINY, dropout=dropout)
    config = LatentModelConfig(schedule=schedule, target=target, dit=dit, **options)  # pyright: ignore
    return LatentModel(config, (3, 4, 4), 10)


def _perturbed(model: LatentModel) -> LatentModel:
    return randomised(model, seed=1, std=0.2)


def _context(count: int, step: int = 0) -> Context:
    return Context(seed=0, step=step, sample_ids=torch.arange(count))


def _batch(count: int) -> LatentBatch:
    return LatentBatch(normal(count, 3, 4, 4), torch.arange(count) % 10)


def test_the_first_output_is_zero() -> None:
    """adaLN-zero and a zero head: a new network's output is 0 for any input."""
    model = _model()
    out, _ = model.forward_network(torch.randn(5, 3, 4, 4), torch.rand(5), torch.arange(5))
    assert not out.any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_first_loss_is_the_targets_variance(schedule: str, target: str) -> None:
    """The target is scaled to unit variance for independent unit-variance data, and the network starts at 0."""
    model = _model(schedule, target)
    loss, _ = model.loss(_batch(512), _context(512))
    assert loss.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_network_that_returns_its_target_recovers_the_data(schedule: str, target: str, monkeypatch) -> None:
    model = _model(schedule, target)
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = model.schedule.time_of_rho(torch.logspace(-1, 1, 6, dtype=torch.float64))
    x = expand(model.schedule.alpha(t), x0) * x0 + expand(model.schedule.sigma(t), x0) * eps
    from midway.samplers.prediction import target_value

    value = target_value(model.config.target, x0, eps, t, model.schedule) / expand(model.output_scale(t), x0)
    hidden = torch.zeros(6, 16, 16)
    monkeypatch.setattr(model, "forward_network", lambda *_: (value, hidden))
    got = model.conditional_field(x, t, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(got.x0, x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-8)


def test_edm_with_v_is_edms_preconditioning() -> None:
    """x0 = c_skip x + c_out F(c_in x), Karras et al. 2022, equation 7, with data std 1."""
    model = _perturbed(_model("edm", "v"))
    x, t = 5 * torch.randn(4, 3, 4, 4), torch.tensor([0.001, 0.01, 0.1, 0.5])
    labels = torch.arange(4)
    s = expand(80 * t, x)
    with torch.no_grad():
        network, _ = model.forward_network(x, t, labels)
        got = model.conditional_field(x, t, labels).x0
    torch.testing.assert_close(got, x / (s**2 + 1) - s / (s**2 + 1).sqrt() * network, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "target", "mean", "std"), [("linear", "velocity", 0.5, 0.8), ("edm", "v", -1.2, 1.2)]
)
def test_logit_normal_is_sd3s_on_linear_and_edms_on_edm(schedule: str, target: str, mean: float, std: float) -> None:
    """Normal are logit t, and ln sigma."""
    model = _model(schedule, target, time_mean=mean, time_std=std)
    t = model.time_of(_context(20000).uniform("time")).double()
    found = torch.logit(t) if schedule == "linear" else model.schedule.sigma(t).log()
    assert stats.kstest(found.numpy(), "norm", args=(mean, std)).pvalue > 0.01


def test_uniform_time_covers_the_sampled_range() -> None:
    model = _model("cosine", time="uniform")
    t = model.time_of(_context(20000).uniform("time")).double()
    ends = uniform(model.schedule, 1)
    assert stats.kstest(t.numpy(), "uniform", args=(ends[1], ends[0] - ends[1])).pvalue > 0.01


def test_every_label_is_dropped_at_its_rate_and_only_then() -> None:
    model = _perturbed(_model(label_dropout=0.3))
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    batch = _batch(2000)
    model.loss(batch, _context(2000))
    dropped = seen[0] == 10
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert torch.equal(seen[0][~dropped], batch.labels[~dropped])


def test_labels_change_the_output_and_an_unconditional_model_has_none() -> None:
    model = _perturbed(_model())
    x, t = torch.randn(2, 3, 4, 4), torch.full((2,), 0.5)
    a, b = (model.conditional_field(x, t, torch.full((2,), label)).x0 for label in (1, 2))
    assert (a - b).abs().max() > 1e-3
    free = _model(conditional=False)
    assert free.network.label.num_embeddings == 1
    assert free.loss(_batch(8), _context(8))[0].isfinite()
    with pytest.raises(ValueError, match="needs classes"):
        free.field(torch.zeros(2, dtype=torch.int64), guidance=2.0)


def test_a_batch_without_samples_has_no_loss() -> None:
    model = _perturbed(_model(dropout=0.1))
    loss, logs = model.loss(_batch(0), _context(0))
    loss.backward()
    assert loss.item() == 0 and not logs["loss_time"].any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_loss_by_time_adds_up_to_the_loss() -> None:
    model = _perturbed(_model())
    loss, logs = model.loss(_batch(256), _context(256))
    assert logs["loss_time"].shape == (8, 2)
    sums = logs["loss_time"].sum(0)
    assert sums[1].item() == 256
    assert sums[0].item() / 256 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(dropout: float) -> None:
    model = _perturbed(_model(dropout=dropout))
    batch = _batch(12)
    whole, _ = model.loss(batch, _context(12))
    halves = [
        model.loss(LatentBatch(batch.latents[i], batch.labels[i]), Context(0, 0, torch.arange(12)[i]))[0]
        for i in (slice(0, 5), slice(5, 12))
    ]
    assert (5 * halves[0] + 7 * halves[1]).item() / 12 == pytest.approx(whole.item(), rel=1e-5)


def test_after_a_step_nothing_waits_for_the_device() -> None:
    """A value on `meta` cannot be read."""
    _model().after_step(torch.tensor(False, device="meta"))


# ---- dropout ----


def test_every_layer_and_step_has_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of masks agree as often as independent ones do: p^2 + (1 - p)^2."""
    masks: list[Tensor] = []
    keep = Context.keep
    monkeypatch.setattr(Context, "keep", lambda *a: masks.append(keep(*a)) or masks[-1])
    model = _model(dropout=0.3)
    for step in (0, 1):
        model.loss(_batch(40), _context(40, step))
    assert [mask.shape for mask in masks] == [(40, 16, 16)] * 8, "two blocks, two branches, two steps"
    for a, b in combinations(masks, 2):
        assert (a == b).double().mean().item() == pytest.approx(0.58, abs=0.02)


def test_dropout_acts_in_training_only() -> None:
    """In the field that solvers see there is none, in whatever mode the model is."""
    plain, model = _perturbed(_model()), _perturbed(_model(dropout=0.5))
    x, t, labels = torch.randn(6, 3, 4, 4), torch.full((6,), 0.5), torch.arange(6)
    for mode in (True, False):
        model.train(mode)
        got, expected = model.conditional_field(x, t, labels), plain.conditional_field(x, t, labels)
        assert torch.equal(got.x0, expected.x0)
        assert torch.equal(got.features, expected.features)  # pyright: ignore[reportArgumentType]
    batch, context = _batch(6), _context(6)
    assert not torch.equal(model.loss(batch, context)[0], plain.loss(batch, context)[0])


def test_without_dropout_no_mask_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Context, "keep")
    model = _model()
    model.loss(_batch(6), _context(6))
    x = torch.randn(2, 3)
    assert drop(x, 0.0, _context(2), "here") is x
    assert drop(x, 0.5, None, "here") is x


def test_a_compiled_network_draws_the_same_masks_and_is_not_compiled_for_every_step() -> None:
    model, compiled, graphs = _perturbed(_model(dropout=0.3)), _perturbed(_model(dropout=0.3)), []
    compiled.network.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for step in range(4):
        context = _context(6, step)
        assert torch.equal(compiled.loss(_batch(6), context)[0], model.loss(_batch(6), context)[0])
    assert len(graphs) == 2, "one for the first step, one for all others"


# ---- activation checkpointing ----


def _loss_and_gradients(model: LatentModel, autocast: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model.loss(_batch(12), _context(12))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(
    dropout: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes every block once more, in the backward pass; without gradients it does nothing."""
    model = _perturbed(_model(dropout=dropout))
    calls: list[int] = []
    for block in model.network.get_submodule("blocks").children():
        block.attention.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    plain = _loss_and_gradients(model, autocast)
    assert len(plain) == 1 + len(list(model.parameters()))
    assert len(calls) == 2
    checkpoint_activations(model)
    torch.manual_seed(1)  # the masks are no function of torch's generators
    again = _loss_and_gradients(model, autocast)
    assert len(calls) == 2 + 4
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)
    monkeypatch.delattr("midway.tokenizers.recomputed.checkpoint")
    with torch.no_grad():
        model.loss(_batch(12), _context(12))
    assert len(calls) == 2 + 4 + 2


def test_features_are_normalised_and_guidance_counts_at_the_network() -> None:
    model = _perturbed(_model())
    counter = EvaluationCounter(model.conditional_field)
    labels = torch.arange(4)
    with torch.no_grad():
        features = model.field(labels, 3.0, counter)(torch.randn(4, 3, 4, 4), torch.full((4,), 0.5)).features
    assert counter.evaluations == 8
    assert features is not None
    torch.testing.assert_close(features.var(1, unbiased=False), torch.ones(4), rtol=1e-2, atol=1e-2)
    assert pool(torch.randn(2, 5, 16)).shape == (2, 16)


def test_a_model_trained_on_one_gaussian_samples_it() -> None:
    """Correlated Gaussian latents: the trained model's samples have the data's covariance, within a loose tolerance."""
    torch.manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    data = (torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) @ root.T).view(-1, 2, 1, 1)
    model = LatentModel(LatentModelConfig(dit=TINY, conditional=False), (2, 1, 1), 1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.99))
    for step in range(200):
        items = torch.randint(0, len(data), (256,), generator=torch.Generator().manual_seed(step))
        loss, _ = model.loss(LatentBatch(data[items], torch.zeros(256, dtype=torch.int64)), _context(256, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table = heun(model.schedule, uniform(model.schedule, 10))
    noise = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        x = sample(
            model.field(torch.zeros(4000, dtype=torch.int64)), table, start_state(model.schedule, table.grid[0], noise)
        )
    covariance = torch.cov(x.flatten(1).T)
    torch.testing.assert_close(covariance, root @ root.T, rtol=0, atol=0.15)


def test_bf16_autocast_keeps_parameters_and_noise_in_float32(tmp_path) -> None:
    from accelerate.state import AcceleratorState

    from midway.gen.core.runs import Run
    from midway.gen.training.accelerator import make_accelerator
    from midway.gen.training.config import TrainConfig
    from midway.gen.training.fit import fit
    from midway.gen.training.interface import Items

    AcceleratorState._reset_state(True)  # another test's precision would otherwise stay in force
    model, batch = _model(), _batch(64)
    seen: list[torch.dtype] = []
    embed = model.network.get_submodule("embed")
    embed.register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    config = TrainConfig(steps=3, batch_size=16, precision="bf16", log_every=1)
    try:
        result = fit(
            model,
            Items(lambda items: LatentBatch(batch.latents[items], batch.labels[items]), 64),
            config,
            Run.create(tmp_path / "run", "latent_model", {}),
            make_accelerator(config),
        )
    finally:
        AcceleratorState._reset_state(True)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert seen[:2] == [torch.float32, torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result.steps == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_of_any_dtype_takes_any_dtype(dtype: torch.dtype, given: torch.dtype) -> None:
    plain = _perturbed(_model())
    model = _perturbed(_model()).to(dtype)
    batch = LatentBatch(normal(8, 3, 4, 4).to(given), torch.arange(8) % 10)
    loss, _ = model.loss(batch, _context(8))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(loss.double(), plain.loss(batch, _context(8))[0].double(), rtol=0.03, atol=0)
    table = heun(model.schedule, uniform(model.schedule, 3))
    noise = normal(4, 3, 4, 4, seed=3)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            expected = sample(plain.field(torch.arange(4), scale), table, noise)
            for field in (model.field(torch.arange(4), scale), model.field(torch.arange(4), scale).__call__):
                found = sample(field, table, noise.to(given))
                assert found.dtype == given
                assert found.isfinite().all()
                if given != torch.bfloat16:  # of a state in bfloat16 little is left
                    tolerance = 1e-4 if dtype == torch.float64 else 0.3
                    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)
