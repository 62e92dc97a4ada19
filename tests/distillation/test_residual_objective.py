"""Learning a residual: resumed bit for bit, every evaluation counted, held-out pairs, and what its card and costs are."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from distillation import tiny_model, train_steps
from tensors import randomised

from midway.gen.distillation.learning import Lesson, learn
from midway.gen.distillation.residual import ResidualConfig, ResidualObjective
from midway.gen.distillation.table import EndPairs, TableConfig
from midway.samplers import grids
from midway.samplers.card import SolverCard
from midway.samplers.learned import LearnedTable
from midway.samplers.residual import parameter_count
from midway.samplers.sample import sample
from midway.samplers.table import Table

CONFIG, TEACHING = ResidualConfig(width=8, blocks=1, held_out=4), TableConfig(teacher_steps=8, pairs=6)


def base(nfe: int = 3, std: float = 0.1) -> Table:
    """A table of the tiny model that random numbers were learned for."""
    learned = LearnedTable(tiny_model().schedule, grids.karras(tiny_model().schedule, nfe + 1), analytic_first=True)
    card = SolverCard("table", "karras", "linear", "tiny", nfe, True, 1.0, 100, "none")
    return randomised(learned, std=std).table({"card": json.dumps(asdict(card))})


def objective(name: str = "table-residual", prepared: bool = True, **changes: Any) -> ResidualObjective:
    torch.manual_seed(0)
    made = ResidualObjective(
        tiny_model(0.1), name, base(), 1.0, ResidualConfig(**{**asdict(CONFIG), **changes}), TEACHING
    )
    if prepared:
        made.prepare(torch.arange(6 + made.config.held_out) % 4, {})
    return made


def _pairs(made: ResidualObjective) -> EndPairs:
    return made.run_teacher(torch.arange(10) % 4)


def test_a_resumed_objective_is_the_uninterrupted_one() -> None:
    """The weights, the unit of the data and what was spent are all in its state; validation is spent, too."""
    whole, pairs = objective(), _pairs(objective())
    spent = 100 + 10 * 8  # the base's, and the teacher's
    assert whole.counter.evaluations == spent
    train_steps(whole, pairs.take, torch.optim.Adam(whole.parameters(), 0.01), 0, 5)
    assert whole.counter.evaluations == whole.evaluations.item() == spent + 5 * 3 * 3
    whole.validate()
    assert whole.evaluations.item() == spent + 5 * 3 * 3 + 4 * 3
    broken = objective()
    optimizer = torch.optim.Adam(broken.parameters(), 0.01)
    train_steps(broken, pairs.take, optimizer, 0, 2)
    resumed = objective(prepared=False)
    resumed.load_state_dict(broken.state_dict())
    again = torch.optim.Adam(resumed.parameters(), 0.01)
    again.load_state_dict(optimizer.state_dict())
    train_steps(resumed, pairs.take, again, 2, 5)
    resumed.held_out = whole.held_out
    resumed.validate()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_unlearned_it_validates_as_its_table_and_learning_lowers_the_error_that_it_is_trained_on() -> None:
    made = objective()
    pairs = made.held_out
    assert pairs is not None
    assert pairs.labels.tolist() == [2, 3, 0, 1], "the last of ten"
    end = sample(tiny_model(0.1).field(pairs.labels), base(), pairs.starts)
    assert made.validate() == pytest.approx((end - pairs.ends).square().mean().sqrt().item(), rel=1e-5)
    everything = _pairs(made)
    assert torch.equal(pairs.ends, everything.ends[6:])
    before = made.loss(everything.take(torch.arange(6)), None)[0].item()  # pyright: ignore[reportArgumentType]
    learn(made, everything.take, 6, Lesson(60, 6, 3e-3, 1.0))
    after = made.loss(everything.take(torch.arange(6)), None)[0].item()  # pyright: ignore[reportArgumentType]
    assert after < before / 2


@pytest.mark.parametrize("name", ["table-residual", "table-residual-1x1"])
def test_what_is_exported_is_what_was_learned(name: str) -> None:
    """Its end states, its RMSE on held-out pairs, its kernels and its parameters, nearly as many for both names."""
    made = objective(name)
    randomised(made.residual)
    card = SolverCard(name, "karras", "linear", "tiny", 3, guidance=1.0, training_nfe=7, **made.facts())
    solver = made.sampler(made.state_dict(), card)
    pairs = made.held_out
    assert pairs is not None
    end = solver.run(tiny_model(0.1).field(pairs.labels), pairs.starts)
    rmse = (end - pairs.ends).square().mean().sqrt().item()
    found = made.on_held_out(solver)
    assert found.rmse == pytest.approx(rmse, rel=1e-6) and made.validate() == pytest.approx(rmse, rel=1e-5)
    assert found.base != found.rmse and 0 < found.outside < 1
    assert (card.base, card.mode, card.analytic_first) == ("table, none", "end_to_end", True)
    assert solver.residual.kernel == (3 if name == "table-residual" else 1)
    other = objective("table-residual", prepared=False).residual
    assert abs(parameter_count(solver.residual) / parameter_count(other) - 1) < 0.1
    assert solver.costs.network > 10_000


def test_teachers_and_losses_that_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="draws noise"):
        ResidualObjective(tiny_model(), "table-residual", base(), 1.0, CONFIG, TableConfig(teacher="ddpm"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        ResidualObjective(tiny_model(), "table-residual", base(), 1.0, CONFIG, TableConfig(loss="lpips"))
