"""Tables of a sweep's report: which columns and notes it has. A metric is added by one more entry of `METRIC_COLUMNS`.

A table has a line per solver and a column per number of network evaluations (NFE): value ± standard deviation, and the grid's
name. Solvers are ranked by their distance to the exact solution where there is one; the distance to the data has few-step models
and priors of other weights below solvers, then the limits (floor, ceiling, exact); no solver below the exact row is better than
it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from midway.gen.evaluation.comparing import (
    Difference,
    above_exact,
    above_floor,
    baselines_of,
    by_solver,
    critical_t,
    differences,
    distance_name,
    feature_names,
    is_kid,
    limit_of,
    limits_of,
    own_weights,
    question,
    shown,
    training_costs,
)
from midway.gen.evaluation.records import (
    CEILING,
    EXACT,
    FEW_STEP,
    FLOOR,
    LIMIT,
    PRIOR,
    SOLVER,
    TO_EXACT,
    Measurement,
)
from midway.gen.report.table import (
    Column,
    Entry,
    Line,
    Table,
    budget_table,
    columns_table,
    decimals_for,
    number,
    with_floor,
)

Measurements = Sequence[Measurement]


def metric(name: str, head: str) -> Column[Measurement]:
    """The column of a metric in "All figures"."""
    return Column(head, lambda m: m.value(name))


def _seconds(
    head: str, seconds: Callable[[Measurement], float], std: Callable[[Measurement], float | None] = lambda _: None
) -> Column[Measurement]:
    """Of 1000 images, with the deviation over blocks where it is known."""

    def value(m: Measurement) -> tuple[float, float | None] | None:
        error = std(m)
        return None if m.solver in (FLOOR, CEILING) else (1000 * seconds(m) / m.n, error and 1000 * error / m.n)

    return Column(head, value, lambda both: number(*both))


METRIC_COLUMNS = [
    metric("distance", "distance"),
    metric(TO_EXACT, "to exact"),
    metric("rmse", "RMSE"),
    metric("psnr", "PSNR (dB)"),
    metric("kid", "KID"),
    metric("sliced", "sliced W2"),
    metric("precision", "precision"),
    metric("recall", "recall"),
    metric("density", "density"),
    metric("coverage", "coverage"),
    metric("inception_score", "inception score"),
    metric("fd_infinity", "distance at n = ∞"),
]
_NFE = Column[Measurement]("NFE", lambda m: m.nfe or None, str)
_TOKENS = Column[Measurement]("token-evaluations", lambda m: m.token_evaluations or None, lambda v: f"{v:,}")
_HEAD = Column[Measurement]("head NFE a token", lambda m: m.head_nfe or None, lambda v: f"{v:g}")
_FLOPS = Column[Measurement]("MFLOP", lambda m: m.flops / 1e6 or None)
_TIMES = (
    _seconds("solver s", lambda m: m.seconds, lambda m: m.seconds_std),
    _seconds("decode s", lambda m: m.decode_seconds),
    _seconds("features s", lambda m: m.feature_seconds),
)

# ---- tables ----


def metric_table(ms: Measurements, name: str, title: str, note: str, ranks: bool = True) -> Table:
    """The shown measurements by one metric, the limits last; no lines if none was measured.

    ranks: mark the least of each NFE, and what is tied with it.
    """
    values = {key: value for key, m in shown(ms).items() if (value := m.value(name)) is not None}
    least = {
        nfe: min((v for (_, n), v in values.items() if n == nfe and math.isfinite(v)), default=None)
        for _, nfe in values
    }
    chosen, paired = shown(ms), differences(ms, name) if ranks else {}
    tied = {key for key, difference in paired.items() if not difference.significant}
    entries = {
        key: Entry(
            number(value, chosen[key].std(name)), chosen[key].place, ranks and value == least[key[1]], key in tied
        )
        for key, value in values.items()
    }
    small = {solver: f"trained, {cost:,} evaluations" for solver, cost in training_costs(ms).items()}
    return _with_limits(budget_table(title, note, entries, small), ms, name)


def _with_limits(table: Table, ms: Measurements, name: str) -> Table:
    """The table with the limits by this metric as its last lines."""
    for title, limit in limits_of(ms).items() if table.lines else ():
        value = limit.value(name)
        if value is not None:
            table = with_floor(table, title, [Entry(number(value, limit.std(name)))] * len(table.heads[1:]))
    return table


def distance_table(ms: Measurements) -> Table:
    """Fréchet distance to the data by NFE; it ranks where there is no exact solution, and models beside solvers."""
    title, ranks = f"{distance_name(ms)} ({feature_names(ms)})", question(ms) == "distance"
    nearest, exact = ranks or bool(own_weights(ms)), limit_of(ms, EXACT)
    table = metric_table(ms, "distance", title, "lower is better", nearest)
    if not ranks and exact is not None and any(above_exact(m, exact) for m in shown(by_solver(ms)).values()):
        note = f"lower is better; {AS_EXACT}: not significantly above the exact solution"
        table = _marked(replace(table, note=note), ms, exact)
    return grouped(table, ms)


AS_EXACT = "≈ exact"


def _marked(table: Table, ms: Measurements, exact: Measurement) -> Table:
    """The table with `AS_EXACT` in the small print where the solver's error is lost in that of the model."""
    budgets, chosen = [int(head.removeprefix("NFE ")) for head in table.heads[1:]], shown(by_solver(ms))

    def entry(solver: str, nfe: int, found: Entry | None) -> Entry | None:
        difference = above_exact(chosen[solver, nfe], exact) if (solver, nfe) in chosen else None
        if found is None or difference is None or difference.significant:
            return found
        return replace(found, small=", ".join(filter(None, (found.small, AS_EXACT))))

    lines = (
        line
        if line.floor
        else replace(
            line, entries=tuple(entry(line.name, nfe, e) for nfe, e in zip(budgets, line.entries, strict=True))
        )
        for line in table.lines
    )
    return replace(table, lines=tuple(lines))


GROUPS = {
    SOLVER: "solvers",
    FEW_STEP: "few-step models, each on weights of its own",
    PRIOR: "priors over codes, each on weights of its own",
    LIMIT: "limits",
}
"""Headings of a table, in this order; that of solvers has their model, and what its training took."""


def grouped(table: Table, ms: Measurements) -> Table:
    """Its lines under headings, models of own weights after solvers, with what their training took; as it is without such."""
    models = {m.solver: m for m in own_weights(ms)}
    if not any(line.name in models for line in table.lines):
        return table
    its = next((m for m in by_solver(ms) if m.model), None)
    whose = "" if its is None else f", all on the weights of {its.model}{_took(its, ': ')}"
    headings = {**GROUPS, SOLVER: f"{GROUPS[SOLVER]}{whose}"}
    order = [*headings.values()]

    def line(its: Line) -> Line:
        m = models.get(its.name)
        small = its.small if m is None else ", ".join(filter(None, (f"{m.sampler}{_took(m, ', ')}", m.guided)))
        return replace(its, group=headings[LIMIT if its.floor else SOLVER if m is None else m.kind], small=small)

    return replace(table, lines=tuple(sorted(map(line, table.lines), key=lambda its: order.index(its.group))))


def _took(m: Measurement, before: str) -> str:
    """Images and evaluations of the training of its model, where they are known; of a prior one is the other."""
    if m.kind == PRIOR and m.training_images == m.model_nfe:
        return f"{before}{m.training_images:,} images of training" if m.training_images else ""
    return f"{before}{m.training_images:,} images, {m.model_nfe:,} evaluations of training" if m.training_images else ""


def error_table(ms: Measurements) -> Table:
    """Fréchet distance to the exact solution by NFE; no lines without one."""
    note = (
        "Between the images of a solver and those of the exact solution of the same seeds, block by block: the solver's error "
        "alone, as these features see it. It is 0 at convergence, whatever the model."
    )
    return metric_table(ms, TO_EXACT, f"{distance_name(ms)} to the exact solution ({feature_names(ms)})", note)


def rmse_table(ms: Measurements) -> Table:
    """The solver's own error by NFE, seed by seed."""
    note = (
        "Root-mean-square difference from the same seeds' exact solution: it measures the solver alone, whatever the model. "
        "Solvers that draw noise on the way converge to other samples by design."
    )
    return metric_table(ms, "rmse", "Error of the solver, seed by seed (RMSE)", note)


def further_tables(ms: Measurements) -> list[Table]:
    """Other distances to the data by NFE: of the same features, and of further feature spaces. They rank nothing."""
    less = ", less that of the floor (results.csv has the values as measured)" if limit_of(ms, FLOOR) else ""
    kid = f"KID of the same features{less}: unbiased in the number of images, where the Fréchet distance is not."
    sliced = "Sliced 2-Wasserstein distance of the same features: it sees more than means and covariances."
    titles = {"kid": ("Kernel distance", kid), "sliced": ("Sliced Wasserstein distance", sliced)}
    for space, features in {space: name for m in ms for space, name in m.spaces.items()}.items():
        distance = f"{distance_name(ms, features)} ({features})"
        second = "A second look at the same images: what one feature space alone supports is not a conclusion."
        titles[f"{space}_distance"] = (distance, second)
        titles[f"{space}_{TO_EXACT}"] = (f"{distance} to the exact solution", error_table(ms).note)
    reduced = above_floor(ms)
    models = bool(own_weights(ms))
    return [
        grouped(
            metric_table(its := reduced if is_kid(name) else ms, name, *text, models or name.endswith(TO_EXACT)), its
        )
        for name, text in titles.items()
    ]


def difference_table(ms: Measurements) -> Table:
    """How far each solver lies above the best of its NFE, by the metric that ranks solvers; no lines below two blocks."""
    found, name = differences(ms), question(ms)
    blocks = max((len(m.values(name)) for m in shown(ms).values()), default=0)
    what = "trainings" if any(m.trainings > 1 for m in ms) else "blocks of the same seeds"
    whose = "distance to the exact solution" if name == TO_EXACT else "distance to the data"
    note = (
        f"Mean difference of the {whose}, and standard error, over {blocks} {what}: all solvers use the same seeds, so paired "
        f"differences have smaller errors. '≈' marks differences that are not statistically significant, below "
        f"{critical_t(blocks):.3g} errors (Student's t, 95 %). The best was chosen among all of its column, which favours it; "
        "more --blocks give smaller errors."
    )
    return budget_table("Difference from the best", note, {key: _difference(one) for key, one in found.items()})


def _difference(found: Difference) -> Entry:
    if found.best:
        return Entry("best", found.grid, True, True)
    decimals = decimals_for(found.error, 2)  # more digits than the error has carry no information
    sign = "" if found.significant else "≈ "
    return Entry(
        f"{sign}+{found.mean:.{decimals}f} ± {found.error:.{decimals}f}", found.grid, tied=not found.significant
    )


def all_figures(ms: Measurements) -> Table:
    """Every metric of the shown measurements, baselines and the limits, and seconds for 1000 images."""
    limits = limits_of(ms)
    rows = [*sorted(shown(ms).values(), key=lambda m: m.nfe), *baselines_of(ms), *limits.values()]
    names = [*(m.solver for m in rows[: len(rows) - len(limits)]), *limits]
    further = dict.fromkeys(name for m in ms for name in m.metrics if name.startswith(tuple(f"{s}_" for s in m.spaces)))
    less = "KID is less that of the floor. " if any("kid" in m.metrics for m in rows) and limit_of(ms, FLOOR) else ""
    rows = above_floor(rows)
    note = (
        f"{less}Seconds are for 1000 images, MFLOP (10^6 floating-point operations of products, before decoding) for one. "
        "Precision, recall, density, coverage, PSNR and the inception score are better when larger, the others when smaller."
    )
    columns = (
        _NFE,
        _TOKENS,
        _HEAD,
        *METRIC_COLUMNS,
        *(metric(name, name.replace("_", " ")) for name in further),
        _FLOPS,
        *_TIMES,
    )
    return columns_table("All figures and where the time went", note, "solver", names, rows, columns)
