"""The game of discriminator and decoder: its formulas, its gradients, and that no division of a batch changes it."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from multiprocess import together
from tensors import grad, normal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from midway.tokenizers.adversarial import (
    AdaptiveWeight,
    Kind,
    LeCamAverages,
    discriminator_loss,
    frozen,
    generator_loss,
    gradient_penalty,
    lecam,
    r1_penalty,
)
from midway.tokenizers.discriminator import PatchDiscriminator, PlainConv2d, SpectralConv2d

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: tuple[Kind, ...] = ("hinge", "non_saturating", "wasserstein")


def discriminator(layers: int = 1, spectral_norm: bool = False, seed: int = 0) -> PatchDiscriminator:
    """A small one of one channel whose biases are not 0."""
    torch.manual_seed(seed)
    made = PatchDiscriminator(1, 8, layers, spectral_norm)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return made


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


# ---- losses ----


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


ON_REAL: dict[Kind, Callable[[float], float]] = {
    "hinge": lambda x: max(0, 1 - x) / 2,
    "non_saturating": lambda x: softplus(-x),
    "wasserstein": lambda x: -x,
}
ON_FAKE: dict[Kind, Callable[[float], float]] = {
    "hinge": lambda x: max(0, 1 + x) / 2,
    "non_saturating": softplus,
    "wasserstein": lambda x: x,
}
OF_GENERATOR: dict[Kind, Callable[[float], float]] = {
    "hinge": lambda x: -x,
    "non_saturating": lambda x: softplus(-x),
    "wasserstein": lambda x: -x,
}


def mean(function: Callable[[float], float], logits: Tensor) -> float:
    return math.fsum(map(function, logits.flatten().tolist())) / logits.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_formulas_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    real, fake = (2 * normal(3, 1, 4, 4) + 1).to(dtype), (2 * normal(5, 1, 4, 4, seed=1)).to(dtype)
    critic, generator = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
    assert critic.item() == pytest.approx(mean(ON_REAL[kind], real) + mean(ON_FAKE[kind], fake), rel=1e-5)
    assert generator.item() == pytest.approx(mean(OF_GENERATOR[kind], fake), rel=1e-5)
    assert critic.dtype == generator.dtype == torch.float32


def test_the_non_saturating_gradient_is_large_where_the_generator_loses() -> None:
    """Target and logits the wrong way round, as in LlamaGen, leave a constant without a gradient."""
    fake = torch.linspace(-20, 20, 9).requires_grad_()
    loss = generator_loss(fake, "non_saturating")
    loss.backward()
    torch.testing.assert_close(grad(fake), -torch.sigmoid(-fake.detach()) / 9)
    assert generator_loss(fake.detach() + 1, "non_saturating") < loss


def test_another_game_raises() -> None:
    for loss in (lambda kind: discriminator_loss(normal(2), normal(2), kind), lambda k: generator_loss(normal(2), k)):
        with pytest.raises(ValueError, match="choose one of: hinge, non_saturating, wasserstein"):
            loss("logistic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_one_backward_gives_each_side_its_own_gradient(kind: Kind, spectral_norm: bool) -> None:
    critic, generator = discriminator(spectral_norm=spectral_norm), nn.Conv2d(1, 1, 3, padding=1)
    real, fake = normal(4, 1, 8, 8), generator(normal(4, 1, 8, 8, seed=1))
    alone = torch.autograd.grad(generator_loss(critic(fake), kind), list(generator.parameters()), retain_graph=True)
    loss = discriminator_loss(critic(real), critic(fake.detach()), kind)
    critic_alone = torch.autograd.grad(loss, list(critic.parameters()))
    gain = generator_loss(frozen(critic)(fake), kind)
    (gain + discriminator_loss(critic(real), critic(fake.detach()), kind)).backward()
    for found, expected in ((gradients(critic), critic_alone), (gradients(generator), alone)):
        assert sum(g.abs().sum() for g in expected) > 1e-3
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-7)


# ---- penalties ----


class Quadratic(nn.Module):
    """logit = w x^2 / 2 + c x, a patch for each pixel."""

    def __init__(self, w: float, c: float) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.square() / 2 + self.c * x


def test_r1_is_half_the_squared_gradient_of_the_mean_logit() -> None:
    critic, real = Quadratic(3.0, 0.5), normal(5, 1, 4, 6)
    rows = real.flatten(1)
    penalty = r1_penalty(critic, real)
    expected = ((3 * rows + 0.5) / 24).square().sum(1).mean() / 2
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    torch.testing.assert_close(critic.w.grad, ((3 * rows + 0.5) * rows).sum(1).mean() / 24**2)


def test_the_gradient_penalty_is_taken_on_the_line_from_fake_to_real() -> None:
    critic, real, fake = Quadratic(40.0, 0.5), normal(5, 1, 4, 6), normal(5, 1, 4, 6, seed=1)
    mix = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99])
    points = torch.stack([m * r + (1 - m) * f for m, r, f in zip(mix, real, fake, strict=True)]).flatten(1)
    norms = ((40 * points + 0.5) / 24).norm(dim=1)
    assert norms.min() > 1
    torch.testing.assert_close(gradient_penalty(critic, real, fake, mix), (norms - 1).square().mean())


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_penalties_train_the_whole_discriminator_whatever_the_autocast(spectral_norm: bool) -> None:
    """Against one image at a time in float64."""
    critic, real, fake = discriminator(spectral_norm=spectral_norm), normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1)
    mix = torch.tensor([0.3, 0.5, 0.8])
    points = fake + mix.view(3, 1, 1, 1) * (real - fake)
    reference = copy.deepcopy(critic).double()

    def norm(image: Tensor) -> Tensor:
        x = image[None].double().requires_grad_()
        return torch.autograd.grad(reference(x).mean(), x, create_graph=True)[0].norm()

    pairs = (
        (lambda: r1_penalty(critic, real), sum(norm(x).square() for x in real) / 6),
        (lambda: gradient_penalty(critic, real, fake, mix), sum((norm(x) - 1).square() for x in points) / 3),
    )
    for penalty, expected in pairs:
        found = penalty()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(penalty(), found)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=1e-5, atol=0)
        assert isinstance(expected, Tensor)
        for mine, its in zip(grads_of(found, critic), grads_of(expected, reference), strict=True):
            torch.testing.assert_close(mine.double(), its, rtol=1e-4, atol=1e-7)


def grads_of(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """The gradient of each parameter with more than one dimension: a last bias has none."""
    found = torch.autograd.grad(loss, [p for p in module.parameters() if p.ndim > 1])
    assert all(g.abs().max() > 1e-6 for g in found)
    return list(found)


def test_a_discriminator_without_a_gradient_is_no_trouble() -> None:
    critic, real = Quadratic(0.0, 0.0), normal(3, 1, 4, 4)
    penalty = gradient_penalty(critic, real, -real, torch.full((3,), 0.5))
    (penalty + r1_penalty(critic, real)).backward()
    assert penalty.item() == 1
    assert all(g.isfinite() for g in gradients(critic))
    with pytest.raises(ValueError, match=r"mix \(2,\)"):
        gradient_penalty(critic, real, real, torch.ones(2))
    with pytest.raises(ValueError, match=r"fake \(2, 1, 4, 4\)"):
        gradient_penalty(critic, real, real[:2], torch.ones(3))


def test_lecam_holds_each_side_to_the_average_of_the_other() -> None:
    real, fake, a, b = normal(4, 1, 3, 3), normal(2, 1, 3, 3, seed=1), torch.tensor(0.7), torch.tensor(-0.4)
    expected = mean(lambda x: max(0, x + b.item()) ** 2, real - 2 * b)
    expected += mean(lambda x: max(0, a.item() - x) ** 2, fake)
    assert lecam(real, fake, a, b).item() == pytest.approx(expected, rel=1e-5)
    assert lecam(b.view(1), a.view(1), a, b).item() == 0
    assert lecam(real.bfloat16(), fake.bfloat16(), a, b).dtype == torch.float32


# ---- the averages of LeCam ----


def steps_of(shares: Sequence[Sequence[int]], rank: int = 0, steps: int = 4) -> list[list[tuple[Tensor, Tensor]]]:
    """Per step, the micro-batches of one of `shares` (processes' micro-batches), of logits and numbers that follow them."""
    total = sum(map(sum, shares))
    ends = [0, *accumulate(size for share in shares for size in share)]
    mine = list(pairwise(ends))[sum(map(len, shares[:rank])) :][: len(shares[rank])]
    batches = [(normal(total, 6, seed=s) + s, normal(total, 6, seed=-s - 1) - s) for s in range(steps)]
    return [[(real[a:b], fake[a:b]) for a, b in mine] for real, fake in batches]


def averages_of(shares: Sequence[Sequence[int]], rank: int = 0) -> LeCamAverages:
    """What is remembered after steps of which one is skipped and another is not finite."""
    averages = LeCamAverages(decay=0.5)
    for step, micros in enumerate(steps_of(shares, rank, steps=5)):
        for real, fake in micros:
            averages.gather(torch.where(torch.tensor(step == 3), torch.inf, real), fake)
        averages.update(torch.tensor(step != 1))
    return averages


def test_averages_weigh_the_steps_that_count_by_powers_of_the_decay() -> None:
    averages, steps = averages_of([[12]]), steps_of([[12]], steps=5)
    weights = torch.tensor([0.5**2, 0.5, 1], dtype=torch.float64)
    for side, found in enumerate((averages.real, averages.fake)):
        means = torch.stack([steps[s][0][side].double().mean() for s in (0, 2, 4)])
        torch.testing.assert_close(found.double(), (weights * means).sum() / weights.sum(), rtol=1e-6, atol=0)
    assert averages.updates == 3


def test_averages_keep_their_bits_where_nothing_is_to_be_learned() -> None:
    averages = averages_of([[12]])
    before = {name: value.clone() for name, value in averages.state_dict().items()}
    assert set(before) == {"real", "fake", "updates"}
    averages.update()
    averages.eval().gather(normal(3), normal(3))
    averages.update()
    averages.train().gather(normal(3), normal(3))
    averages.update(torch.tensor(False))
    averages.gather(normal(3), normal(0))
    averages.update()
    assert all(torch.equal(value, before[name]) for name, value in averages.state_dict().items())
    with pytest.raises(ValueError, match="decay is 1"):
        LeCamAverages(decay=1)


# ---- the adaptive weight ----


def game(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a micro-batch x (n, 3) whose gradients to weight (2, 3) are not parallel."""
    made = x @ weight.T
    return (made - 1).square().mean(), 0.1 * (1 + made.square()).sqrt().mean()


def adaptive_of(shares: Sequence[Sequence[int]], rank: int = 0) -> list[Tensor]:
    """The value after each step; the third is skipped."""
    adaptive, weight = AdaptiveWeight(), normal(2, 3, seed=5).requires_grad_()
    values = []
    for step, micros in enumerate(steps_of(shares, rank)):
        before = adaptive.value.clone()
        for real, _ in micros:
            adaptive.measure(*game(weight, real[:, :3]), weight, weight=len(real))
            assert torch.equal(adaptive.value, before)
        adaptive.update(torch.tensor(step != 2))
        values.append(adaptive.value.clone())
    assert weight.grad is None
    return values


def test_the_weight_is_the_ratio_of_both_gradients_of_the_step_before() -> None:
    weight, values = normal(2, 3, seed=5).requires_grad_(), adaptive_of([[12]])
    assert AdaptiveWeight().value == 0
    for step in (0, 1, 3):
        norms = [
            torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()
            for loss in game(weight, steps_of([[12]])[step][0][0][:, :3])
        ]
        torch.testing.assert_close(values[step], norms[0] / (norms[1] + 1e-6), rtol=1e-6, atol=0)
    assert torch.equal(values[2], values[1])


def test_tiny_gradients_are_weighed_alike_by_any_number_of_micro_batches() -> None:
    """1e-6 is added to the norm of the mean, not of a sum that grows with the number of its parts."""
    weight = normal(2, 3).requires_grad_()
    for parts in (1, 8):
        adaptive = AdaptiveWeight()
        for _ in range(parts):
            adaptive.measure(1e-3 * weight.sum(), 1e-7 * weight.sum(), weight)
        adaptive.update()
        assert adaptive.value.item() == pytest.approx(6**0.5 * 1e-3 / (6**0.5 * 1e-7 + 1e-6), rel=1e-5)


def test_the_weight_is_finite_without_an_adversary_and_forgets_what_is_not() -> None:
    adaptive, weight = AdaptiveWeight(), normal(2, 3).requires_grad_()
    adaptive.measure(weight.sum(), 0 * weight.sum(), weight)
    adaptive.update()
    assert adaptive.value == 1e4
    adaptive.measure(2 * weight.sum(), weight.sum(), weight)
    adaptive.update()
    before = adaptive.value.clone()
    assert before.item() == pytest.approx(2, rel=1e-5)
    for broken in ((torch.nan, 1), (1, torch.nan), (torch.inf, 1), (1, torch.inf)):
        adaptive.measure(broken[0] * weight.sum(), broken[1] * weight.sum(), weight)
        adaptive.update()
    adaptive.update()
    assert torch.equal(adaptive.value, before)
    assert set(adaptive.state_dict()) == {"value"}


# ---- micro-batches and processes ----


@pytest.mark.parametrize("shares", [[[7, 5]], [[1, 2, 9]]])
def test_micro_batches_give_the_averages_and_the_weight_of_the_whole_batch(shares: list[list[int]]) -> None:
    torch.testing.assert_close(averages_of(shares).state_dict(), averages_of([[12]]).state_dict(), rtol=1e-6, atol=0)
    torch.testing.assert_close(adaptive_of(shares), adaptive_of([[12]]), rtol=1e-5, atol=0)


SHARES = {2: [[5, 3], [4]], 3: [[2], [1, 1], [8]]}
IDLE = {2: [[5, 7], []], 3: [[], [11], [1]]}


def run_rank(rank: int, processes: int, folder: Path) -> None:
    averages = LeCamAverages()  # made before the process group
    dist.init_process_group("gloo")
    averages.gather(torch.tensor([float(rank)]), torch.tensor([1.0]))
    averages.update()
    shared = [averages_of(shares[processes], rank).state_dict() for shares in (SHARES, IDLE)]
    torch.save([averages.real, *shared, adaptive_of(SHARES[processes], rank)], folder / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_unequal_batches_agree_with_one(processes: int, tmp_path: Path) -> None:
    together(run_rank, processes, processes, tmp_path)
    for rank in range(processes):
        late, *averages, weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert late.item() == pytest.approx((processes - 1) / 2, rel=1e-6)
        for state in averages:
            torch.testing.assert_close(state, averages_of([[12]]).state_dict(), rtol=1e-6, atol=0)
        torch.testing.assert_close(weights, adaptive_of([[12]]), rtol=1e-5, atol=0)


# ---- the discriminator ----


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_patches_are_as_many_and_as_large_as_said(layers: int) -> None:
    critic = PatchDiscriminator(1, 1, layers, spectral_norm=True)
    least = 3 * 2**layers
    assert critic.least_size == least
    assert critic(torch.zeros(2, 1, least, least + 2**layers)).shape == (2, 1, 1, 2)
    critic.check_size(least)
    for shape in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=f"at least {least} a side, or fewer layers"):
            critic(torch.zeros(1, 1, *shape))
    field = 9 * 2**layers - 2
    side = 4 * least
    for part in critic.parts:
        if isinstance(part, PlainConv2d):
            nn.init.ones_(part.weight)
    x = torch.ones(1, 1, side, side, requires_grad=True)
    logits = critic(x)
    assert logits.shape[-1] == side // 2**layers - 2
    middle = logits.shape[-1] // 2
    (seen,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    assert ((seen[0, 0] != 0).sum(0).max(), (seen[0, 0] != 0).sum(1).max()) == (field, field)


def test_channels_double_up_to_eight_times_the_width_and_weights_start_small() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(3, 16, 5)
    found = [part for part in critic.parts if isinstance(part, PlainConv2d)]
    assert [c.out_channels for c in found] == [16, 32, 64, 128, 128, 128, 1]
    assert [c.stride[0] for c in found] == [2, 2, 2, 2, 2, 1, 1]
    for part in found[1:-1]:
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert part.bias is not None
        assert not part.bias.any()
    assert [p.negative_slope for p in critic.parts if isinstance(p, nn.LeakyReLU)] == [0.2] * 6
    assert sum(isinstance(p, nn.GroupNorm) for p in critic.parts) == 5
    assert not any(isinstance(p, nn.GroupNorm) for p in PatchDiscriminator(3, 8, 2, True).parts)
    with pytest.raises(ValueError, match="layers 0"):
        PatchDiscriminator(3, 8, 0)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_logits_of_an_image_depend_on_it_alone(spectral_norm: bool) -> None:
    critic, x = discriminator(2, spectral_norm), normal(6, 1, 16, 16)
    expected = critic(x)
    torch.testing.assert_close(torch.cat([critic(x[:1]), critic(x[1:])]), expected, rtol=0, atol=1e-6)
    assert torch.equal(critic.eval()(x), expected)
    assert expected.std() > 0


# ---- spectral normalisation ----


def normalized(critic: PatchDiscriminator) -> list[SpectralConv2d]:
    return [part for part in critic.parts if isinstance(part, SpectralConv2d)]


def test_after_some_updates_every_weight_has_norm_one() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(3, 12, 2, spectral_norm=True)
    assert len(normalized(critic)) == 4
    for part in normalized(critic):  # the start is near already
        assert torch.linalg.svdvals(part.normalized().detach().flatten(1))[0].item() == pytest.approx(1, abs=0.05)
        nn.init.normal_(part.weight)  # as if trained: u and v belong to another matrix
    for _ in range(150):
        critic.update(torch.tensor(True))
    for part in normalized(critic):
        first = torch.linalg.svdvals(part.normalized().detach().flatten(1))[0]
        assert first.item() == pytest.approx(1, abs=1e-3)
        assert part.u.norm().item() == pytest.approx(1)
        torch.testing.assert_close(
            part.normalized() * first,
            part.weight / torch.linalg.matrix_norm(part.weight.flatten(1), 2),
            atol=1e-3,
            rtol=0,
        )


def test_forward_never_moves_the_power_iteration() -> None:
    """torch's own does, in every training forward."""
    critic, x = discriminator(spectral_norm=True).train(), normal(3, 1, 8, 8)
    nn.init.normal_(normalized(critic)[1].weight)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    assert torch.equal(critic(x), critic(x))
    recomputed = checkpoint(critic, x.requires_grad_(), use_reentrant=False)
    assert isinstance(recomputed, Tensor)
    recomputed.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    theirs = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 8, 4)).train()
    assert not torch.equal(theirs(x), theirs(x))


def test_a_skipped_step_leaves_u_and_v_as_they_are() -> None:
    critic = discriminator(spectral_norm=True)
    part = normalized(critic)[1]
    nn.init.normal_(part.weight)
    u, v = part.u.clone(), part.v.clone()
    critic.update(torch.tensor(False))
    assert torch.equal(part.u, u)
    assert torch.equal(part.v, v)
    critic.update()
    matrix = part.weight.detach().flatten(1)
    torch.testing.assert_close(part.v, F.normalize(matrix.T @ u, dim=0))
    torch.testing.assert_close(part.u, F.normalize(matrix @ part.v, dim=0))
    assert {name for name in critic.state_dict() if name[-1] in "uv"} == {
        f"parts.{i}.{n}" for i in (0, 2, 4) for n in "uv"
    }
    discriminator().update(torch.tensor(True))


def test_the_gradient_goes_through_sigma_with_u_and_v_constant() -> None:
    part = normalized(discriminator(spectral_norm=True))[1]
    outer = normal(*part.weight.shape, seed=3)
    (found,) = torch.autograd.grad((part.normalized() * outer).sum(), part.weight)
    weight, u, v = part.weight.detach().double(), part.u.double(), part.v.double()
    sigma = torch.einsum("o,oi,i", u, weight.flatten(1), v)
    expected = (outer - (outer * weight).sum() / sigma * torch.outer(u, v).view_as(weight)) / sigma
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
