"""What the parts and blocks of a cell cost, and the figures of a block, as the store holds them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Of a whole cell: sampling, decoding and features."""

    solver: float
    decode: float
    features: float


@dataclass(frozen=True)
class FineCosts:
    """Of a part of the fine solution."""

    nfe: float
    seconds: float


@dataclass(frozen=True)
class SampleCosts:
    """Of a part of samples: evaluations of one, seconds of all and what these depend on, tokens through the network of one, and
    evaluations of a head for a token."""

    nfe: float
    solver: float
    decode: float
    features: float
    timing: str
    token_evaluations: float = 0.0
    head_nfe: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Of a block, with one entry of `nfe`, `timing`, `token_evaluations` and `head_nfe` for each of its parts.

    No distance and metrics of what diverged.
    """

    distance: float | None
    metrics: dict[str, float]
    nonfinite: int
    nfe: tuple[float, ...]
    seconds: Seconds
    timing: tuple[str, ...]
    token_evaluations: tuple[float, ...] = ()
    head_nfe: tuple[float, ...] = ()
