"""Learned tables: where they start, their gradients, their export, what they learn, and the state of their objective."""

import math
from dataclasses import replace

import pytest
import torch
from distillation import tiny_model, train_steps
from oracles import mixture, noise_at
from tensors import grad, normal
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.diffusion.sampling import noise_of
from midway.gen.distillation import table as distill_table
from midway.gen.distillation.learning import Lesson
from midway.gen.distillation.table import BEST, EndPairs, TableConfig, TableObjective, TableTarget, decoded, l1, l2
from midway.gen.training.batches import Context
from midway.gen.training.ema import EMA
from midway.samplers import grids
from midway.samplers.learned import LearnedTable, angle_of, checkpointed, rollout, time_of_angle
from midway.samplers.prediction import Field, Prediction
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule, Shifted
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table
from midway.tokenizers.tokenizer import ImageTokenizer

SCHEDULES = [Linear(), Cosine(), VP(), EDM(), Shifted(Linear(), 3.0)]
names = [type(s).__name__ for s in SCHEDULES]


class Bisected(Cosine):
    """A schedule that finds its times by bisection and its rates by differentiation, as any new one does."""

    rates = Schedule.rates
    time_of_logsnr = Schedule.time_of_logsnr


def _scrambled(learned: LearnedTable, size: float = 0.2, seed: int = 0) -> LearnedTable:
    """Every parameter drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=size, generator=generator)
    return learned


def _same_rows(got: Table, want: Table) -> None:
    for a, b in zip(got.rows, want.rows, strict=True):
        assert (a.time is None) == (b.time is None)
        assert [a.time or 0, a.arrival] == pytest.approx([b.time or 0, b.arrival], rel=1e-12)
        assert a.states == pytest.approx(b.states, rel=0, abs=1e-12)
        assert a.predictions == pytest.approx(b.predictions, rel=0, abs=1e-12)


# ---- where learning starts ----


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_nothing_learned_is_dpm_solver_plus_plus(schedule: Schedule, analytic_first: bool) -> None:
    """Orders 1 to 3 on every grid, 1 to 6 evaluations, against the solvers' own builders."""
    for order, name in ((1, "dpmpp1m"), (2, "dpmpp2m"), (3, "dpmpp3m")):
        for make in grids.GRIDS.values():
            if make is grids.shift and isinstance(schedule, Shifted):
                continue
            for nfe in (1, 3, 6):
                grid = make(schedule, nfe + analytic_first)
                learned = LearnedTable(schedule, grid, order, analytic_first)
                _same_rows(learned.table(), SOLVERS[name].build(schedule, grid, analytic_first))
                assert learned.nfe == learned.table().nfe == nfe


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_learned_steps_alone_are_dpm_solver_plus_plus_on_the_learned_grid(schedule: Schedule) -> None:
    learned = LearnedTable(schedule, grids.karras(schedule, 6), analytic_first=True)
    with torch.no_grad():
        learned.gap.copy_(torch.tensor([0.3, -0.5, 0.2, 0.7, -0.1, 0.4]))
    table = learned.table()
    assert (torch.tensor(table.grid)[1:-1] / learned.grid[1:-1] - 1).abs().min() > 1e-4
    _same_rows(table, SOLVERS["dpmpp3m"].build(schedule, table.grid, analytic_first=True))


@pytest.mark.parametrize("start", [1.0, 1 - 1e-9, 0.9999])
@pytest.mark.parametrize("analytic_first", [False, True])
def test_a_flow_may_start_at_pure_noise(start: float, analytic_first: bool) -> None:
    grid = grids.explicit((start, 0.9, 0.6, 0.3, 0.01))
    learned = LearnedTable(Linear(), grid, analytic_first=analytic_first)
    _same_rows(learned.table(), SOLVERS["dpmpp3m"].build(Linear(), grid, analytic_first))
    x = noise_at(Linear(), start)
    rollout(mixture().field(Linear()), _scrambled(learned), x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.parameters())
    assert learned.times()[0] == start


@pytest.mark.parametrize("schedule", [*SCHEDULES, Bisected()], ids=[*names, "Bisected"])
def test_times_and_angles_are_inverse_and_so_are_their_derivatives(schedule: Schedule) -> None:
    t = torch.linspace(0.02, 0.98, 23, dtype=torch.float64)
    angle = angle_of(schedule, t).requires_grad_()
    back = time_of_angle(schedule, angle)
    torch.testing.assert_close(back, t, rtol=1e-10, atol=0)
    (slope,) = torch.autograd.grad(back.sum(), angle)
    step = 1e-6
    rise = (angle_of(schedule, t + step) - angle_of(schedule, t - step)) / (2 * step)
    torch.testing.assert_close(slope * rise, torch.ones_like(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
def test_the_grid_falls_between_its_ends_whatever_the_parameters(schedule: Schedule, size: float) -> None:
    for seed in range(5):
        grid = grids.logsnr(schedule, 20)
        learned = _scrambled(LearnedTable(schedule, grid), size, seed)
        times = learned.times()
        assert (times.diff() < 0).all()
        assert (times[0].item(), times[-1].item()) == (grid[0], grid[-1])
        evaluations = learned.evaluation_times(times[:-1])
        assert evaluations.isfinite().all()
        assert (evaluations <= grid[0]).all()
        assert (evaluations >= grid[-1]).all()


def test_an_evaluation_time_that_left_the_grid_can_come_back() -> None:
    """An evaluation time beyond the start is clamped to it, and its gradient is not lost."""
    learned = LearnedTable(Cosine(), grids.karras(Cosine(), 3))
    with torch.no_grad():
        learned.shift[0] = 0.5
    evaluations = learned.evaluation_times(learned.times()[:-1])
    assert evaluations[0].item() == pytest.approx(learned.grid[0].item(), rel=1e-15)
    assert torch.autograd.grad(evaluations[0], learned.shift)[0][0] > 0


def test_the_four_parameters_act_as_in_the_docstring() -> None:
    """One at a time, in closed form, on a schedule where alpha = 1."""
    schedule, grid = EDM(), grids.karras(EDM(), 4)
    base = LearnedTable(schedule, grid).coefficients()
    sigma = schedule.sigma(torch.tensor(grid, dtype=torch.float64))

    def changed(name: str, at: tuple[int, ...], value: float) -> LearnedTable:
        learned = LearnedTable(schedule, grid)
        with torch.no_grad():
            getattr(learned, name)[at] = value
        return learned

    a = changed("states", (2, 1), 0.3).coefficients().states - base.states
    assert a[2, 1].item() == pytest.approx(0.3 * sigma[3].item() / math.hypot(1, sigma[1].item()), rel=1e-6)
    c = changed("predictions", (2, 1), 0.3).coefficients().predictions - base.predictions
    assert c[2, 1].item() == pytest.approx(0.3, rel=1e-6)
    assert int(a.count_nonzero()) == int(c.count_nonzero()) == 1
    later = changed(
        "predictions", (1, 2), 0.3
    ).coefficients()  # a row cannot weigh an estimate that it does not have yet
    assert torch.equal(later.predictions, base.predictions)
    shift = changed("shift", (2,), 0.1)
    evaluations = shift.coefficients().evaluations
    bounded = 4 * math.tanh(0.1 / 4)
    assert (schedule.rho(evaluations[2]) / sigma[2]).item() == pytest.approx(math.exp(bounded), rel=1e-6)
    assert torch.equal(shift.times(), base.times)
    angle = angle_of(schedule, changed("gap", (1,), 0.1).times())
    start = angle_of(schedule, base.times)
    ratio = (angle.diff() / start.diff())[[0, 1, 2, 3]]
    assert (ratio[1] / ratio[0]).item() == pytest.approx(math.exp(bounded), rel=1e-6)
    torch.testing.assert_close(ratio[[2, 3]], ratio[[0, 0]])


def test_the_same_numbers_are_the_same_solver_on_every_schedule() -> None:
    """The same noise levels, corrections and lengths of steps give the same y = x / alpha."""
    y = 80 * normal(6, 2, dtype=torch.float64)
    ends = []
    for schedule in SCHEDULES:
        learned = _scrambled(LearnedTable(schedule, grids.karras(schedule, 5)))
        torch.nn.init.zeros_(learned.shift)
        alpha = schedule.alpha(learned.grid)
        ends.append(sample(mixture().field(schedule), learned.table(), alpha[0] * y) / alpha[-1])
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-8)


def test_a_restart_forgets_what_was_learned() -> None:
    learned = _scrambled(LearnedTable(VP(), grids.karras(VP(), 4)))
    learned.restart(grids.uniform(VP(), 4))
    assert learned.table() == LearnedTable(VP(), grids.uniform(VP(), 4)).table()


# ---- gradients and export ----


def _single(field: Field) -> Field:
    """`field` answering in float32, as networks do."""

    def rounded(x: Tensor, t: Tensor) -> Prediction:
        prediction = field(x.double(), t.double())
        return Prediction(prediction.x0.float(), prediction.eps.float())

    return rounded


class _Rolled(nn.Module):
    """A rollout as a module, for functional_call."""

    def __init__(self, field: Field, learned: LearnedTable) -> None:
        super().__init__()
        self.solve, self.learned = field, learned

    def forward(self, x: Tensor) -> Tensor:
        return rollout(self.solve, self.learned, x)


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", [VP(), Linear(), Bisected()], ids=["VP", "Linear", "Bisected"])
def test_gradients_are_those_of_finite_differences(schedule: Schedule, analytic_first: bool) -> None:
    """Of steps' lengths, evaluation times, weights on states and on predictions."""
    learned = LearnedTable(schedule, grids.karras(schedule, 4, rho_max=10.0), analytic_first=analytic_first)
    _scrambled(learned.double())
    with torch.no_grad():
        learned.shift.copy_(-learned.shift.abs() - 0.05)  # within the grid, where clamping does not hide a difference
    rolled = _Rolled(mixture().field(schedule), learned)
    x = noise_at(schedule, learned.grid[0].item(), 3)
    keys = list(dict(learned.named_parameters()))

    def ends(*values: Tensor) -> Tensor:
        return torch.func.functional_call(rolled, {f"learned.{k}": v for k, v in zip(keys, values, strict=True)}, (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in learned.parameters())
    assert torch.autograd.gradcheck(ends, values, eps=1e-6, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(ends(*values).square().sum(), values)
    used = torch.ones(4, 4).tril()
    for key, gradient in zip(keys, gradients, strict=True):
        expected = torch.ones(4) if gradient.dim() == 1 else used
        if key == "shift" and analytic_first:
            expected = torch.tensor([0.0, 1, 1, 1])
        assert torch.equal((gradient != 0).float(), expected), f"every number of {key} that counts has a gradient"


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_exported_table_is_the_rollout(schedule: Schedule, analytic_first: bool) -> None:
    learned = LearnedTable(schedule, grids.karras(schedule, 5 + analytic_first), analytic_first=analytic_first)
    _scrambled(learned)
    table = learned.table({"nfe": "5"})
    assert (table.solver, table.nfe, dict(table.metadata)) == ("table", 5, {"nfe": "5"})
    field = mixture().field(schedule)
    counter = EvaluationCounter(field)
    x = noise_at(schedule, table.grid[0])
    exact = rollout(counter, learned, x)
    assert counter.evaluations == 5 * len(x)
    torch.testing.assert_close(sample(field, table, x), exact, rtol=0, atol=1e-12)
    single = rollout(_single(field), learned, x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(sample(_single(field), table, x.float()), single, rtol=1e-6, atol=4e-6)


def test_learned_tables_survive_the_disk(tmp_path) -> None:
    learned = _scrambled(LearnedTable(Linear(), grids.uniform(Linear(), 4), analytic_first=True))
    table = learned.table({"model_hash": "0123", "teacher": "heun"})
    table.save(tmp_path / "table.safetensors")
    assert Table.load(tmp_path / "table.safetensors") == table
    other = LearnedTable(Linear(), grids.logsnr(Linear(), 4), analytic_first=True)
    other.load_state_dict(learned.state_dict())
    assert other.table().rows == table.rows, "the state holds the grid that learning started from"


def test_running_again_in_the_backward_pass_changes_neither_gradients_nor_counts() -> None:
    calls = []

    def network(x: Tensor, t: Tensor) -> Prediction:
        calls.append(len(x))
        return mixture().field(VP())(x, t)

    gradients = []
    for wrapped in (network, checkpointed(network)):
        learned = _scrambled(LearnedTable(VP(), grids.karras(VP(), 3)))
        counter = EvaluationCounter(wrapped)
        rollout(counter, learned, noise_at(VP(), learned.grid[0].item())).square().sum().backward()
        gradients.append([p.grad for p in learned.parameters()])
        assert counter.evaluations == 3 * 8
    assert len(calls) == 3 + 6
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_learned_raises_an_error() -> None:
    schedule = Linear()
    for grid in ((0.1, 0.5, 0.9), (1.5, 0.5, 0.1), (0.9,), (0.9, 0.5, 0.5, 0.1), (0.9, math.nan, 0.1)):
        with pytest.raises(ValueError, match="falling grid within"):
            LearnedTable(schedule, grid)
    with pytest.raises(ValueError, match="at least 2 steps"):
        LearnedTable(schedule, (0.9, 0.1), analytic_first=True)
    with pytest.raises(ValueError, match="order"):
        LearnedTable(schedule, (0.9, 0.1), order=4)
    learned = LearnedTable(schedule, (0.9, 0.5, 0.1))
    with torch.no_grad():
        learned.predictions[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        learned.table()


# ---- the objective ----


CONFIG = TableConfig(teacher="dpmpp2m", teacher_steps=8, pairs=6, analytic_first=False)


def _objective(target: TableTarget | None = None, config: TableConfig = CONFIG) -> tuple[TableObjective, EndPairs]:
    """An objective after its teacher run and warm start, and all its pairs."""
    objective = TableObjective(tiny_model(0.1), target or TableTarget(3, "karras"), config)
    pairs = objective.run_teacher(torch.arange(6) % 4)
    objective.warm_start(pairs)
    return objective, pairs


def _steps(objective: TableObjective, pairs: EndPairs, first: int, last: int) -> None:
    train_steps(objective, pairs.take, torch.optim.SGD(objective.parameters(), 1e-2), first, last)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teachers_ends_are_those_of_its_table_from_noise_of_this_purpose_alone(guidance: float) -> None:
    model = tiny_model(0.1)
    objective, pairs = _objective(TableTarget(3, "karras", guidance))
    grid = grids.logsnr(model.schedule, 8)
    table = SOLVERS["dpmpp2m"].build(model.schedule, grid)
    time = torch.tensor(grid[0], dtype=torch.float64)
    scale = torch.hypot(model.schedule.alpha(time), model.schedule.sigma(time)).item()
    assert torch.equal(pairs.starts, scale * randomness.normal(0, "distill", 0, torch.arange(6), (2, 2, 2)))
    assert not torch.isclose(pairs.starts, scale * noise_of(torch.arange(6), (2, 2, 2))).any()
    ends = sample(model.field(pairs.labels, guidance), table, pairs.starts)
    torch.testing.assert_close(pairs.ends, ends, rtol=1e-4, atol=1e-4)
    assert objective.counter.evaluations == 6 * 8 * (2 if guidance != 1 else 1)
    later = TableObjective(model, objective.target, replace(CONFIG, seed=2)).run_teacher(torch.arange(2, 6) % 4)
    assert torch.equal(later.starts, pairs.starts[2:])
    torch.testing.assert_close(later.ends, pairs.ends[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("analytic_first", [False, True])
def test_the_loss_is_the_distance_of_the_exported_table_to_the_teacher(analytic_first: bool) -> None:
    for name, distance in (("l2", l2), ("l1", l1)):
        objective, pairs = _objective(config=replace(CONFIG, analytic_first=analytic_first, loss=name))
        _scrambled(objective.learned)
        table = objective.export(objective.state_dict(), {})
        assert table.nfe == 3
        before = objective.counter.evaluations
        loss, logs = objective.loss(pairs, Context(0, 0, torch.arange(6)))
        assert objective.counter.evaluations - before == 3 * 6
        end = sample(tiny_model(0.1).field(pairs.labels), table, pairs.starts)
        torch.testing.assert_close(loss, distance(end, pairs.ends), rtol=1e-4, atol=0)
        torch.testing.assert_close(logs["rmse"], l2(end, pairs.ends).sqrt(), rtol=1e-4, atol=0)
    assert [name for name, _ in objective.named_parameters()] == [
        f"learned.{p}" for p in ("gap", "shift", "states", "predictions")
    ]


def test_l1_and_l2_are_the_means_of_their_names() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[0.0, 2.0], [5.0, -3.0]])
    assert (l1(a, b).item(), l2(a, b).item()) == (1.0, 1.5)


def test_a_distance_after_decoding_reaches_the_table_through_the_decoder() -> None:
    torch.manual_seed(0)
    quantizer = {"type": "fsq", "levels": [5, 5]}
    tokenizer = ImageTokenizer(width=16, blocks=1, quantizer=quantizer, image_size=8, downsample=4)  # pyright: ignore[reportArgumentType]
    tokenizer.set_latent_statistics(torch.zeros(2), torch.ones(2))
    tokenizer.eval().requires_grad_(False)
    distance = decoded(tokenizer, l2)
    objective = TableObjective(tiny_model(0.1), TableTarget(3, "karras"), CONFIG, distance)
    pairs = objective.run_teacher(torch.arange(6) % 4)
    loss, _ = objective.loss(pairs, Context(0, 0, torch.arange(6)))
    end = rollout(tiny_model(0.1).field(pairs.labels), objective.learned, pairs.starts)
    images = [tokenizer.decode_latents(z, snap=False) for z in (end, pairs.ends)]
    torch.testing.assert_close(loss, (images[0] - images[1]).square().mean())
    loss.backward()
    assert grad(objective.learned.predictions).tril().count_nonzero() == 6


def test_a_perceptual_distance_needs_a_decoder() -> None:
    with pytest.raises(ValueError, match="make_distance"):
        TableObjective(tiny_model(0.1), TableTarget(3, "karras"), replace(CONFIG, loss="lpips"))


@pytest.mark.parametrize(("unlearned", "taught", "chosen", "tried"), [
    ((2.0, 1.0), (1.0, 3.0), "uniform", 2),
    ((2.0, 1.0), (3.0, 1.0), "logsnr", 2),
    ((3.0, 1.0), (1.0, 3.0), "logsnr", 0),
    ((2.0, math.inf), (1.0, 3.0), "uniform", 0),
])  # fmt: skip
def test_the_two_nearest_grids_are_tried(
    unlearned: tuple[float, float],
    taught: tuple[float, float],
    chosen: str,
    tried: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a lesson each, unless the second is far behind; others never."""
    found, lessons, config = [*unlearned, *[9.0] * (len(grids.GRIDS) - 2)], list[Lesson](), replace(CONFIG)
    assert list(grids.GRIDS)[:2] == ["uniform", "logsnr"]

    def error_on(self: TableObjective, number: int, pairs: EndPairs, lesson: Lesson | None = None) -> float:
        if lesson is None:
            return found[number]
        lessons.append(lesson)
        return taught[number]

    monkeypatch.setattr(TableObjective, "_error_on", error_on)
    objective, _ = _objective(TableTarget(3, BEST), config)
    assert (objective.grid_name, lessons) == (chosen, tried * [distill_table.TRIAL])
    assert not any(parameter.count_nonzero() for parameter in objective.learned.parameters()), (
        "nothing of a trial is kept"
    )


@pytest.mark.parametrize("gradient_checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_objective_is_the_uninterrupted_one(gradient_checkpointing: bool) -> None:
    """Its numbers, the grid that it started from and what it has spent are all in its state."""
    target, config = TableTarget(3, BEST), replace(CONFIG, gradient_checkpointing=gradient_checkpointing)
    whole, pairs = _objective(target, config)
    prepared = whole.counter.evaluations
    trials = 2 * (distill_table.TRIAL.steps + 1) * 6 * 3
    assert prepared - 6 * 8 - len(grids.GRIDS) * 6 * 3 in (0, trials)
    _steps(whole, pairs, 0, 5)
    assert whole.counter.evaluations == whole.evaluations.item() == prepared + 5 * 3 * 3
    broken, _ = _objective(target, config)
    _steps(broken, pairs, 0, 2)
    resumed = TableObjective(tiny_model(0.1), target, config)  # no warm start: the state alone
    resumed.load_state_dict(broken.state_dict())
    _steps(resumed, pairs, 2, 5)
    assert resumed.counter.evaluations == whole.counter.evaluations
    assert resumed.grid_name == whole.grid_name
    assert resumed.grid == whole.grid
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_learning_starts_on_the_grid_that_ends_nearest_to_the_teacher() -> None:
    objective, pairs = _objective(TableTarget(4, BEST))
    schedule, field = tiny_model(0.1).schedule, tiny_model(0.1).field(pairs.labels)
    errors = {}
    for name, make in grids.GRIDS.items():
        end = sample(field, SOLVERS["dpmpp3m"].build(schedule, make(schedule, 4)), pairs.starts)
        errors[name] = l2(end, pairs.ends).item()
    assert objective.grid_name == min(errors, key=lambda name: errors[name])
    assert objective.grid == grids.GRIDS[objective.grid_name](schedule, 4)
    assert objective.grid_name != next(iter(grids.GRIDS)), "or a choice that does nothing would pass"
    for order in (1, 2, 3):
        named, _ = _objective(TableTarget(4, "shift"), replace(CONFIG, order=order))
        assert (named.grid_name, named.grid) == ("shift", grids.shift(schedule, 4))
        _same_rows(named.learned.table(), SOLVERS[f"dpmpp{order}m"].build(schedule, named.grid))


def test_the_export_holds_the_average_and_its_origin() -> None:
    objective, pairs = _objective(TableTarget(3, "logsnr", 2.0))
    average = EMA(objective, 0.9)
    _steps(objective, pairs, 0, 3)
    average.update(objective, 0)
    table = objective.export(average.shadow, {"origin": "of the table"})
    assert (dict(table.metadata), table.schedule) == ({"origin": "of the table"}, "Linear()")
    assert objective.counter.evaluations == 2 * (6 * 8 + 3 * 3 * 3), "guidance, teacher and three steps"
    assert table.rows != objective.learned.table().rows
    halfway = LearnedTable(objective.schedule, objective.grid)
    with torch.no_grad():
        for mine, own in zip(halfway.parameters(), objective.learned.parameters(), strict=True):
            mine.copy_(own * 0.9)  # the first step of an average keeps a tenth of zero
    _same_rows(table, halfway.table(table.metadata))


def test_bad_configurations_raise_an_error() -> None:
    for bad, why in (
        ({"pairs": 0}, "pairs 0"),
        ({"seed": -1}, "seed -1"),
        ({"teacher": "hein"}, "unknown teacher"),
        ({"teacher_grid": BEST}, "unknown teacher_grid"),
        ({"loss": "l3"}, "unknown loss"),
    ):
        with pytest.raises(ValueError, match=why):
            TableConfig(**bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown grid"):
        TableTarget(3, "karas")
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        TableTarget(0)
    with pytest.raises(ValueError, match="draws noise"):
        TableObjective(tiny_model(0.1), TableTarget(3, "karras"), replace(CONFIG, teacher="ddpm"))
