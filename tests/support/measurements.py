"""Measurements of a sweep from flat values, named as the columns of results.csv."""

from typing import Any

from midway.gen.evaluation.records import Measurement, from_record, to_records


def measurement(
    solver: str = "euler",
    grid: str = "uniform",
    nfe: int = 4,
    distance: float = 2.0,
    distance_std: float | None = 0.1,
    rmse: float | None = None,
    n: int = 100,
    blocks: int = 2,
    seconds: float = 1.0,
    features: str = "cnn-digits@1",
    reference: str = "digits@1",
    seeds: str = "0-199",
    **more: Any,
) -> Measurement:
    """A measurement with these columns."""
    return from_record({name: value for name, value in (locals() | more).items() if name != "more"})


def changed(m: Measurement, **columns: Any) -> Measurement:
    """The measurement with other columns."""
    return from_record(to_records([m])[0] | columns)
