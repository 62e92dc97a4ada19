"""TarFlow: exact densities, causality, samples one by one and all at once, guidance, denoising, and the baseline protocol."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_flow_layers import images, jacobian_log_det, randomise
from torch import Tensor

from midway.gen.baselines.base import write_baseline
from midway.gen.baselines.registry import load_baseline
from midway.gen.baselines.tarflow import TarFlow, TarFlowConfig
from midway.gen.baselines.tarflow_blocks import AutoregressiveFlow
from midway.gen.baselines.tarflow_sampling import Inversion, guided, invert, tweedie
from midway.gen.core import randomness
from midway.gen.data.images import load_images, to_float, to_uint8
from midway.gen.data.levels import bits_per_dim, from_levels, to_levels
from midway.gen.training.batches import Context, ImageBatch

SMALL = TarFlowConfig(patch=2, flows=3, depth=2, width=8, heads=2, mlp_ratio=2, entry="symmetric")
GAUSSIAN = replace(SMALL, noise="gaussian")
SHAPE = (1, 4, 6)
PAIR = (1, 1, 2)
JACOBI = Inversion("jacobi")


def _context(count: int, step: int = 0, first: int = 0) -> Context:
    return Context(0, step, torch.arange(first, first + count))


def _batch(count: int, levels: int = 17, shape: tuple[int, int, int] = SHAPE) -> ImageBatch:
    k = (randomness.uniform(0, "test", 0, torch.arange(count), shape).square() * levels).long()
    return ImageBatch(from_levels(k, levels), torch.arange(count) % 3)


def _model(config: TarFlowConfig = SMALL, classes: int = 0, shape=SHAPE, levels: int = 17, std: float = 0.3) -> TarFlow:
    """With every parameter random, as zeros would hide errors; std 0 keeps what it starts with."""
    torch.manual_seed(0)
    model = TarFlow(config, shape, levels, classes)
    return (randomise(model, std) if std else model).eval().requires_grad_(False)  # pyright: ignore[reportReturnType]


def _tokens(count: int) -> Tensor:
    """float64 (count, 5, 2)."""
    return images(count, (1, 5, 2))[:, 0]


def _flow(flipped: bool, classes: int = 0, tokens: int = 5) -> AutoregressiveFlow:
    flow = AutoregressiveFlow((tokens, 2), 8, 2, 2, 2.0, classes, flipped)
    return randomise(flow, 0.4).double().requires_grad_(False)  # pyright: ignore[reportReturnType]


# ---- densities ----


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_inverse_undoes_forward(method) -> None:
    model, labels = _model(classes=3).double(), torch.tensor([0, 2, 3])  # the last has no class
    x, how = images(3, SHAPE), Inversion(method, tolerance=0)
    z, _ = model(x, labels)
    assert (z - x).abs().mean() > 0.3
    torch.testing.assert_close(model.inverse(z, labels, how)[0], x, rtol=0, atol=1e-9)
    single = _model(classes=3, std=0.15)
    x = x.float()
    torch.testing.assert_close(single.inverse(single(x, labels)[0], labels, how)[0], x, rtol=0, atol=1e-5)


def test_log_determinants_are_those_of_the_jacobian() -> None:
    model, x, labels = _model(classes=3).double(), images(2, SHAPE), torch.tensor([1, 2])
    _, log_det = model(x, labels)
    expected = [jacobian_log_det(lambda v, i=i: model(v, labels[i : i + 1])[0], x[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(log_det, torch.cat(expected), rtol=0, atol=1e-9)
    assert log_det.abs().min() > 0.1


@pytest.mark.parametrize("flipped", [False, True])
def test_a_flow_is_triangular_in_its_order(flipped: bool) -> None:
    """Token i of z changes with tokens up to i alone, with all of those, and number by number with its own."""
    flow, x = _flow(flipped), _tokens(1)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0])
    blocks = jacobian.abs().amax((1, 3))  # pyright: ignore[reportAttributeAccessIssue] (5, 5)
    later = torch.ones(5, 5).tril(-1).bool()
    on, off = (later.T, later) if flipped else (later, later.T)
    assert (blocks[off] == 0).all()
    assert (blocks[on] > 1e-6).all()
    own = jacobian.diagonal(dim1=0, dim2=2)  # pyright: ignore[reportAttributeAccessIssue] (2, 2, 5)
    assert (own[0, 1] == 0).all()
    assert (own[0, 0] > 0).all()


def test_moments_do_not_see_their_own_token_or_later_ones() -> None:
    flow, x = _flow(False), _tokens(2)
    changed = x.clone()
    changed[:, 2:] += 5
    before, after = flow.moments(x), flow.moments(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any()


def test_orders_take_turns() -> None:
    model = _model(replace(SMALL, flows=4))
    assert [flow.flipped for flow in model.flows] == [False, True, False, True]


def test_a_new_model_is_the_identity_with_a_density_in_closed_form() -> None:
    """-1/2 (2x - 1)^2 - 1/2 ln 2 pi + ln 2 - ln L a dimension, by hand."""
    model, batch, context = _model(std=0), _batch(5), _context(5)
    x = (torch.round(batch.images.double() * 16 / 255) + context.uniform("dequantise 0", SHAPE)) / 17
    by_hand = -0.5 * (2 * x - 1) ** 2 - 0.5 * math.log(2 * math.pi) + math.log(2) - math.log(17)
    got = model.log_likelihood(batch.images, None, context)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, by_hand.flatten(1).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("entry", ["symmetric", "logit"])
def test_densities_integrate_to_one(entry) -> None:
    """Of what the flows see, over a wide square, and hence the bounds of all images stay below 1 together."""
    model = _model(replace(SMALL, patch=1, entry=entry), shape=PAIR, levels=3, std=0.2).double()
    line = torch.linspace(-12, 12, 201, dtype=torch.float64)
    y = torch.cartesian_prod(line, line).view(-1, *PAIR)
    assert (model.log_density(y).exp().sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=1e-4)
    k = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, *PAIR)
    draws = 200
    nats = model.log_likelihood(from_levels(k, 3).repeat(draws, 1, 1, 1), None, _context(9 * draws))
    weights = nats.exp().view(draws, 9)  # unbiased for P(k)
    fine = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    x = torch.cartesian_prod(fine, fine).view(-1, *PAIR)  # 20 x 20 in a cell, whose mean density is P(k) 9
    seen, log_det = model._enter(x)
    cells = ((model.log_density(seen) + log_det).exp() / 9).view(3, 20, 3, 20).mean((1, 3)).flatten()
    assert cells.sum() < 1
    error = weights.std(0) / math.sqrt(draws)
    assert ((weights.mean(0) - cells).abs() < 4 * error + 1e-4).all()
    assert nats.view(draws, 9).mean(0).exp().sum() < cells.sum()


def test_draws_are_averaged_inside_the_logarithm() -> None:
    batch, context = _batch(4), _context(4)
    model = _model(replace(SMALL, draws=3))
    single = [model._bound(batch.images, None, context, draw).double() for draw in range(3)]
    expected = torch.stack(single).exp().mean(0).log()
    torch.testing.assert_close(model.log_likelihood(batch.images, None, context), expected, rtol=1e-10, atol=0)
    assert not torch.isclose(single[0], single[1]).any()


def test_scores_depend_on_the_sample_and_not_on_its_batch() -> None:
    model, batch = _model(classes=3), _batch(6)
    whole = model.log_likelihood(batch.images, batch.labels, _context(6))
    assert torch.equal(whole, model.log_likelihood(batch.images, batch.labels, _context(6)))
    parts = [
        model.log_likelihood(batch.images[i : i + 1], batch.labels[i : i + 1], _context(1, first=i)) for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=0)
    assert not torch.isclose(model.log_likelihood(batch.images, (batch.labels + 1) % 3, _context(6)), whole).any()
    assert not torch.isclose(model.log_likelihood(batch.images, batch.labels, _context(6, first=6)), whole).any()


# ---- the objective ----


def test_the_loss_is_the_mean_bits_of_labels_some_of_which_are_dropped() -> None:
    model, batch, context = _model(replace(SMALL, label_dropout=0.4), 3), _batch(40), _context(40)
    loss, logs = model.loss(batch, context)
    labels = torch.where(context.uniform("label") < 0.4, 3, batch.labels)
    assert 8 < (labels == 3).sum() < 24
    bits = bits_per_dim(model._bound(batch.images, labels, context, 0), 24).mean()
    torch.testing.assert_close(loss, bits)
    assert torch.equal(logs["bits_per_dim"], loss)
    exact = _model(replace(SMALL, label_dropout=0.0), 3)
    nats = exact.log_likelihood(batch.images, batch.labels, context)
    assert exact.loss(batch, context)[0].item() == pytest.approx(bits_per_dim(nats, 24).mean().item(), rel=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    """As accumulation and several processes need."""
    for config in (SMALL, GAUSSIAN):
        model, batch = _model(config, 3), _batch(8)
        cut = [ImageBatch(batch.images[i : i + 2], batch.labels[i : i + 2]) for i in (0, 2, 4, 6)]
        parts = [model.loss(part, _context(2, first=2 * i))[0].item() for i, part in enumerate(cut)]
        assert sum(parts) / 4 == pytest.approx(model.loss(batch, _context(8))[0].item(), rel=1e-6)


def test_the_loss_under_autocast_is_summed_in_float32() -> None:
    model, batch = _model(std=0.1), _batch(16)
    plain = model.loss(batch, _context(16))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(batch, _context(16))
        z, log_det = model(images(2, SHAPE, torch.float32))
        moments = model.flows[0].moments(model.tokens(z))  # pyright: ignore[reportCallIssue]
    assert moments.dtype == torch.float32
    assert loss.dtype == z.dtype == log_det.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.01)


def test_gaussian_noise_is_trained_on_the_density_of_noisy_images() -> None:
    model, batch, context = _model(replace(SMALL, noise="gaussian", sigma=0.2)), _batch(8), _context(8)
    noisy = to_float(batch.images) + 0.2 * context.normal("noise", SHAPE)
    z, log_det = model(noisy)
    nats = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + log_det
    loss, logs = model.loss(batch, context)
    assert loss.item() == pytest.approx(-nats.mean().item() / (24 * math.log(2)), rel=1e-5)
    assert set(logs) == {"density_bits"}


def test_gradients_are_the_same_when_activations_are_computed_again() -> None:
    model, batch = _model().requires_grad_(True), _batch(4)
    gradients = []
    for again in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = again  # pyright: ignore[reportArgumentType]
        model.zero_grad()
        model.loss(batch, _context(4))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- sampling ----


@pytest.mark.parametrize("flipped", [False, True])
def test_the_memory_of_keys_gives_what_computing_all_again_gives(flipped: bool) -> None:
    flow, z, labels = _flow(flipped, classes=2), _tokens(3), torch.tensor([0, 1, 2])
    x = torch.zeros_like(z)
    for i in range(5):  # every token by the whole network
        mean, log_scale = flow.moments(x, labels).chunk(2, dim=2)
        x[:, i] = flow.ordered(z)[:, i] * log_scale[:, i].exp() + mean[:, i]
    got, calls = invert(z, guided(flow, labels, 2, Inversion()), Inversion())
    torch.testing.assert_close(got, flow.ordered(x), rtol=0, atol=1e-12)
    assert calls.tolist() == [5, 5, 5]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_jacobi_is_sequential_sampling(guidance: float) -> None:
    model, seeds, labels = _model(classes=3, std=0.15), torch.arange(6), torch.arange(6) % 3
    z = randomness.normal(0, "sample", 0, seeds, SHAPE)
    one, cost = model.inverse(z, labels, Inversion(guidance=guidance))
    all_at_once, fast = model.inverse(z, labels, Inversion("jacobi", guidance=guidance))
    torch.testing.assert_close(all_at_once, one, rtol=0, atol=1e-4)
    copies = 1 if guidance == 1 else 2
    assert cost.evaluations.tolist() == [6.0 * copies] * 6
    assert cost.passes.tolist() == [1.0 * copies] * 6
    assert (fast.calls <= 6).all()
    assert fast.calls.shape == (6, 3)
    assert torch.equal(fast.evaluations, fast.passes)
    assert fast.evaluations.tolist() == [copies * sum(row) / 3 for row in fast.calls.tolist()]


def test_sweep_k_makes_token_k_exact() -> None:
    """Whatever the tolerance says: a strongly coupled flow needs all N, and each sweep settles one token more."""
    flow, z = _flow(False), _tokens(4)
    exact, _ = invert(z, guided(flow, None, 0, Inversion()), Inversion())
    x = z
    for k in range(1, 6):
        mean, log_scale = flow.moments(x).chunk(2, dim=2)
        x = z * log_scale.exp() + mean
        torch.testing.assert_close(x[:, :k], exact[:, :k], rtol=0, atol=1e-12)
    got, calls = invert(z, guided(flow, None, 0, JACOBI), Inversion("jacobi", tolerance=0))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    assert calls.tolist() == [5] * 4
    assert not torch.isclose(flow.moments(z), flow.moments(exact)).all()


def test_mild_flows_converge_in_fewer_sweeps_and_each_sample_in_its_own() -> None:
    model, seeds = _model(replace(SMALL, patch=1), std=0.15).double(), torch.arange(8)
    z = randomness.normal(0, "sample", 0, seeds, SHAPE).double() * (1 + seeds.view(-1, 1, 1, 1))
    loose = Inversion("jacobi", tolerance=1e-3)
    x, cost = model.inverse(z, None, loose)
    assert cost.calls.max() < 24
    assert len(cost.calls.sum(1).unique()) > 1
    assert (x - model.inverse(z)[0]).abs().max() < 0.01
    alone = [model.inverse(z[i : i + 1], None, loose) for i in range(8)]
    torch.testing.assert_close(torch.cat([a for a, _ in alone]), x, rtol=0, atol=1e-9)
    assert torch.equal(torch.cat([c.calls for _, c in alone]), cost.calls)


def test_guesses_that_overflow_do_not_reach_tokens_that_do_not_depend_on_them() -> None:
    """A guess may be infinite and worse; N sweeps are the sequential result all the same."""
    flow = AutoregressiveFlow((4, 1), 8, 1, 2, 2.0, 0, False)
    randomise(flow, 0.4).requires_grad_(False)
    flow.head.bias[1] = -86.0  # x of order 1 for z of order 1e37
    z = images(16, (1, 4, 1), torch.float32)[:, 0] * 2e37
    assert flow.moments(z).isnan().flatten(1).any(1).sum() > 8
    exact, _ = invert(z, guided(flow, None, 0, Inversion()), Inversion())
    got, _ = invert(z, guided(flow, None, 0, JACOBI), JACOBI)
    assert 0.1 < exact.std() < 10
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_an_image_is_a_function_of_its_seed() -> None:
    model, seeds, labels = _model(classes=3, std=0.15), torch.tensor([5, 1, 9]), torch.tensor([0, 1, 2])
    whole = model.sample(seeds, labels)
    assert whole.shape == (3, *SHAPE)
    to_levels(to_uint8(whole), 17)  # refuses other values
    assert torch.equal(model.sample(seeds.flip(0), labels.flip(0)).flip(0), whole)
    assert torch.equal(model.sample(seeds[1:2], labels[1:2]), whole[1:2])
    assert not torch.equal(whole, model.sample(seeds + 1, labels))
    assert not torch.equal(whole, model.sample(seeds, (labels + 1) % 3))
    cold = model.sample(seeds, torch.zeros(3, dtype=torch.int64), temperature=0)
    assert torch.equal(cold[0], cold[1])
    assert model.sample_counted(seeds, labels)[1].evaluations.tolist() == [model.sample_nfe] * 3 == [6] * 3


@pytest.mark.parametrize("entry", ["symmetric", "logit"])
def test_samples_fall_into_the_cells_of_their_levels(entry) -> None:
    """A new model is the identity: y = z, of which the cell is known by hand."""
    model, seeds = _model(replace(SMALL, entry=entry), std=0, levels=4), torch.arange(50)
    z = randomness.normal(0, "sample", 0, seeds, SHAPE).double()
    x = (z + 1) / 2 if entry == "symmetric" else (torch.sigmoid(z) - 0.05) / 0.9
    expected = (4 * x).floor().clamp(0, 3) / 3 * 2 - 1
    torch.testing.assert_close(model.sample(seeds).double(), expected, rtol=0, atol=1e-6)


# ---- guidance ----


def _moments(flow: AutoregressiveFlow, x: Tensor, how: Inversion) -> Tensor:
    return guided(flow, torch.tensor([1, 0]), 2, how).moments(x, torch.arange(2))


@pytest.mark.parametrize("growth", ["constant", "linear"])
def test_guidance_extrapolates_means_and_log_scales(growth) -> None:
    flow, x = _flow(False, classes=2), _tokens(2)
    known, unknown = flow.moments(x, torch.tensor([1, 0])), flow.moments(x, torch.tensor([2, 2]))
    weights = [1 + 2 * (i / 4 if growth == "linear" else 1) for i in range(5)]
    expected = torch.stack([(1 - w) * unknown[:, i] + w * known[:, i] for i, w in enumerate(weights)], dim=1)
    torch.testing.assert_close(_moments(flow, x, Inversion(guidance=3.0, growth=growth)), expected, rtol=0, atol=1e-12)
    assert torch.equal(_moments(flow, x, Inversion(growth=growth)), known)


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_guidance_1_is_the_class_and_0_is_no_class(method) -> None:
    model, z, labels = _model(classes=3).double(), images(3, SHAPE), torch.arange(3)
    plain = model.inverse(z, labels)[0]
    none = model.inverse(z, torch.full_like(labels, 3))[0]
    how = Inversion(method, 0.0)
    torch.testing.assert_close(model.inverse(z, labels, how)[0], plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.inverse(z, labels, replace(how, guidance=0.0))[0], none, rtol=0, atol=1e-12)
    close = model.inverse(z, labels, replace(how, guidance=1 + 1e-9))[0]
    torch.testing.assert_close(close, plain, rtol=0, atol=1e-6)
    assert (plain - none).abs().max() > 0.1


# ---- denoising ----


def test_tweedies_formula_is_the_posterior_mean_of_a_gaussian() -> None:
    """x ~ N(m, s^2), y = x + sigma eps: E[x | y] = (s^2 y + sigma^2 m) / (s^2 + sigma^2)."""
    m, s, sigma, y = 0.3, 0.7, 0.2, images(3, SHAPE)
    marginal = torch.distributions.Normal(y.new_tensor(m), y.new_tensor(math.hypot(s, sigma)))
    got = tweedie(y, lambda v: marginal.log_prob(v).flatten(1).sum(1), sigma)
    torch.testing.assert_close(got, (s**2 * y + sigma**2 * m) / (s**2 + sigma**2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inference", [False, True])
def test_samples_of_gaussian_noise_are_denoised_once(inference: bool) -> None:
    """A new model is standard normal, of which y becomes (1 - sigma^2) y."""
    model, seeds = _model(replace(SMALL, noise="gaussian", sigma=0.5, entry="logit"), std=0), torch.arange(4)
    with torch.inference_mode(inference):
        got, cost = model.sample_counted(seeds)
    y = randomness.normal(0, "sample", 0, seeds, SHAPE)
    torch.testing.assert_close(got, (0.75 * y).clamp(-1, 1))
    assert cost.evaluations.tolist() == [model.sample_nfe] * 4 == [6 + 2] * 4
    assert cost.passes.tolist() == [1 + 2] * 4


def test_denoising_uses_the_class() -> None:
    model, labels = _model(replace(SMALL, noise="gaussian", sigma=0.5), classes=3, std=0.15), torch.arange(3)
    y = model.inverse(randomness.normal(0, "sample", 0, torch.arange(3), SHAPE), labels)[0]
    step = torch.autograd.functional.jacobian(lambda v: model.log_density(v, labels).sum(), y)
    expected = (y + 0.25 * step).clamp(-1, 1)  # pyright: ignore[reportOperatorIssue]
    torch.testing.assert_close(model.sample(torch.arange(3), labels), expected)


# ---- training, files and errors ----


def test_a_few_steps_learn_digits() -> None:
    digits = load_images("digits")
    model = _model(TarFlowConfig(flows=2, depth=1, width=16, heads=2), shape=(1, 8, 8), std=0).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(25):
        loss, _ = model.loss(ImageBatch(digits.images[:64], digits.labels[:64]), _context(64, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    nats = model.log_likelihood(digits.images[64:128], None, _context(64))
    assert bits_per_dim(nats, 64).mean() < 3.6  # uniform: 4.09
    x, fast = model.sample_counted(torch.arange(4), how=Inversion("jacobi", tolerance=1e-4))
    assert fast.calls.double().mean() < 16
    assert (x != model.sample(torch.arange(4))).double().mean() < 0.02  # a level may turn on rounding


def test_a_model_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    model, batch = _model(replace(SMALL, entry="logit"), classes=3), _batch(4)
    write_baseline(tmp_path, model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    read = load_baseline(tmp_path, kinds={"tarflow": TarFlow})
    assert read.config == model.config
    score = model.log_likelihood(batch.images, batch.labels, _context(4))
    assert torch.equal(read.log_likelihood(batch.images, batch.labels, _context(4)), score)
    assert read.sample_nfe == 6


UNGUIDED = replace(SMALL, label_dropout=0.0)
SEEDS, LABELS = torch.arange(3), torch.arange(3)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: _model(replace(SMALL, patch=4)), "4x6 cannot be cut into patches of 4"),
        (lambda: _model(replace(SMALL, patch=3)), "choose one that divides both sides"),
        (lambda: _model(replace(SMALL, heads=3)), "cannot be divided into 3 heads"),
        (lambda: _model(GAUSSIAN).log_likelihood(_batch(2).images, None, _context(2)), "no likelihood of integers"),
        (lambda: _model(GAUSSIAN).loss(ImageBatch(_batch(2).images + 1, LABELS), _context(2)), "none of 17 levels"),
        (lambda: replace(SMALL, logit_margin=0.5), "logit_margin is 0.5"),
        (lambda: replace(SMALL, sigma=0.0), "sigma is 0.0"),
        (lambda: replace(SMALL, flows=0), "flows is 0"),
        (lambda: replace(SMALL, label_dropout=1.0), "label_dropout is 1.0"),
        (lambda: Inversion("newton"), "method is 'newton'; choose one of: sequential, jacobi"),  # pyright: ignore
        (lambda: Inversion(growth="cosine"), "growth is 'cosine'"),  # pyright: ignore
        (lambda: Inversion(tolerance=-1.0), "tolerance is -1.0"),
        (lambda: Inversion(guidance=math.inf), "guidance is inf"),
        (lambda: _model().sample(SEEDS, temperature=-1), "temperature is -1"),
        (lambda: _model().sample(SEEDS, how=Inversion(guidance=2)), "this model has none"),
        (lambda: _model(UNGUIDED, 3).sample(SEEDS, LABELS, how=Inversion(guidance=2)), "train with label_dropout"),
        (lambda: _model(classes=3).sample(SEEDS), "needs 3 labels"),
        (lambda: _model(classes=3).sample(SEEDS, LABELS + 1), "classes 0 to 2"),
        (lambda: _model(std=math.inf).sample(SEEDS), "samples are not finite"),
    ],
)
def test_errors_say_what_to_do(act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
