"""Continuous tokens against Gaussian latents of known covariance, whose conditionals and fields are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tensors import normal, randomised
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.priors.config import PriorConfig, TokenHeadConfig
from midway.gen.priors.continuous import ContinuousPrior, decode_tokens
from midway.gen.priors.decoding import Decoding, counts, halton_order
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import LatentLayout
from midway.gen.priors.masked import random_masks
from midway.gen.priors.registry import make_prior
from midway.gen.priors.token_head import TokenHead
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.grids import GRIDS
from midway.samplers.prediction import Field, Prediction, at, target_coefficients, times_of
from midway.samplers.sample import EvaluationCounter, ForwardCounter, sample
from midway.samplers.schedule import EDM, SCHEDULES, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, make_solver

LAYOUT = LatentLayout(2, 2, 3)
L, C = LAYOUT.length, LAYOUT.channels
LINEAR = Linear()
STEPS, FINE = 60, (1e6, 1e-6)
"""Of a sampler without an error to speak of: nothing is left of the data where it begins, and of the noise where it ends."""


@dataclass(frozen=True)
class GaussianLaws:
    """Exact conditionals: hidden vectors are a token's mean (C,) and covariance (C, C) given what is known."""

    mean: Tensor
    covariance: Tensor
    layout: LatentLayout = LAYOUT
    schedule: Schedule = LINEAR

    def hidden(self, tokens: Tensor, known: Tensor) -> Tensor:
        flat, found = tokens.flatten(1) - self.mean, []
        for x, seen in zip(flat, known.repeat_interleave(self.layout.channels, 1), strict=True):
            gain = self.covariance[:, seen] @ torch.linalg.inv(self.covariance[seen][:, seen])
            mean, rest = self.mean + gain @ x[seen], self.covariance - gain @ self.covariance[seen]
            own = [block(rest, i, i, self.layout.channels).flatten() for i in range(self.layout.length)]
            found.append(torch.cat([mean.view(self.layout.length, -1), torch.stack(own)], dim=1))
        return torch.stack(found)

    def field(self, hidden: Tensor, scale: float) -> Field:
        channels = self.layout.channels
        mean, covariance = hidden[:, 0, :channels], hidden[:, 0, channels:].unflatten(1, (channels, channels))

        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
            noisy = alpha[..., None].square() * covariance + sigma[..., None].square() * torch.eye(channels).double()
            x0 = mean + alpha * (covariance @ torch.linalg.solve(noisy, (x - alpha * mean)[..., None])).squeeze(-1)
            return Prediction(x0, (x - alpha * x0) / sigma)

        return predict


def block(matrix: Tensor, i: int, j: int, size: int) -> Tensor:
    """That of tokens i and j."""
    return matrix[i * size : (i + 1) * size, j * size : (j + 1) * size]


def gaussian() -> GaussianLaws:
    """A correlated law with a mean."""
    factor = normal(L * C, L * C, seed=3, dtype=torch.float64)
    return GaussianLaws(
        0.3 * normal(L * C, seed=4, dtype=torch.float64), factor @ factor.T / (L * C) + 0.1 * torch.eye(L * C)
    )


@dataclass(frozen=True)
class UnitNoise:
    """Image 0 has no noise at all, image 1 + i only the i-th number: what a linear sampler makes of them is its matrix."""

    order: Tensor
    size: int = L * C

    def keys(self, purpose: str, length: int) -> Tensor:
        return self.order.argsort().double().expand(1 + self.size, -1)

    def normal(self, draw: int, places: Tensor, channels: int) -> Tensor:
        units = torch.cat([torch.zeros(1, self.size), torch.eye(self.size)]).double().unflatten(1, (-1, channels))
        return units.gather(1, places[..., None].expand(-1, -1, channels))


def drawn_law(laws: GaussianLaws, how: Decoding, order: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what is drawn, without a sample: the map from noise to tokens is affine."""
    size = laws.layout.length * laws.layout.channels
    table = SOLVERS["rk4"].build(laws.schedule, GRIDS["logsnr"](laws.schedule, STEPS, *FINE))
    x = decode_tokens(laws, 1 + size, UnitNoise(order, size), how, table, dtype=torch.float64).flatten(1)
    matrix = x[1:] - x[0]
    return x[0], matrix.T @ matrix


def law_by_groups(covariance: Tensor, groups: Sequence[Sequence[int]], channels: int) -> Tensor:
    """In closed form: tokens of a group are independent given the groups before, each by its own conditional."""
    found, before = torch.zeros_like(covariance), list[int]()
    for group in groups:
        places = [[p * channels + c for c in range(channels)] for p in group]
        for own in places:
            gain = covariance[own][:, before] @ torch.linalg.inv(covariance[before][:, before])
            found[np.ix_(own, before)] = gain @ found[before][:, before]
            found[np.ix_(before, own)] = found[np.ix_(own, before)].T
            for other in places:
                theirs = covariance[other][:, before] @ torch.linalg.inv(covariance[before][:, before])
                found[np.ix_(own, other)] = gain @ found[before][:, before] @ theirs.T
            rest = covariance[own][:, own] - gain @ covariance[before][:, own]
            found[np.ix_(own, own)] = gain @ found[before][:, before] @ gain.T + rest
        before += [i for own in places for i in own]
    return found


ORDERS = [torch.arange(L), torch.tensor([4, 0, 5, 2, 1, 3])]


@pytest.mark.parametrize("order", ORDERS, ids=["rows", "mixed"])
def test_one_token_an_evaluation_has_the_joint_law_in_any_order(order: Tensor) -> None:
    laws = gaussian()
    mean, covariance = drawn_law(laws, Decoding("random"), order)
    torch.testing.assert_close(mean, laws.mean, atol=5e-5, rtol=0)
    torch.testing.assert_close(covariance, laws.covariance, atol=5e-5, rtol=0)
    assert (law_by_groups(laws.covariance, [[int(p)] for p in order], C) - laws.covariance).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_tokens_decided_together_lose_what_they_have_in_common(steps: int) -> None:
    laws, order = gaussian(), ORDERS[1]
    groups = [part.tolist() for part in order.split(counts("cosine", L, steps))]
    expected = law_by_groups(laws.covariance, groups, C)
    _, covariance = drawn_law(laws, Decoding("random", steps), order)
    torch.testing.assert_close(covariance, expected, atol=5e-5, rtol=0)
    for i, j in [(i, j) for group in groups for i in group for j in group]:
        assert i == j or (block(expected, i, j, C) - block(laws.covariance, i, j, C)).abs().max() > 1e-3


def test_the_law_comes_nearer_with_every_evaluation() -> None:
    laws, order = gaussian(), torch.tensor(halton_order(LAYOUT.rows, LAYOUT.columns))
    found = [drawn_law(laws, Decoding("halton", steps), order)[1] for steps in (1, 2, 3, 6)]
    inverse = torch.linalg.inv(laws.covariance)
    divergences = [float((inverse @ c).trace() - (inverse @ c).logdet() - L * C) / 2 for c in found]
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] < 1e-3 < 0.1 < divergences[0]


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_the_law_is_the_same_on_every_schedule(name: str) -> None:
    laws = gaussian()
    schedule = EDM(1e6) if name == "edm" else SCHEDULES[name]()
    other = GaussianLaws(laws.mean, laws.covariance, schedule=schedule)
    _, covariance = drawn_law(other, Decoding("random"), ORDERS[1])
    torch.testing.assert_close(covariance, laws.covariance, atol=3e-3, rtol=0)


def test_a_temperature_divides_the_log_density_of_a_gaussian_token() -> None:
    laws = gaussian()
    one = GaussianLaws(laws.mean[:C], laws.covariance[:C, :C], LatentLayout(C, 1, 1))
    mean, covariance = drawn_law(one, Decoding("random", temperature=0.25), torch.arange(1))
    torch.testing.assert_close(covariance, one.covariance / 4, atol=5e-5, rtol=0)
    torch.testing.assert_close(mean, one.mean, atol=5e-5, rtol=0)


def test_noise_is_that_of_image_and_place_whenever_a_token_is_decided() -> None:
    laws = GaussianLaws(torch.zeros(L * C).double(), torch.eye(L * C).double())
    table = make_solver("ddpm", Linear(), 5)

    def drawn(seeds: Tensor, how: Decoding) -> Tensor:
        return decode_tokens(laws, len(seeds), SeededDraws(seeds), how, table, dtype=torch.float64)

    seeds = torch.tensor([7, 2, 2**61, 1])
    together = drawn(seeds, Decoding("random", 1))
    assert len(together.unique()) == together.numel()
    torch.testing.assert_close(drawn(seeds, Decoding("random", 6)), together, atol=1e-12, rtol=0)
    torch.testing.assert_close(drawn(seeds, Decoding("halton", 3)), together, atol=1e-12, rtol=0)
    torch.testing.assert_close(drawn(seeds[2:3], Decoding("random", 2)), together[2:3], atol=1e-12, rtol=0)


# ---- the model ----


def small(conditional: bool = True, **head: object) -> ContinuousPrior:
    torch.manual_seed(0)
    config = PriorConfig(
        "continuous",
        width=16,
        depth=2,
        heads=2,
        conditional=conditional,
        head=TokenHeadConfig(width=16, depth=2, repeats=2, **head),  # pyright: ignore[reportArgumentType]
    )
    prior = make_prior(config, LAYOUT, 3)
    assert isinstance(prior, ContinuousPrior)
    return randomised(prior).eval()


def batch(size: int = 4) -> LatentBatch:
    return LatentBatch(normal(size, *LAYOUT.shape), torch.arange(size) % 3)


def test_latents_are_tokens_and_back() -> None:
    latents = normal(2, *LAYOUT.shape)
    tokens = LAYOUT.tokens(latents)
    assert tokens.shape == (2, L, C) and torch.equal(tokens[0, 4], latents[0, :, 1, 1])
    assert torch.equal(LAYOUT.latents(tokens), latents)
    with pytest.raises(ValueError, match="this prior takes"):
        LAYOUT.tokens(normal(2, 2, 3, 2))


def test_hidden_vectors_do_not_see_missing_tokens() -> None:
    prior, tokens = small(), normal(1, L, C).requires_grad_()
    known = torch.tensor([[True, False, True, False, False, True]])
    prior.hidden(tokens, known, torch.zeros(1, dtype=torch.int64)).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(-1) > 0).tolist() == known.tolist()


def test_a_step_trains_masked_tokens_alone_and_each_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, seen = small(), list[Tensor]()

    def error(self: TokenHead, x0: Tensor, hidden: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        seen.append(x0)
        return (x0 - eps).square().mean(1)

    monkeypatch.setattr(TokenHead, "error", error)
    size, made = 64, LatentBatch(torch.arange(64.0 * L * C).view(64, *LAYOUT.shape), torch.zeros(64, dtype=torch.int64))
    context = Context(0, 3, torch.arange(size))
    prior.loss(made, context)
    count, order = random_masks(L, context)
    assert set(count.long().tolist()) == set(range(1, L + 1))
    for tokens, x0, k, places in zip(
        LAYOUT.tokens(made.latents), seen[0].unflatten(0, (size, -1)), count, order, strict=True
    ):
        times = (x0[:, None] == tokens).all(-1).sum(0)
        trained = times[places[: int(k)]]
        assert int(trained.sum()) == prior.config.head.repeats * L  # all there are: none of a token that is there
        assert int(trained.min()) >= prior.config.head.repeats and int(trained.max() - trained.min()) <= 1


@pytest.mark.parametrize("target", ["velocity", "v", "eps", "x0"])
def test_the_loss_has_no_gradient_at_the_exact_head(target: str) -> None:
    """Expectations over the token and its noise by Gauss-Hermite quadrature, exact for polynomials of degree 5."""
    mean, deviation, t = 0.4, 0.7, torch.tensor([0.35], dtype=torch.float64)
    head = TokenHead(TokenHeadConfig(target=target, schedule="cosine"), 1, 4).double()  # pyright: ignore[reportArgumentType]
    schedule = Cosine()
    parameters = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)

    def exact(x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x - alpha * mean)
        a, b = (each[:, None] for each in target_coefficients(target, t, schedule))  # pyright: ignore[reportArgumentType]
        value = (a * x0 + b * (x - alpha * x0) / sigma) / torch.hypot(a, b)
        return parameters[0] * value + parameters[1] * x + parameters[2]

    head.at_times = exact
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(3))
    z, w = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)
    error = head.error(mean + deviation * z[:, :1], torch.zeros(9, 4).double(), t.expand(9), z[:, 1:])
    (gradient,) = torch.autograd.grad((w * error).sum() / w.sum(), parameters)
    assert gradient.abs().max() < 1e-12
    shifted = head.error(mean + 0.1 + deviation * z[:, :1], torch.zeros(9, 4).double(), t.expand(9), z[:, 1:])
    assert torch.autograd.grad((w * shifted).sum() / w.sum(), parameters)[0].abs().max() > 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm"])
def test_the_field_of_a_head_at_known_times_is_its_field(schedule: str) -> None:
    head, x, hidden = small(schedule=schedule, target="velocity").head, normal(5, C), normal(5, 16, seed=1)
    times = (0.9, 0.4, 0.05)
    for labels, guidance in ((hidden, 1.0), (torch.stack([hidden, normal(5, 16, seed=2)], 1), 2.5)):
        field = head.field(labels, guidance)
        found = at(field, times, x)
        for (p, q), value, t in zip(found.coefficients, found.values, times_of(times, x), strict=True):
            torch.testing.assert_close(p * x + q * value(x), field(x, t).x0, atol=1e-4, rtol=1e-4)
        counter = EvaluationCounter(head.conditional_field)
        table = make_solver("euler", head.schedule, 4)
        counted = sample(head.field(labels, guidance, counter), table, x)
        torch.testing.assert_close(counted, sample(field, table, x), atol=1e-4, rtol=1e-4)
        assert counter.evaluations == 5 * 4 * (1 + (guidance != 1))


def test_samples_do_not_depend_on_the_batch_and_counters_are_exact() -> None:
    prior, labels, seeds = small(), torch.tensor([0, 1, 2, 1]), torch.tensor([5, 3, 8, 1])
    for how, guided in ((Decoding("random", 3), 1), (Decoding("halton", 2, guidance=2.0), 2)):
        with ForwardCounter(prior.trunk) as trunk, ForwardCounter(prior.head) as head:
            images = prior.draw(labels, SeededDraws(seeds), how, make_solver("dpmpp2m_sde", prior.head.schedule, 5))
        assert images.shape == (4, L, C)
        assert trunk.evaluations == 4 * (how.steps or 0) * guided
        assert head.evaluations == 4 * L * 5 * guided
        halves = [
            prior.draw(labels[part], SeededDraws(seeds[part]), how, make_solver("dpmpp2m_sde", prior.head.schedule, 5))
            for part in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(torch.cat(halves), images, atol=1e-4, rtol=1e-4)


def test_a_ramp_begins_without_guidance_and_costs_the_head_nothing_there() -> None:
    prior, labels, draws = small(), torch.tensor([0, 1]), SeededDraws(torch.arange(2))
    table = make_solver("euler", prior.head.schedule, 3)
    with ForwardCounter(prior.head) as head:
        ramped = prior.draw(labels, draws, Decoding("halton", L, guidance=3.0, ramp=1.0), table)
    assert head.evaluations == 2 * 3 * (2 * L - 1)
    plain = prior.draw(labels, draws, Decoding("halton", L), table)
    first = halton_order(LAYOUT.rows, LAYOUT.columns)[0]
    torch.testing.assert_close(ramped[:, first], plain[:, first], atol=1e-5, rtol=1e-5)
    assert (ramped - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Decoding(), "random or halton"),
        (Decoding("certain"), "random or halton"),
        (Decoding("maskgit"), "random or halton"),
        (Decoding("random", top_k=3), "for codes"),
        (Decoding("random", L + 1), f"give 1 to {L}"),
    ],
)
def test_what_continuous_tokens_cannot_be_asked(how: Decoding, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small().draw(torch.zeros(1, dtype=torch.int64), SeededDraws(torch.zeros(1, dtype=torch.int64)), how)


@pytest.mark.slow
def test_a_trained_prior_has_the_covariance_of_its_data() -> None:
    layout = LatentLayout(1, 2, 2)
    factor = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0.6, 0, 0.8, 0], [0, 0.7, 0.5, 0.5]])
    covariance = factor @ factor.T
    torch.manual_seed(0)
    config = PriorConfig(
        "continuous", width=32, depth=2, heads=2, dropout=0, conditional=False, head=TokenHeadConfig(width=64)
    )
    prior = ContinuousPrior(config, layout, 0)
    optimizer = torch.optim.Adam(prior.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for step in range(800):
        ids = torch.arange(step * 128, (step + 1) * 128)
        data = (randomness.normal(9, "data", 0, ids, (4,)) @ factor.T).view(-1, 1, 2, 2)
        loss, _ = prior.loss(LatentBatch(data, torch.zeros(128, dtype=torch.int64)), Context(0, step, ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    zeros, seeds = torch.zeros(4096, dtype=torch.int64), torch.arange(4096)

    def error(steps: int) -> float:
        x = prior.draw(zeros, SeededDraws(seeds), Decoding("random", steps)).flatten(1)
        return float((x.T @ x / len(x) - covariance).abs().max())

    assert error(4) < 0.12 < 0.3 < error(1)
