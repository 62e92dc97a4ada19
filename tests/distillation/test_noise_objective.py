"""Learning noise: the distance of distributions, why squared distance learns it away, what keeps it, and exact resuming."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from distillation import tiny_model, train_steps
from tensors import normal

from midway.gen.distillation.learning import Lesson, learn
from midway.gen.distillation.noise import CANDIDATES, NodeBatch, NoiseConfig, NoiseObjective, check_nested
from midway.gen.metrics.batch_distance import BatchDistance, marginal_distance
from midway.gen.proving.model import MixtureModel
from midway.gen.training.batches import Context
from midway.samplers import grids
from midway.samplers.card import SolverCard
from midway.samplers.learned_noise import NoiseRange, states
from midway.samplers.mixture import Mixture
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM
from midway.samplers.solvers import SOLVERS
from midway.samplers.step_parameters import GAIN, AMEDConfig

CONFIG = NoiseConfig(teacher_steps=4, trajectories=6)


def gaussian_model(dim: int = 8, std: float = 0.5) -> MixtureModel:
    one, eye = torch.ones(1, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    return MixtureModel(Mixture.of(one, torch.zeros(1, dim, dtype=torch.float64), std**2 * eye[None]))


def test_the_distance_is_that_of_normal_distributions_and_of_no_order() -> None:
    """In one dimension W^2(N(0, 1), N(m, s^2)) = m^2 + (1 - s)^2; columns add up, and samples may come in any order."""
    mean, std = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.tensor([1.2, 0.5], dtype=torch.float64)
    wanted = (mean.square() + (1 - std).square()).mean().item()
    z, other = (normal(20_000, 2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    assert marginal_distance(z, mean + std * z).item() == pytest.approx(wanted, rel=0.03)
    assert marginal_distance(z, mean + std * other).item() == pytest.approx(wanted, rel=0.05)
    mixed = torch.stack([z[:, 0].flip(0), z[:, 1]], dim=1)
    assert marginal_distance(z, mixed) == 0
    few = [
        marginal_distance(*(normal(16, 2, seed=seed, dtype=torch.float64) for seed in pair))
        for pair in ((3, 4), (5, 5))
    ]
    assert few[0] > 0.05 and few[1] == 0, "batches from the same noise share their luck"


@pytest.mark.parametrize("shape", [(6, 2, 2), (3, 8, 8), (12,)])
def test_the_batch_distance_tells_blur_and_shift_from_nothing(shape: tuple[int, ...]) -> None:
    """0 for equal batches, more for scaled and shifted ones, a gradient to both, the same numbers for every object."""
    distance, x = BatchDistance(shape), normal(64, *shape)
    assert distance(x, x).abs() < 1e-6
    near, far = 0.9 * x, 0.5 * x
    assert 0 < distance(near, x) < distance(far, x)
    assert distance(x + 0.3, x) > 0
    assert torch.equal(BatchDistance(shape)(far, x), distance(far, x))
    far.requires_grad_()
    distance(far, x).backward()
    assert far.grad is not None and far.grad.isfinite().all()


def _learn_noise_alone(loss: Literal["distribution", "l2"]) -> tuple[NoiseObjective, float]:
    """On Gaussian data, with directions 4 % too long (c = 1.04), so that the solver without noise leaves half the variance: what
    was learned, and the variance of its end states as a part of the teacher's, exact: a table is linear on these data."""
    ranges = NoiseRange(0.3, AMEDConfig(scale_dir=0.4))
    config = NoiseConfig("dpmpp3m", 20, 256, loss=loss, node_weight=0.0, start=0.3, ranges=ranges)
    made = NoiseObjective(gaussian_model(), 10, "logsnr", 1.0, config)
    with torch.no_grad():
        made.learned.raw[:, 1] = 0.02
    made.learned.raw.requires_grad_(False)
    take = made.run_teacher(torch.zeros(256, dtype=torch.long)).take  # without the warm start, which finds better r
    learn(made, take, 256, Lesson(steps=100, batch=128, lr=0.02))
    return made, variance_ratio(made)


def variance_ratio(made: NoiseObjective) -> float:
    """Of the table's end states, coefficient by coefficient of the start and the four draws, to the teacher's."""
    unit, calls = torch.eye(5, dtype=torch.float64)[:, :, None], itertools.count(1)
    field = gaussian_model(1).exact_field
    with torch.no_grad():
        ends = sample(field, made.learned.table(), unit[0], lambda x: unit[next(calls)]).flatten()
        whole = sample(field, made.teacher, unit[0]).flatten()
    start = 80.0**2 + 1  # of a start state of unit-variance data
    return ((start * ends[0].square() + ends[1:].square().sum()) / (start * whole[0].square())).item()


def test_squared_distance_learns_the_noise_away_and_a_distance_of_distributions_keeps_what_helps() -> None:
    """Half of the variance is missing without noise. The squared distance to the teacher removes noise all the same; the distance
    of distributions learns as much as makes the variance whole, but for its bias in batches of 128."""
    (l2, left), (kept, whole) = _learn_noise_alone("l2"), _learn_noise_alone("distribution")
    without = l2.learned.roots().square().sum().item()
    assert without < 0.02 * kept.learned.roots().square().sum().item()
    assert left == pytest.approx(0.52, abs=0.05)
    assert whole == pytest.approx(0.96, abs=0.05)


def test_a_resumed_objective_is_the_uninterrupted_one() -> None:
    """The noise that is drawn belongs to the step, so that the bits repeat; evaluations are 2 N - 1 a sample."""
    labels = torch.arange(6) % 4

    def made() -> NoiseObjective:
        return NoiseObjective(tiny_model(0.1), 5, "karras", 1.0, CONFIG)

    whole, broken, resumed = made(), made(), made()
    pairs = whole.run_teacher(labels)
    assert whole.counter.evaluations == 6 * 6, "two steps in each of three"
    train_steps(whole, pairs.take, torch.optim.Adam(whole.parameters(), 0.01), 0, 5)
    assert whole.counter.evaluations == whole.evaluations.item() == 6 * 6 + 5 * 3 * 5
    broken.run_teacher(labels)
    optimizer = torch.optim.Adam(broken.parameters(), 0.01)
    train_steps(broken, pairs.take, optimizer, 0, 2)
    resumed.load_state_dict(broken.state_dict())
    again = torch.optim.Adam(resumed.parameters(), 0.01)
    again.load_state_dict(optimizer.state_dict())
    train_steps(resumed, pairs.take, again, 2, 5)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert whole.learned.noise.detach().abs().min() >= 0
    first, other = (whole.loss(pairs, Context(0, step, torch.arange(6)))[0] for step in (7, 8))
    assert first != other, "fresh noise at every step"


def test_the_teacher_leaves_its_states_at_the_students_nodes() -> None:
    made = NoiseObjective(tiny_model(0.1), 4, "logsnr", 1.0, replace(CONFIG, teacher="heun"))
    pairs = made.run_teacher(torch.arange(6) % 4)
    assert isinstance(pairs, NodeBatch) and pairs.states.shape == (3, 6, 2, 2, 2)
    assert made.teacher.grid[:: made.stride] == pytest.approx(made.grid, abs=1e-9)
    card = SolverCard("adasde", "logsnr", "linear", "tiny", 4, guidance=1.0, training_nfe=7, **made.facts())
    table = made.sampler(made.state_dict(), card)
    assert (table.nfe, table.solver, table.card, table.stochastic) == (4, "adasde", card, True)
    assert (card.mode, card.analytic_first, card.teacher) == ("distribution", False, "heun, 4 steps")


def test_teachers_and_budgets_that_it_cannot_have() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="draws noise"):
        NoiseObjective(model, 5, "karras", 1.0, replace(CONFIG, teacher="ddpm"))
    with pytest.raises(ValueError, match="unknown teacher 'hein'"):
        replace(CONFIG, teacher="hein")
    with pytest.raises(ValueError, match="start must be in"):
        replace(CONFIG, start=1.0)
    with pytest.raises(ValueError, match="4 or 6"):
        NoiseObjective(model, 5, "karras", 1.0, replace(CONFIG, analytic_first=False))
    fine = SOLVERS["ddim"].build(EDM(), grids.karras(EDM(), 8))
    check_nested(fine, grids.karras(EDM(), 4), 2)
    with pytest.raises(ValueError, match="every 2-th time"):
        check_nested(fine, grids.logsnr(EDM(), 4), 2)


def test_the_warm_start_finds_the_best_r_of_every_step() -> None:
    """Step by step from its own state, without noise: no candidate ends nearer to the teacher's next node."""
    made = NoiseObjective(gaussian_model(), 6, "karras", 1.0, replace(CONFIG, teacher_steps=12, analytic_first=False))
    batch = made.run_teacher(torch.zeros(8, dtype=torch.long))
    before, spent = made.learned.roots(), made.counter.evaluations
    made.warm_start(batch)
    assert made.counter.evaluations - spent == 8 * 14 * 2 * 3
    assert torch.equal(made.learned.roots(), before), "g is where it began"
    learned = copy.deepcopy(made.learned)
    with torch.no_grad():
        learned.noise.zero_()
        chosen = learned.constants().r.tolist()
        for i in range(3):
            reached = states(made.field(batch.labels), learned, batch.states[0], torch.zeros_like, 0, i)[-1]
            errors = {}
            for r in CANDIDATES.tolist():
                learned.raw[i, 0] = math.log(r / (1 - r)) / GAIN
                end = states(made.field(batch.labels), learned, reached, torch.zeros_like, i, i + 1)[-1]
                errors[r] = (end - batch.states[i + 1]).square().mean().item()
            best = min(errors, key=lambda r: errors[r])
            assert chosen[i] == pytest.approx(best, abs=1e-5)
            learned.raw[i, 0] = math.log(best / (1 - best)) / GAIN
    assert len(set(chosen)) > 1
