"""The VAE: its bounds against quadrature, its objective against the formula, and what the baseline protocol promises."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tensors import randomised
from torch import Tensor

from midway.gen.baselines.vae import VAE, VAEConfig, channel_kl, coordinate_kl, interpolate, reconstruct, traverse
from midway.gen.data.images import load_images, to_float
from midway.gen.data.levels import bits_per_dim, from_levels
from midway.gen.training.batches import Context, ImageBatch

TINY = VAEConfig(latent_dim=3, downsample=4, width=8, blocks=1, mixtures=2)
DIGITS = load_images("digits")
IMAGES, LABELS = DIGITS.images[:8], DIGITS.labels[:8]


def _perturbed(model: VAE, size: float = 0.3) -> VAE:
    """Networks start as linear maps; this makes every layer matter. In float64."""
    return randomised(model, seed=1, std=size).double()


def _model(classes: int = 0, **options: object) -> VAE:
    torch.manual_seed(0)
    return _perturbed(VAE(replace(TINY, **options), (1, 8, 8), 17, classes), 0.1)  # pyright: ignore


def _context(count: int, step: int = 0, first: int = 0) -> Context:
    return Context(seed=3, step=step, sample_ids=torch.arange(first, first + count))


def _loss(model: VAE, step: int = 0) -> tuple[float, float]:
    """The loss and the bound it reports, for the same images and noise."""
    loss, logs = model.loss(ImageBatch(IMAGES, LABELS), _context(8, step))
    return loss.item(), logs["bits_per_dim"].item()


# ---- bounds ----


def test_the_kl_divergence_is_what_sampling_gives() -> None:
    mean, log_variance = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    torch.manual_seed(0)
    z = posterior.sample((100000,))
    ratio = (posterior.log_prob(z) - prior.log_prob(z)).flatten(3).sum(3)  # (S, B, D)
    error = ratio.std(0) / math.sqrt(len(z))
    assert ((channel_kl(mean, log_variance) - ratio.mean(0)).abs() < 5 * error).all()


def _two_pixels() -> tuple[VAE, Tensor, Tensor]:
    """A VAE of 1x2 images of 4 levels with two latents; all 16 images; their probabilities by quadrature."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(latent_dim=1, downsample=1, width=8, blocks=1, mixtures=2), (1, 1, 2), 4)
    _perturbed(model, 0.2)
    k = torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(16, 1, 1, 2)
    line = torch.linspace(-7, 7, 141, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    weight = torch.exp(-z.square().sum(1) / 2) / (2 * math.pi) * (line[1] - line[0]) ** 2
    with torch.no_grad():
        likelihood = model.likelihood(z.view(-1, 1, 1, 2))
        given = [likelihood.log_prob(one.expand(len(z), 1, 1, 2)).flatten(1).sum(1).exp() for one in k]
    return model, from_levels(k, 4), torch.stack([(weight * p).sum() for p in given])


def test_the_bounds_of_all_images_stay_below_their_probabilities() -> None:
    """Weights average to P(x), image by image; their logarithms, the ELBO, to no more; and all P(x) sum to 1."""
    model, images, exact = _two_pixels()
    torch.testing.assert_close(exact.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)
    copies, draws = 400, 4
    log_w = model.log_weights(images.repeat(copies, 1, 1, 1), None, _context(16 * copies), draws)
    log_w = log_w.view(copies, 16, draws).transpose(0, 1).flatten(1)  # (16, copies draws)
    weights = log_w.exp()
    error = weights.std(1) / math.sqrt(weights.shape[1])
    assert (error < 0.15 * exact).all()
    assert ((weights.mean(1) - exact).abs() < 4.5 * error).all()
    elbo = log_w.mean(1)
    assert (elbo < exact.log() + 3 * log_w.std(1) / math.sqrt(log_w.shape[1])).all()
    assert elbo.exp().sum() < 1
    assert exact.max() > 2 * exact.min()  # the model is not trivial


def test_iwae_of_one_draw_is_the_elbo_and_more_draws_tighten_it() -> None:
    model, context = _model(), _context(8)
    weights = model.log_weights(IMAGES, None, context, 16)
    assert torch.equal(model.iwae(IMAGES, None, context, 1), model.log_likelihood(IMAGES, None, context, samples=1))
    assert torch.equal(model.log_likelihood(IMAGES, None, context, samples=16), weights.mean(1))
    wanted = [weights[:, :n].exp().mean(1).log() for n in (1, 4, 16)]
    bounds = [model.iwae(IMAGES, None, context, n) for n in (1, 4, 16)]
    for got, want in zip(bounds, wanted, strict=True):
        torch.testing.assert_close(got, want)
    averages = [weights.view(8, -1, n).logsumexp(2).mean() - math.log(n) for n in (1, 2, 4, 8, 16)]
    assert averages == sorted(averages)  # by Jensen for one set of draws, not only in expectation
    assert averages[0] < averages[-1]


def test_the_sampled_bound_agrees_with_the_logged_one() -> None:
    """The log uses the closed form of the divergence, the score draws of it."""
    model, batch, context = _model(), ImageBatch(IMAGES.repeat(40, 1, 1, 1), LABELS.repeat(40)), _context(320)
    drawn = bits_per_dim(model.log_weights(batch.images, None, context, 4), 64).mean(0).tolist()
    logged = [model.loss(batch, _context(320, step))[1]["bits_per_dim"].item() for step in range(8)]
    error = math.hypot(_error(drawn), _error(logged))
    assert sum(drawn) / len(drawn) == pytest.approx(sum(logged) / len(logged), abs=5 * error)
    assert error < 0.02


def _error(values: list[float]) -> float:
    return torch.tensor(values).std().item() / math.sqrt(len(values))


# ---- the objective ----


@pytest.mark.parametrize(
    ("options", "step", "weight"),
    [({}, 5, 1.0), ({"beta": 3.0}, 0, 3.0), ({"kl_warmup": 10}, 3, 0.4), ({"kl_warmup": 10, "beta": 0.5}, 50, 0.5)],
)
def test_weights_change_the_loss_and_not_the_reported_bound(options: dict, step: int, weight: float) -> None:
    bound = _loss(_model(), step)[1]
    loss, logged = _loss(_model(**options), step)
    kl = channel_kl(*_model().posterior(IMAGES)).sum(1).mean().item() / (64 * math.log(2))
    assert logged == pytest.approx(bound, rel=1e-12)
    assert loss == pytest.approx(bound + (weight - 1) * kl, rel=1e-12)


def test_free_bits_hold_for_each_channel_of_each_image() -> None:
    kl = channel_kl(*_model().posterior(IMAGES)).detach()
    limit = kl.median().item()
    loss, logged = _loss(_model(free_bits=limit))
    assert logged == pytest.approx(_loss(_model())[1], rel=1e-12)
    extra = torch.relu(limit - kl).sum(1).mean().item() / (64 * math.log(2))
    assert extra > 0
    assert loss == pytest.approx(logged + extra, rel=1e-12)


def _score(model: VAE) -> Tensor:
    return model.log_likelihood(IMAGES, LABELS, _context(8))


# ---- samples and pictures ----


def test_an_image_is_a_function_of_its_seed() -> None:
    model, seeds = _model(), torch.tensor([5, 1, 9])
    images = model.sample(seeds)
    assert images.shape == (3, 1, 8, 8)
    torch.testing.assert_close(model.sample(seeds[1:2]), images[1:2])
    assert not torch.isclose(images[0], images[1]).all()


def test_reconstructions_interpolations_and_traversals_decode_posterior_means() -> None:
    model, other = _model(classes=10), IMAGES.flip(0)
    with torch.no_grad():
        means = model.posterior(IMAGES, LABELS)[0]
        ends = [model.decode(model.posterior(x, LABELS)[0], LABELS) for x in (IMAGES, other)]
        middle = model.decode((means + model.posterior(other, LABELS)[0]) / 2, LABELS)
    torch.testing.assert_close(reconstruct(model, IMAGES, LABELS), ends[0])
    path = interpolate(model, IMAGES, other, LABELS, steps=3)
    assert path.shape == (8, 3, 1, 8, 8)
    for got, want in zip(path.unbind(1), (ends[0], middle, ends[1]), strict=True):
        torch.testing.assert_close(got, want)
    coordinates = (7, 0)
    table = traverse(model, IMAGES, coordinates, (-1.0, 0.5, 2.0), LABELS)
    assert table.shape == (8, 2, 3, 1, 8, 8)
    moved = means.flatten(1).clone()
    moved[:, 7] = 2.0
    torch.testing.assert_close(table[:, 0, 2], model.decode(moved.view_as(means), LABELS))
    kl = coordinate_kl(model, IMAGES, LABELS)
    torch.testing.assert_close(
        kl.view(3, 4).sum(1), channel_kl(*model.posterior(IMAGES, LABELS)).mean(0), check_dtype=False
    )


# ---- labels and errors ----


def test_labels_matter_to_a_conditional_model_alone() -> None:
    model, other = _model(classes=10), (LABELS + 1) % 10
    context, z = _context(8), torch.zeros(8, 3, 2, 2, dtype=torch.float64)
    assert not torch.isclose(_score(model), model.log_likelihood(IMAGES, other, context)).any()
    assert not torch.isclose(model.posterior(IMAGES, LABELS)[0], model.posterior(IMAGES, other)[0]).any()
    assert not torch.isclose(model.decode(z, LABELS), model.decode(z, other)).all()
    plain = _model()
    assert torch.equal(_score(plain), plain.log_likelihood(IMAGES, None, context))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: _model().iwae(IMAGES, None, _context(8), 0), "at least one draw"),
        (lambda: interpolate(_model(), IMAGES, IMAGES, steps=1), "at least its two ends"),
        (lambda: traverse(_model(), IMAGES, [12], [0.0]), "0 to 11"),
    ],
)
def test_invalid_arguments_raise(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_images_are_seen_in_the_range_of_the_networks() -> None:
    """The encoder's input is [-1, 1], like every network's here."""
    model, seen = _model(), []
    model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.posterior(IMAGES)
    torch.testing.assert_close(seen[0], to_float(IMAGES).double())
