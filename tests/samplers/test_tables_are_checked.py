"""Tables are checked where they are made: every builder's passes, and none with a changed number, time, node or text."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import Change, rewrite, with_card, with_number

from midway.samplers.card import SolverCard
from midway.samplers.discrete import Discrete
from midway.samplers.grids import GRIDS, Grid, explicit, karras, logsnr, reversed_grid
from midway.samplers.interop import parametrisation_of, read_table, table_from_numbers, trained_range
from midway.samplers.learned import LearnedTable
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.plugin import BASES, plugin_table
from midway.samplers.prediction import NetworkField
from midway.samplers.rows import Row
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule, Shifted
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.step_parameters import AMEDConfig, Constants, MeanDirection, Predictor
from midway.samplers.table import Table, fingerprint

DISCRETE: Any = parametrisation_of({}).schedule
SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(), "cosine": Cosine(), "vp": VP(), "edm": EDM(), "shifted": Shifted(Cosine(), 0.5), "discrete": DISCRETE,
}  # fmt: skip
HEUN = SOLVERS["heun"].build(VP(), karras(VP(), 3))
CARD = SolverCard("table", "best", "vp", "model", 3, False, 1.0, 0, "teacher")


# ---- what is right passes ----


@pytest.mark.parametrize("name", SOLVERS)
def test_every_table_of_the_registry_passes(name: str) -> None:
    """On all grids, at several budgets, with and without an analytic first step, also inverted, and from pure noise."""
    solver, made = SOLVERS[name], 0
    for label, process in SCHEDULES.items():
        for make in GRIDS.values() if label == "vp" else (karras,):
            for steps, analytic in ((1, False), (7, True)) if label == "vp" else ((3, False), (2, True)):
                grid = make(process, steps, *trained_range(process))
                table = solver.build(process, grid, analytic)
                assert table.nfe == steps * solver.evaluations - analytic
                if not solver.stochastic:
                    solver.build(process, reversed_grid(grid))
                if label == "linear" and solver.pure_noise:
                    solver.build(process, (1.0, *grid[1:]), analytic)
                made += 1
    assert made == 2 * (len(SCHEDULES) - 1 + len(GRIDS))


def test_learned_tables_need_not_be_consistent() -> None:
    wild = [MeanDirection(r, c, a) for r, c, a in ((0.1, 1.4, 0.7), (0.9, 0.6, 1.3))]
    for base in BASES:
        plugin_table(VP(), karras(VP(), 2), base, wild)
    learned = LearnedTable(VP(), logsnr(VP(), 4))
    for i, parameter in enumerate(learned.parameters()):
        torch.nn.init.normal_(parameter, std=2.0, generator=torch.Generator().manual_seed(i))
    table = learned.table()
    assert set(table.grid) == {table.grid[0], *(row.arrival for row in table.rows)}


def test_learned_evaluation_times_stay_within_the_grid_to_the_last_digit() -> None:
    for seed in range(20):
        learned = LearnedTable(EDM(), karras(EDM(), 6))
        torch.nn.init.normal_(learned.shift, std=8.0, generator=torch.Generator().manual_seed(seed))
        assert all(learned.grid[-1] <= time <= learned.grid[0] for time in learned.table().times)


# ---- what is wrong does not ----

NAN, INF = math.nan, math.inf


def _row(**changes: Any) -> Callable[[Table], Table]:
    """Row 2 with other values."""
    return lambda table: replace(table, rows=(*table.rows[:2], replace(table.rows[2], **changes), *table.rows[3:]))


def _weights(**changes: Callable[[tuple[float, ...]], tuple[Any, ...]]) -> Callable[[Table], Table]:
    def change(table: Table) -> Table:
        return _row(**{name: of(getattr(table.rows[2], name)) for name, of in changes.items()})(table)

    return change


def _zeros(weights: tuple[float, ...]) -> tuple[float, ...]:
    return (0.0,) * len(weights)


WRONG: dict[str, tuple[Callable[[Table], Table], str]] = {
    "time above 1": (_row(time=1.5), "times are in"),
    "time below 0": (_row(time=-0.1), "times are in"),
    "time nan": (_row(time=NAN), "times are in"),
    "arrival above 1": (_row(arrival=1.5), "times are in"),
    "arrival inf": (_row(arrival=INF), "not finite"),
    "noise nan": (_row(noise=NAN), "not finite"),
    "noise below 0": (_row(noise=-0.1), "noise below 0"),
    "noise": (_row(noise=0.1), "no solver"),
    "state nan": (_weights(states=lambda w: (*w[:-1], NAN)), "not finite"),
    "state as text": (_weights(states=lambda w: (*w[:-1], "1")), "not finite"),
    "prediction inf": (_weights(predictions=lambda w: (*w[:-1], -INF)), "not finite"),
    "no weights": (_weights(states=_zeros, predictions=_zeros), "weighs nothing"),
    "no predictions": (_weights(predictions=_zeros), "no solver"),
    "no states": (_weights(states=_zeros), "no solver"),
    "states too long": (_weights(states=lambda w: (*w, 0.0)), "needs 3 and 3"),
    "predictions too short": (_weights(predictions=lambda w: w[:-1]), "needs 3 and 3"),
    "a weight off by 1e-5": (_weights(states=lambda w: (*w[:-1], w[-1] + 1e-5)), "no solver"),
    "weights of the row before": (lambda t: replace(t, rows=(*t.rows[:2], t.rows[1], *t.rows[3:])), "needs"),
    "evaluated elsewhere": (_row(time=0.5), "evaluates at t = 0.5"),
    "rows swapped": (lambda t: replace(t, rows=(*t.rows[:4], t.rows[5], t.rows[4])), "needs"),
    "no rows": (lambda t: replace(t, rows=(), grid=t.grid, nodes=()), "one node per grid time"),
    "grid outside": (lambda t: replace(t, grid=(1.5, *t.grid[1:])), "within"),
    "grid nan": (lambda t: replace(t, grid=(NAN, *t.grid[1:])), "within"),
    "grid not falling": (lambda t: replace(t, grid=(t.grid[0], t.grid[2], t.grid[1], t.grid[3])), "falls all the way"),
    "grid twice": (lambda t: replace(t, grid=(t.grid[0], t.grid[1], t.grid[1], t.grid[3])), "falls all the way"),
    "grid empty": (lambda t: replace(t, grid=(), nodes=()), "falls all the way"),
    "grid as text": (lambda t: replace(t, grid=tuple(map(str, t.grid))), "falls all the way"),
    "grid elsewhere": (lambda t: replace(t, grid=(t.grid[0], t.grid[1], 0.01, t.grid[3])), "lives at"),
    "nodes too few": (lambda t: replace(t, nodes=t.nodes[1:]), "one node per grid time"),
    "nodes twice": (lambda t: replace(t, nodes=(0, 2, 2, 6)), "no rising numbers"),
    "nodes falling": (lambda t: replace(t, nodes=(0, 4, 2, 6)), "no rising numbers"),
    "nodes not whole": (lambda t: replace(t, nodes=(0, 2.0, 4, 6)), "no rising numbers"),
    "inner stages as nodes": (lambda t: replace(t, nodes=(0, 3, 4, 6)), "lives at"),
    "another schedule": (lambda t: replace(t, schedule=fingerprint(Cosine())), "no solver on Cosine"),
    "schedule as number": (lambda t: replace(t, schedule=3), "texts"),
    "metadata as number": (lambda t: replace(t, metadata={"eta": 0}), "texts"),
    "a card that is no object": (lambda t: replace(t, metadata={"card": "[]"}), "no JSON object"),
    "a card that is no JSON": (lambda t: replace(t, metadata={"card": "x"}), "Expecting value"),
    "a card of another budget": (lambda t: replace(t, metadata={"card": json.dumps(asdict(CARD))}), "at NFE 3"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_cannot_be_made(wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        change(HEUN)


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].stochastic])
def test_a_solver_without_noise_has_none(name: str) -> None:
    for schedule in (Linear(), VP()):
        table = SOLVERS[name].build(schedule, karras(schedule, 3))
        for i, row in enumerate(table.rows):
            with pytest.raises(ValueError, match="no solver"):
                replace(table, rows=(*table.rows[:i], replace(row, noise=0.01), *table.rows[i + 1 :]))


def test_a_learned_solver_has_no_noise() -> None:
    learned = LearnedTable(VP(), logsnr(VP(), 2)).table()
    with pytest.raises(ValueError, match="no learned solver but adasde draws any"):
        replace(learned, rows=(replace(learned.rows[0], noise=0.1), learned.rows[1]))


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_no_number_of_a_table_with_an_analytic_first_step_may_change(name: str, analytic: bool) -> None:
    """Of the discrete schedule, which only the table knows; of weights that an analytic estimate multiplies, those at noise."""
    grid = tuple(DISCRETE.time_of_rho(torch.tensor([3.0, 1.0, 0.4, 0.1], dtype=torch.float64)).tolist())
    table = SOLVERS[name].build(DISCRETE, grid, analytic)
    for i, row in enumerate(table.rows):
        for kind in ("states", "predictions"):
            for j, weight in enumerate(getattr(row, kind)):
                if weight:
                    changed = list(getattr(row, kind))
                    changed[j] = 1.01 * weight
                    with pytest.raises(ValueError, match="no solver"):
                        replace(
                            table, rows=(*table.rows[:i], replace(row, **{kind: tuple(changed)}), *table.rows[i + 1 :])
                        )


@pytest.mark.parametrize(
    "times",
    [(0.9,), (0.9, 0.9), (0.5, 0.9), (0.9, NAN), (NAN, 0.1), (1.1, 0.5), (0.5, -0.1), (INF, 0.5), (0.9, 0.5, 0.7)],
)
def test_an_explicit_grid_falls_within_0_and_1(times: Grid) -> None:
    with pytest.raises(ValueError, match="falling times within"):
        explicit(times)
    learned = LearnedTable(VP(), (0.9, 0.5))
    with pytest.raises(ValueError, match="falling grid"):
        LearnedTable(VP(), times)
    with pytest.raises(ValueError, match="falling grid"):
        learned.restart(times)
    with pytest.raises(ValueError, match="falling times within"):
        Discrete(DISCRETE.log_rho).grid([1000 * t - 1 for t in times[:-1]], times[-1])


def test_grids_of_impossible_numbers_raise_an_error() -> None:
    for ends in ((NAN, 0.1), (0.1, NAN), (0.1, 0.1), (0.1, 1.0), (1.0, 0.0), (1.0, -1.0)):
        for make in GRIDS.values():
            with pytest.raises(ValueError, match="rho_min"):
                make(VP(), 4, *ends)
    with pytest.raises(ValueError, match="noise levels that the schedule has"):
        logsnr(EDM(5.0), 8)  # its noise ends at 5, not at 80
    for power in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="positive power"):
            karras(VP(), 4, power=power)
    for factor in (0.0, NAN):
        with pytest.raises(ValueError, match="must be positive"):
            GRIDS["shift"](VP(), 4, factor=factor)


# ---- files ----


FILES: dict[str, tuple[Change, str]] = {
    "another number": (lambda t, h: t["states"].mul_(1.0001), "hash"),
    "a weight too early": (with_number("states", (0, 2), 0.5), "not there yet"),
    "a prediction too early": (with_number("predictions", (1, 2), NAN), "not there yet"),
    "nan": (with_number("states", (2, 0), NAN), "not finite"),
    "noise": (with_number("noise", 1, 0.5), "no learned solver but adasde draws"),
    "grid rising": (with_number("grid", 1, 0.999999), "falls all the way|lives at"),
    "time outside": (with_number("time", 1, 2.0), "times are in"),
    "arrival elsewhere": (with_number("arrival", 1, 0.5), "lives at"),
    "nodes": (with_number("nodes", 1, 7), "rising numbers"),
    "no array": (lambda t, h: t.pop("noise"), "'noise' is absent"),
    "one array more": (lambda t, h: t.update(more=torch.zeros(1)), "'more' is float32"),
    "float32": (lambda t, h: t.update(states=t["states"].float()), "'states' is float32"),
    "nodes of floats": (lambda t, h: t.update(nodes=t["nodes"].double()), "'nodes' is float64"),
    "another shape": (lambda t, h: t.update(states=t["states"][:, :2]), "'states' is float64 of shape"),
    "flat": (lambda t, h: t.update(states=t["states"].flatten()), "'states' is float64 of shape"),
    "no rows": (lambda t, h: [t.update({k: v[:0] for k, v in t.items()}), t.update(states=torch.zeros(0, 0).double(),
                predictions=torch.zeros(0, 0).double())], "grid of at least two"),
    "another schedule": (lambda t, h: [h.update(schedule="Cosine()"), h.pop("hash")], "made for Cosine"),
    "no solver": (lambda t, h: h.pop("solver"), "lacks solver"),
    "another format": (lambda t, h: h.update(format="midway-table-9"), "its format is"),
    "metadata of a list": (lambda t, h: h.update(metadata="[1]"), "no JSON object"),
    "metadata of numbers": (lambda t, h: h.update(metadata='{"card": 3}'), "texts"),
    "nfe of the card": (with_card(nfe=4), "at NFE 4"),
    "nfe as text": (with_card(nfe="3"), "nfe of the card is '3', not int"),
    "nfe as truth": (with_card(nfe=True), "nfe of the card is True, not int"),
    "guidance nan": (with_card(guidance=NAN), "guidance of the card is nan"),
    "unknown field": (with_card(author="x"), "unknown field 'author'"),
    "a card with too little": (lambda t, h: h.update(metadata='{"card": "{}"}'), "no field 'name'"),
}  # fmt: skip


def _table_file(path: Path) -> Path:
    LearnedTable(VP(), logsnr(VP(), 3)).table({"card": json.dumps(asdict(CARD))}).save(path)
    return path


@pytest.mark.parametrize("wrong", FILES)
def test_a_wrong_file_of_a_table_is_not_read(wrong: str, tmp_path: Path) -> None:
    path, (change, message) = _table_file(tmp_path / "t.safetensors"), FILES[wrong]
    assert Table.load(path, VP()).card == CARD
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        Table.load(path, VP())
    with pytest.raises(ValueError, match=message):
        read_table(path, VP())


def test_what_is_no_table_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_table(tmp_path / "text", VP())
    for numbers in ({}, {**asdict(HEUN), "rows": None}, {**asdict(HEUN), "rows": [1]}, {**asdict(HEUN), "metadata": 3}):
        with pytest.raises(ValueError, match="not the numbers of a table"):
            table_from_numbers(numbers)
    assert table_from_numbers(json.loads(json.dumps(asdict(HEUN)))) == HEUN


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_table_of_a_method_stays_one_on_the_disk(schedule: str, tmp_path: Path) -> None:
    """What a file does not show, its schedule, is known from its name or from the caller, at the latest when it runs."""
    process, path = SCHEDULES[schedule], tmp_path / "t.safetensors"
    table = SOLVERS["dpmpp2m"].build(process, karras(process, 3, *trained_range(process)))
    table.save(path)
    assert (
        Table.load(path)
        == Table.load(path, process)
        == table_from_numbers(json.loads(json.dumps(asdict(table))))
        == table
    )
    rewrite(path, with_number("predictions", (1, 1), 1.01 * table.rows[1].predictions[1]))
    with pytest.raises(ValueError, match="no solver"):
        Table.load(path, process)
    if schedule in ("linear", "cosine", "vp", "edm"):
        with pytest.raises(ValueError, match="no solver"):
            Table.load(path)
    else:
        with pytest.raises(ValueError, match="no solver"):
            sample(NetworkField(lambda x, t: x, "v", process), Table.load(path), torch.ones(2, 2))


def test_a_file_that_names_no_schedule_is_checked_on_the_one_that_it_is_read_for(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    right = replace(SOLVERS["dpmpp2m"].build(VP(), karras(VP(), 3)), schedule="")
    right.save(path)
    assert Table.load(path, VP()) == read_table(path, VP()) == right
    for made in (
        replace(right, rows=(replace(right.rows[0], states=(3.0,)), *right.rows[1:])),
        replace(HEUN, schedule="", rows=(*HEUN.rows[:5], replace(HEUN.rows[5], predictions=(0.0,) * 6))),
        replace(SOLVERS["ddim"].build(Cosine(), karras(Cosine(), 4)), schedule=""),
    ):
        made.save(path)
        for read in (Table.load, read_table):
            with pytest.raises(ValueError, match="no solver on VP"):
                read(path, VP())


@pytest.mark.parametrize("name", ["heun", "dpmpp2m", "euler"])
def test_noise_under_the_name_of_a_solver_without_is_not_read(name: str, tmp_path: Path) -> None:
    """Weights of another method, right in mean and variance."""
    path, drawing = tmp_path / "t.safetensors", SOLVERS["ddpm"].build(VP(), karras(VP(), 3))
    for table, wrong in (
        (replace(drawing, solver=name), True),
        (drawing, False),
        (ddim(VP(), drawing.grid, eta=0.5), False),
    ):
        table.save(path)
        for read in (lambda: read_table(path, VP()), lambda table=table: table_from_numbers(asdict(table))):
            if not wrong:
                assert read().stochastic
                continue
            with pytest.raises(ValueError, match=f"'{name}' draws none"):
                read()


# ---- files of AMED ----

AMED: dict[str, tuple[Change, str]] = {
    "another number": (lambda t, h: t["raw"].add_(0.01), "hash"),
    "nan": (with_number("raw", (0, 0), NAN), "not finite"),
    "grid nan": (with_number("grid", 1, NAN), "falling grid|grid"),
    "grid rising": (with_number("grid", 1, 0.9999), "falling grid"),
    "grid outside": (with_number("grid", 0, 1.5), "falling grid"),
    "grid at data": (with_number("grid", -1, 0.0), "sigma > 0"),
    "no grid": (lambda t, h: t.pop("grid"), "'grid' is float32"),
    "grid of float32": (lambda t, h: t.update(grid=t["grid"].float()), "'grid' is float32"),
    "grid of one": (lambda t, h: t.update(grid=t["grid"][:1]), "grid of 1 times"),
    "grid of another length": (lambda t, h: t.update(grid=t["grid"][:-1]), "'raw' is float32 of shape"),
    "raw of another shape": (lambda t, h: t.update(raw=t["raw"][:, :2]), "'raw' is float32 of shape"),
    "raw of float64": (lambda t, h: t.update(raw=t["raw"].double()), "'raw' is float64"),
    "raw of integers": (lambda t, h: t.update(raw=t["raw"].long()), "'raw' is int64"),
    "no raw": (lambda t, h: t.pop("raw"), "'raw' is absent"),
    "one tensor more": (lambda t, h: t.update(more=torch.zeros(1)), "'more' is float32"),
    "features that are no number": (lambda t, h: h.update(feature_dim="four"), "invalid literal"),
    "features below 0": (lambda t, h: h.update(feature_dim="-1"), "-1 features"),
    "no features": (lambda t, h: h.pop("feature_dim"), "lacks feature_dim"),
    "config of texts": (lambda t, h: h.update(config='{"scale_dir": "0.1"}'), "scale_dir of the config is '0.1'"),
    "config out of range": (lambda t, h: h.update(config='{"scale_dir": 2.0}'), "scale_dir must be in"),
    "config unknown": (lambda t, h: h.update(config='{"depth": 2}'), "unknown field 'depth'"),
    "config hidden": (lambda t, h: h.update(config='{"hidden": 0}'), "hidden"),
    "config list": (lambda t, h: h.update(config="[]"), "no JSON object"),
    "card list": (lambda t, h: h.update(card="[]"), "no JSON object"),
    "nfe": (with_card(nfe=8), "make 6"),
    "analytic_first": (with_card(analytic_first=True), "make 5"),
    "base": (with_card(base="ipndm4"), "go together"),
    "unknown base": (with_card(base="rk9"), "go together"),
    "name": (with_card(name="amed-plugin-ipndm4"), "go together"),
    "unknown name": (with_card(name="amedd"), "go together"),
    "schedule": (with_card(schedule="vp"), "learned on schedule vp"),
    "training nfe": (with_card(training_nfe=-1), "training_nfe"),
}  # fmt: skip


@pytest.mark.parametrize("features", [0, 4])
@pytest.mark.parametrize("wrong", AMED)
def test_a_wrong_file_of_amed_is_not_read(wrong: str, features: int, tmp_path: Path) -> None:
    path, (change, message) = tmp_path / "s.safetensors", AMED[wrong]
    rule = Predictor(features, 3, AMEDConfig()) if features else Constants(3, AMEDConfig())
    card = SolverCard(
        "amed-predictor" if features else "amed", "karras", "cosine", "model", 6, False, 1.0, 0, "teacher"
    )
    LearnedSolver(card, karras(Cosine(), 3), rule, Cosine()).save(path)
    assert LearnedSolver.load(path, Cosine()).card == card
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        LearnedSolver.load(path, Cosine())


def test_a_row_of_one_state_and_no_prediction_is_a_table_of_any_schedule() -> None:
    """Tables without a schedule have the checks of form alone."""
    table = Table("halves", (0.9, 0.5), (0, 1), (Row(0.9, 0.5, (0.5,), (0.0,)),))
    assert sample(NetworkField(lambda x, t: x, "v", VP()), table, torch.ones(1, 1)).item() == 0.5
    assert ddim(VP(), (0.9, 0.5)).schedule == fingerprint(VP())
