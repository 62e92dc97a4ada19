"""The result of a step-budget sweep: one `Cell` per (solver, grid, budget), its files and its tables.

A table shows, for each solver (row) and number of network evaluations NFE (column), the cell whose grid did best in that
measure: value ± standard deviation over seed blocks, and that grid's name. The floor row is the same distance between two sets
of real images, so a perfect sampler ends near it. csv and jsonl hold every cell.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from scipy.special import stdtrit

from midway.gen.core.files import write_atomically
from midway.samplers.gits import GITS

FLOOR = "floor"
ABSENT = "–"
FID = "inception-v3-2015-12-05@6726825d"
"""How the name of the features begins under which a distance is FID."""
Measure = Literal["distance", "rmse", "kid"]
MEASURES = {
    "rmse": "RMSE",
    "psnr": "PSNR (dB)",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "inception score",
    "fd_infinity": "distance at n = ∞",
}
"""Fields of a cell that may be missing, beside the distance, and what they are called."""


@dataclass(frozen=True)
class Cell:
    """One measurement: `n` images by `solver` on `grid` with `nfe` evaluations each; lower is better.

    `distance_std` over `blocks` blocks of seeds; `rmse` to the same seeds' reference solution; `seconds` of sampling
    for all n images; `training_nfe` evaluations spent to train the solver; `best` marks the best grid of (solver, nfe).
    `distances` of each block, all of the same seeds for every cell; `decode_seconds` and `feature_seconds` come on top of
    `seconds`; `psnr` in dB of images to those of the reference solution. The rest are what cell_metrics.py says, means over
    blocks; `nonfinite` counts samples that are not. A `baseline` is a model of its own, at its own cost. The floor is a cell
    with solver "floor", grid "" and nfe 0.
    """

    solver: str
    grid: str
    nfe: int
    distance: float
    distance_std: float | None
    rmse: float | None
    n: int
    blocks: int
    seconds: float
    features: str
    reference: str
    seeds: str
    training_nfe: int = 0
    best: bool = True
    baseline: bool = False
    distances: tuple[float, ...] = ()
    decode_seconds: float = 0.0
    feature_seconds: float = 0.0
    psnr: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    fd_infinity: float | None = None
    nonfinite: int = 0
    trainings: int = 1
    """Of several, `distances` are those of each, and deviations are among them."""
    record: str = ""
    """cells/<record>.json says all that the cell was made from; of several trainings one name each."""

    timing: str = ""
    """What its seconds depend on: machine, processes, batches."""

    @property
    def image_seconds(self) -> float:
        """Seconds to make n images: sampling and decoding."""
        return self.seconds + self.decode_seconds


@dataclass(frozen=True)
class ReportContext:
    """What a reader needs to trust and repeat the sweep; all text is shown as given."""

    title: str
    model: str
    data: str
    command: str
    hardware: str
    versions: dict[str, str]
    seeds: str
    notes: tuple[str, ...] = ()
    guidance: float = 1.0


@dataclass(frozen=True)
class Entry:
    """One place of a table: "3.21 ± 0.12", the grid's name, and whether it is the lowest of its column.

    `near`: too near to the lowest to tell which is lower.
    """

    value: str
    grid: str
    best: bool
    near: bool = False


@dataclass(frozen=True)
class Pivot:
    """Columns `nfes`, and per solver (in order of first appearance) one entry, or None, for each of them."""

    nfes: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]


def floor_of(cells: Sequence[Cell]) -> Cell | None:
    """The floor's cell, if it was measured."""
    return next((cell for cell in cells if cell.solver == FLOOR), None)


def floor_name(cells: Sequence[Cell]) -> str:
    """`floor`, with its image count where that is not the cells'."""
    floor = floor_of(cells)
    others = {cell.n for cell in cells if cell is not floor}
    return FLOOR if floor is None or not others - {floor.n} else f"{FLOOR} (n = {floor.n})"


def mark_best(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with `best` where the grid is the one of least distance of its (solver, NFE)."""
    best: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        key = (cell.solver, cell.nfe)
        if key not in best or cell.distance < best[key].distance:
            best[key] = cell
    return [replace(cell, best=cell is best[cell.solver, cell.nfe]) for cell in cells]


def baselines_of(cells: Sequence[Cell]) -> list[Cell]:
    """The baselines, lowest distance first."""
    return sorted((cell for cell in cells if cell.baseline), key=_rank)


def _by_solver(cells: Sequence[Cell]) -> list[Cell]:
    """Without the floor and baselines."""
    return [cell for cell in cells if cell.solver != FLOOR and not cell.baseline]


def check_comparable(cells: Sequence[Cell]) -> None:
    """ValueError for cells that must not share a table: of other image counts, features or references than the rest.

    The floor may have another count where fewer images are held out: `floor_name` then says so.
    """
    kinds = {(cell.n, cell.features, cell.reference) for cell in cells if cell.solver != FLOOR}
    if len(kinds) > 1:
        listed = "; ".join(f"n = {n}, {features}, against {reference}" for n, features, reference in sorted(kinds))
        raise ValueError(
            f"these distances do not compare: {listed}. A distance falls with the number of images and belongs to its "
            "features and reference: measure all cells alike"
        )


def shown(cells: Sequence[Cell]) -> dict[tuple[str, int], Cell]:
    """The best cell of each (solver, nfe) without the floor; of several so marked, the one of least distance."""
    chosen: dict[tuple[str, int], Cell] = {}
    for cell in _by_solver(cells):
        key = (cell.solver, cell.nfe)
        if cell.best and (key not in chosen or _rank(cell) < _rank(chosen[key])):
            chosen[key] = cell
    return chosen


def _least_rmse(cells: Sequence[Cell]) -> dict[tuple[str, int], Cell]:
    """The cell of least RMSE of each (solver, nfe): the solver's error has its own best grid."""
    chosen: dict[tuple[str, int], Cell] = {}
    for cell in _by_solver(cells):
        key = (cell.solver, cell.nfe)
        if cell.rmse is not None:
            rival = chosen.get(key)
            if rival is None or rival.rmse is None or cell.rmse < rival.rmse or not math.isfinite(rival.rmse):
                chosen[key] = cell
    return chosen


def _rank(cell: Cell) -> float:
    """The distance, infinite where it is not a number."""
    return cell.distance if math.isfinite(cell.distance) else math.inf


def solvers_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Names in order of first appearance, without the floor and baselines."""
    return tuple(dict.fromkeys(cell.solver for cell in _by_solver(cells)))


def feature_names(cells: Sequence[Cell]) -> str:
    """The feature networks that measured the cells; normally one."""
    return ", ".join(dict.fromkeys(cell.features for cell in cells))


def distance_name(cells: Sequence[Cell]) -> str:
    """What the distance is called: FID of the published Inception network alone, else Fréchet distance."""
    names = {cell.features for cell in cells}
    return "FID" if names and all(name.startswith(FID) for name in names) else "Fréchet distance"


def measure_name(cells: Sequence[Cell]) -> str:
    """The distance with its features."""
    return f"{distance_name(cells)} ({feature_names(cells)})"


def number(value: float, std: float | None = None) -> str:
    """Three significant digits without an exponent, `± std` to the same decimals (more if std would read 0)."""
    if not math.isfinite(value):
        return "diverged"
    decimals = _decimals(value, 3)
    if std is None or not math.isfinite(std):
        return f"{value:.{decimals}f}"
    decimals = max(decimals, _decimals(std, 1)) if std > 0 else decimals
    return f"{value:.{decimals}f} ± {std:.{decimals}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of `value`; at most 6, so that 1e-12 reads as 0."""
    if value == 0:
        return digits - 1
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 6)


def measured(cell: Cell, measure: Measure) -> float | None:
    """The cell's distance, rmse or kid."""
    return {"distance": cell.distance, "rmse": cell.rmse, "kid": cell.kid}[measure]


def deviation(cell: Cell, measure: Measure) -> float | None:
    """Its standard deviation over blocks, of what has one."""
    return {"distance": cell.distance_std, "rmse": None, "kid": cell.kid_std}[measure]


def _lowest(column: Sequence[Cell], measure: Measure) -> float:
    values = [value for cell in column if (value := measured(cell, measure)) is not None and math.isfinite(value)]
    return min(values, default=math.nan)


def _entry(cell: Cell | None, measure: Measure, lowest: float) -> Entry | None:
    value = None if cell is None else measured(cell, measure)
    if cell is None or value is None:
        return None
    return Entry(number(value, deviation(cell, measure)), cell.grid, value == lowest)


def pivot(cells: Sequence[Cell], measure: Measure) -> Pivot:
    """The table of one measure; solvers without any value are left out."""
    chosen = _least_rmse(cells) if measure == "rmse" else shown(cells)
    chosen = {key: cell for key, cell in chosen.items() if measured(cell, measure) is not None}
    nfes = tuple(sorted({nfe for _, nfe in chosen}))
    lowest = {nfe: _lowest([cell for (_, n), cell in chosen.items() if n == nfe], measure) for nfe in nfes}
    rows = (
        (solver, tuple(_entry(chosen.get((solver, nfe)), measure, lowest[nfe]) for nfe in nfes))
        for solver in solvers_of(list(chosen.values()))
    )
    return Pivot(nfes, tuple(rows))


def paired(cells: Sequence[Cell]) -> Pivot:
    """How far each shown cell's distance lies above the best of its NFE: mean ± standard error of the differences of blocks.

    Blocks of the same seeds share their luck, so a difference is surer than either distance. None below two blocks. `near` are
    those below `decisive` errors.
    """
    chosen = {key: cell for key, cell in shown(cells).items() if len(cell.distances) > 1 and _rank(cell) < math.inf}
    nfes = tuple(sorted({nfe for _, nfe in chosen}))
    best = {nfe: min((cell for (_, n), cell in chosen.items() if n == nfe), key=_rank) for nfe in nfes}
    rows = (
        (solver, tuple(_difference(chosen.get((solver, nfe)), best[nfe]) for nfe in nfes))
        for solver in solvers_of(list(chosen.values()))
    )
    return Pivot(nfes, tuple(rows))


def rivals(cells: Sequence[Cell]) -> dict[int, int]:
    """By NFE, how many solvers are too near to the best to tell."""
    table = paired(cells)
    return {
        nfe: sum(1 for _, row in table.rows if (entry := row[column]) is not None and entry.near)
        for column, nfe in enumerate(table.nfes)
    }


def _difference(cell: Cell | None, best: Cell) -> Entry | None:
    if cell is None:
        return None
    if cell is best:
        return Entry("best", cell.grid, True)
    values = [a - b for a, b in zip(cell.distances, best.distances, strict=True)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    near = not mean > decisive(len(values)) * error
    decimals = _decimals(error, 2)  # more digits than the error has say nothing
    return Entry(f"{'≈ ' if near else ''}+{mean:.{decimals}f} ± {error:.{decimals}f}", cell.grid, False, near)


def decisive(blocks: int) -> float:
    """Standard errors beyond which a mean difference of so many blocks is not chance: Student's t, two-sided 95 %."""
    return float(stdtrit(blocks - 1, 0.975))


def difference_note(cells: Sequence[Cell]) -> str:
    """How to read `paired`."""
    blocks = max((len(cell.distances) for cell in shown(cells).values()), default=0)
    what = "trainings" if any(cell.trainings > 1 for cell in cells) else "blocks of the same seeds"
    return (
        f"Mean difference and standard error over {blocks} {what}, which share their luck, so that a difference is surer than "
        f"either distance. ≈: too near to tell, less than {decisive(blocks):.3g} errors (Student's t, 95 %). The best was chosen "
        "among all of its column, which favours it; more --blocks tell more."
    )


BASELINE_HEADS = ("baseline", "NFE", "distance", "s / 1000 images")


def baseline_rows(cells: Sequence[Cell]) -> list[tuple[str, str, str, str]]:
    """Under `BASELINE_HEADS`: name, its own NFE, distance ± std, seconds; none without baselines.

    Images that somebody else made cost an unknown number of evaluations, and are cells of 0.
    """
    return [
        (
            cell.solver,
            str(cell.nfe) if cell.nfe else ABSENT,
            number(cell.distance, cell.distance_std),
            number(1000 * cell.image_seconds / cell.n) if cell.nfe else ABSENT,
        )
        for cell in baselines_of(cells)
    ]


def measure_rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Heads, and a row for each shown cell, baseline and the floor: all that was measured, and where the time went.

    Times are seconds for 1000 images: of the solver, of decoding, of the features. Figures that no cell has are left out.
    """
    floor = floor_of(cells)
    rows = [
        *sorted(shown(cells).values(), key=lambda cell: cell.nfe),
        *baselines_of(cells),
        *([floor] if floor else []),
    ]
    present = [name for name in MEASURES if any(getattr(cell, name) is not None for cell in rows)]
    heads = ("solver", "NFE", *(MEASURES[name] for name in present), "solver s", "decode s", "features s")
    return [heads, *(_measure_row(cell, present, cells) for cell in rows)]


def _measure_row(cell: Cell, present: Sequence[str], cells: Sequence[Cell]) -> tuple[str, ...]:
    values = [getattr(cell, name) for name in present]
    times = (cell.seconds, cell.decode_seconds, cell.feature_seconds)
    return (
        floor_name(cells) if cell.solver == FLOOR else cell.solver,
        str(cell.nfe) if cell.nfe else ABSENT,
        *(ABSENT if value is None else number(value) for value in values),
        *(number(1000 * seconds / cell.n) if cell.solver != FLOOR else ABSENT for seconds in times),
    )


def training_costs(cells: Sequence[Cell]) -> dict[str, int]:
    """Network evaluations spent to train each learned solver: the largest over its shown cells."""
    costs: dict[str, int] = {}
    for (solver, _), cell in shown(cells).items():
        if cell.training_nfe and cell.grid != GITS:  # there the grid was fitted, not the solver
            costs[solver] = max(costs.get(solver, 0), cell.training_nfe)
    return costs


def _csv_value(value: str | float | bool | tuple[float, ...] | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def write_csv(path: Path, cells: Sequence[Cell]) -> None:
    """Every cell, one row each, floats in full precision; None is empty, `best` is true or false. DiskError."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Cell)])
    writer.writerows([_csv_value(value) for value in dataclasses.astuple(cell)] for cell in cells)
    write_atomically(path, buffer.getvalue().encode())


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, cells: Sequence[Cell]) -> None:
    """Every cell, one JSON object a line; a number that is not finite becomes null, which JSON requires. DiskError."""
    records = ({key: _json_value(value) for key, value in dataclasses.asdict(cell).items()} for cell in cells)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_atomically(path, "".join(lines).encode())
