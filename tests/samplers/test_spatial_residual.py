"""A table with a residual: the table bit for bit at zero, an exact solver of one evaluation, spans, sizes and files."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from artefacts import rewrite
from tensors import normal, randomised
from torch import Tensor

from midway.samplers import grids
from midway.samplers.card import SolverCard
from midway.samplers.learned import LearnedTable, rollout
from midway.samplers.operations import Costs, flops
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.residual import (
    Residual,
    ResidualShape,
    factors,
    out_of_span,
    parameter_count,
    pointwise,
    span_shares,
    steps,
)
from midway.samplers.residual_solver import ResidualTable, residual_flops
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Linear, Schedule, fingerprint
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

SHAPE = ResidualShape((2, 4, 4), width=8, blocks=1)


def stationary(schedule: Schedule, variances: Tensor) -> Field:
    """The exact field of periodic Gaussian images whose Fourier modes (H, W) have these variances."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        gain = alpha * variances / (alpha.square() * variances + sigma.square())
        x0 = torch.fft.ifft2(gain * torch.fft.fft2(x)).real
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


def spectrum(size: int) -> Tensor:
    """Variances that fall with the frequency, (size, size) float64, symmetric."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    return 10 / (1 + k[:, None].square() + k.square()) ** 2


def base_table(schedule: Schedule, nfe: int, analytic_first: bool = False, learned: bool = True) -> Table:
    """Of random learned numbers, with a card."""
    table = LearnedTable(schedule, grids.karras(schedule, nfe + analytic_first), analytic_first=analytic_first)
    name = fingerprint(schedule)
    card = SolverCard("table", "karras", name, "a model", nfe, analytic_first, 1.0, 0, "none")
    return (randomised(table, std=0.05) if learned else table).table({"card": json.dumps(asdict(card))})


def solver(schedule: Schedule, shape: ResidualShape = SHAPE, std: float = 0.0) -> ResidualTable:
    torch.manual_seed(0)
    base, residual = base_table(schedule, 3, True), Residual(shape)
    residual = (randomised(residual, std=std) if std else residual).eval().requires_grad_(False)
    assert base.card is not None
    name = "table-residual" if shape.kernel == 3 else "table-residual-1x1"
    return ResidualTable(replace(base.card, name=name), base, residual, schedule, Costs(100, 10))


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()], ids=["VP", "EDM", "Linear"])
def test_a_residual_that_learned_nothing_is_its_table_bit_for_bit(schedule: Schedule) -> None:
    """Its last layer is zero whatever the others are, with and without an analytic first row; any other residual is not."""
    field = stationary(schedule, spectrum(4).float())
    x = 30 * normal(5, 2, 4, 4)
    for kernel in (1, 3):
        unlearned = solver(schedule, replace(SHAPE, kernel=kernel))
        assert torch.equal(unlearned.run(field, x), sample(field, unlearned.base, x))
        assert (
            solver(schedule, replace(SHAPE, kernel=kernel), 0.1).run(field, x) - sample(field, unlearned.base, x)
        ).abs().max() > 1e-3


def test_pure_noise_is_a_start_like_any_other() -> None:
    """At t = 1 of a flow rho is infinite, and factors and corrections are finite."""
    schedule, grid = Linear(), (1.0, 0.6, 0.2, 0.01)
    learned = LearnedTable(schedule, grid, analytic_first=True)
    residual = randomised(Residual(SHAPE)).double()
    ends = list(
        steps(
            stationary(schedule, spectrum(4)),
            learned.table(),
            residual,
            0.5,
            normal(3, 2, 4, 4, dtype=torch.float64),
            schedule,
        )
    )
    assert all(step.state.isfinite().all() for step in ends)
    assert factors(schedule, grid)[0][3] == pytest.approx(0.4), "alpha' (1 - rho' / rho) where rho is infinite: alpha'"


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()], ids=["VP", "EDM", "Linear"])
def test_the_factor_is_that_of_the_newest_estimate_in_a_first_order_step(schedule: Schedule) -> None:
    """alpha' (1 - rho' / rho): what DDIM, whose weights are built elsewhere, gives the clean estimate."""
    grid = grids.karras(schedule, 5)
    want = [row.predictions[-1] for row in SOLVERS["ddim"].build(schedule, grid).rows]
    assert [factor for _, _, _, factor in factors(schedule, grid)] == pytest.approx([*want, 0.0], rel=1e-9, abs=1e-12)


def test_one_convolution_makes_one_evaluation_exact_where_every_table_fails() -> None:
    """Stationary Gaussian images on a torus, whose end state is a circular convolution of the start: one row plus the right
    kernel is exact. A table of one evaluation is a + b times the gain in every mode: at six noise levels the best weights fail.
    """
    schedule, size = EDM(), 8
    variances, grid = spectrum(size), (EDM().time_of_rho(torch.tensor([80.0, 0.002], dtype=torch.float64))).tolist()
    field, (first, last) = stationary(schedule, variances), (80.0, 0.002)
    x = first * normal(64, 1, size, size, dtype=torch.float64)
    wanted = ((variances + last**2) / (variances + first**2)).sqrt()
    exact = torch.fft.ifft2(wanted * torch.fft.fft2(x)).real
    table = LearnedTable(schedule, tuple(grid)).table()
    row = table.rows[0]
    made = row.states[0] + row.predictions[0] * variances / (variances + first**2)
    factor = factors(schedule, grid)[0][3]
    kernel = torch.fft.ifft2((wanted - made) / factor * math.hypot(first, 1.0)).real

    def convolution(state: Tensor, estimate: Tensor, change: Tensor, rho: float, rho_next: float) -> Tensor:
        return torch.stack(
            [torch.roll(state, (i, j), (2, 3)) * kernel[i, j] for i in range(size) for j in range(size)]
        ).sum(0)

    (step,) = steps(field, table, convolution, 1.0, x, schedule)

    def error(end: Tensor) -> float:
        return ((end - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert error(step.state) < 1e-9
    tables = [error(_best_table(field, schedule, x, exact, rho)) for rho in (0.3, 1.0, 3.0, 10.0, 30.0, 80.0)]
    assert min(tables) > 0.05, tables
    assert out_of_span(step.added, [x, step.estimate]).min() > 0.01


def _best_table(field: Field, schedule: Schedule, x: Tensor, exact: Tensor, rho: float) -> Tensor:
    """The end state of the table of one evaluation at this noise level whose weights are fitted to these samples."""
    time = schedule.time_of_rho(torch.tensor([rho], dtype=torch.float64))
    columns = torch.stack([x.flatten(), field(x, time.expand(len(x))).x0.flatten()], dim=1)
    return (columns @ torch.linalg.lstsq(columns, exact.flatten()[:, None]).solution).view_as(x)


def test_the_share_outside_a_span_is_that_of_the_projection() -> None:
    """In the span 0, orthogonal to it 1, in between sin^2 of the angle; each sample has its own span."""
    basis = [normal(6, 2, 3, seed=k, dtype=torch.float64) for k in range(3)]
    weights = normal(6, 3, seed=9, dtype=torch.float64)
    inside = sum(weights[:, k, None, None] * basis[k] for k in range(3))
    assert isinstance(inside, Tensor)
    assert out_of_span(inside, basis).max() < 1e-12
    columns = torch.stack([b.flatten(1) for b in basis], dim=2)
    q = (
        torch.linalg.qr(torch.cat([columns, normal(6, 6, 1, seed=4, dtype=torch.float64)], dim=2))
        .Q[:, :, 3]
        .view(6, 2, 3)
    )
    torch.testing.assert_close(out_of_span(q, [*basis, basis[0]]), torch.ones(6, dtype=torch.float64))
    unit = inside / inside.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(out_of_span(0.6 * q + 0.8 * unit, basis), torch.full((6,), 0.36, dtype=torch.float64))
    assert torch.equal(out_of_span(torch.zeros_like(q), basis), torch.zeros(6, dtype=torch.float64))


def test_what_a_table_learns_stays_in_the_span_and_what_a_residual_adds_does_not() -> None:
    """The difference of two tables on the same estimates is in the span of the start and the estimates; a residual's is not."""
    schedule = VP()
    field, x = stationary(schedule, spectrum(4)), normal(5, 2, 4, 4, dtype=torch.float64)
    learned = randomised(LearnedTable(schedule, grids.karras(schedule, 3)), std=0.1)
    table = learned.table()
    found = list(steps(field, table, randomised(Residual(SHAPE)).double(), 1.0, x, schedule))
    plain = list(steps(field, table, Residual(SHAPE).double(), 1.0, x, schedule))
    assert out_of_span(plain[-1].state, [x, *(step.estimate for step in plain)]).max() < 1e-12
    assert 0.3 < span_shares(found, x) <= 1
    assert span_shares(plain, x) == 0
    aligned = [replace(step, added=step.estimate - 0.5 * x) for step in found]
    assert span_shares(aligned, x) < 1e-12, "a row's own estimate is in its span"
    ahead = [replace(step, added=then.estimate) for step, then in pairwise(found)]
    assert span_shares(ahead, x) > 1e-3, "the next one's is not"
    torch.testing.assert_close(rollout(field, learned, x), plain[-1].state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latent", [(6, 2, 2), (4, 8, 8), (96,)])
def test_the_control_has_as_many_parameters(latent: tuple[int, ...]) -> None:
    full = ResidualShape(latent)
    assert 20_000 <= parameter_count(Residual(full)) <= 100_000
    control = pointwise(full)
    counts = [parameter_count(Residual(shape)) for shape in (full, control)]
    assert control.kernel == 1 and abs(counts[1] / counts[0] - 1) < 0.02


def test_a_kernel_of_one_sees_no_neighbours_and_a_kernel_of_three_does() -> None:
    for kernel, reaches in ((1, False), (3, True)):
        residual = randomised(Residual(replace(SHAPE, kernel=kernel)))
        x = normal(1, 2, 4, 4).requires_grad_()
        residual(x, x, x, 3.0, 1.0)[0, 0, 1, 1].backward()
        assert x.grad is not None
        assert (x.grad[0, :, 2, 2].abs().max() > 1e-6) == reaches


def test_operations_are_counted_as_by_hand() -> None:
    """A convolution of k x k, without padding's savings, makes 2 k^2 C_in C_out operations a pixel."""
    pixels, width = 16, 8
    first, last = 2 * 9 * 6 * width, 2 * 9 * width * 2
    block = 2 * 9 * width + 2 * width * 2 * width * 2
    embedding = 2 * 16 * 32 + 2 * 32 * 2 * width
    assert residual_flops(Residual(SHAPE), 3) == 3 * (pixels * (first + block + last) + embedding)
    assert flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    assert (
        Costs(2_000_000, 1_000_000).describe(5) == "5 evaluations of 2 MFLOP, and 1 MFLOP of the residual (10.0 % more)"
    )


def test_it_is_read_as_it_was_saved(tmp_path: Path) -> None:
    path, saved = tmp_path / "solver.safetensors", solver(VP(), std=0.1)
    saved.save(path)
    read, field, x = ResidualTable.load(path, VP()), stationary(VP(), spectrum(4).float()), normal(5, 2, 4, 4)
    assert (read.hash, read.card, read.base, read.costs) == (saved.hash, saved.card, saved.base, saved.costs)
    assert torch.equal(read.run(field, x), saved.run(field, x))
    assert solver(VP(), std=0.2).hash != saved.hash


def _drop(*names: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, header: [part.pop(name, None) for part in (tensors, header) for name in names]


WRONG: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "no_base": (_drop("base.states", "base.grid"), "'grid' is absent|'states' is absent"),
    "no_base_header": (_drop("base.solver"), "lacks base.solver"),
    "changed": (lambda tensors, header: tensors["last.weight"].mul_(1.01).add_(0.01), "have hash"),
    "changed_base": (lambda tensors, header: tensors["base.states"].mul_(1.01), "have hash"),
    "narrow": (lambda tensors, header: tensors.update(unit=tensors["unit"].half()), "'unit' is float16"),
    "wider": (lambda t, header: header.update(shape=header["shape"].replace('"width": 8', '"width": 9')), "of shape"),
    "of_another_shape": (lambda t, header: header.update(shape="[]"), "no record of its sizes"),
    "of_a_kernel": (lambda t, header: header.update(shape=header["shape"].replace(": 3,", ": 2,")), "kernels of 1 or 3"),
    "nan": (lambda tensors, header: [tensors["last.weight"].fill_(math.nan), header.pop("hash")], "not finite"),
    "renamed": (lambda t, header: header.update(card=header["card"].replace("residual", "residual-1x1")), "kernels of 1"),
    "of_4": (lambda t, header: header.update(card=header["card"].replace('"nfe": 3', '"nfe": 4')), "another model, budget"),
}  # fmt: skip


@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_file_is_a_value_error(way: str, tmp_path: Path) -> None:
    change, words = WRONG[way]
    solver(VP()).save(tmp_path / "solver.safetensors")
    rewrite(tmp_path / "solver.safetensors", change)
    with pytest.raises(ValueError, match=words):
        ResidualTable.load(tmp_path / "solver.safetensors", VP())


def test_it_serves_its_own_latents_and_schedule_alone(tmp_path: Path) -> None:
    solver(VP()).save(tmp_path / "solver.safetensors")
    with pytest.raises(ValueError, match="was made for VP"):
        ResidualTable.load(tmp_path / "solver.safetensors", EDM())
    with pytest.raises(ValueError, match=r"learned for latents \(2, 4, 4\), these are \(2, 8, 8\)"):
        solver(VP()).run(stationary(VP(), spectrum(8)), normal(1, 2, 8, 8))
    with pytest.raises(ValueError, match="kernels of 1 or 3"):
        ResidualShape((2, 4, 4), kernel=5)
