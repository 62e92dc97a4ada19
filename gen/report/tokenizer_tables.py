"""What the report of tokenizers says, before it is text, Markdown or HTML: tables with their notes, and the provenance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from midway.gen.evaluation.records import Entry, ReportContext, number
from midway.gen.evaluation.tokenizer_records import TokenizerRow

Better = Literal["low", "high", "neither"]


@dataclass(frozen=True)
class Column:
    """One figure: how it is headed, found in a row and written, and which direction is better; `small` print below it."""

    head: str
    value: Callable[[TokenizerRow], float | None]
    write: Callable[[float], str] = number
    better: Better = "neither"
    small: Callable[[TokenizerRow], str] = lambda _: ""


@dataclass(frozen=True)
class Table:
    """A title, what to know of it, headings, and per tokenizer one entry, or None, for each of them; the floor if it has one."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[TokenizerRow, tuple[Entry | None, ...]], ...]
    floor: tuple[str, ...] = ()


def tables(rows: Sequence[TokenizerRow]) -> list[Table]:
    """All tables; columns that no tokenizer has are left out, and tables without columns."""
    made = [
        _table(title, note, [c for c in columns if any(c.value(row) is not None for row in rows)], rows)
        for title, note, columns in (
            ("Reconstruction", _reconstruction_note(rows), _RECONSTRUCTION),
            ("Codes and latents", _CODES_NOTE, _CODES),
            ("Noise on the latents", _NOISE_NOTE, _noise_columns(rows)),
            ("Cost", "Seconds are for 1000 images on the machine named below, in batches.", _COST),
        )
    ]
    return [table for table in made if table.heads]


def _table(title: str, note: str, columns: Sequence[Column], rows: Sequence[TokenizerRow]) -> Table:
    entries = [_entries(column, rows) for column in columns]
    by_row = tuple(zip(rows, zip(*entries, strict=True) if entries else [()] * len(rows), strict=True))
    floors = {row.floor for row in rows} if any(c.head in _DISTANCES for c in columns) else set()
    floor = number(next(iter(floors))) if len(floors) == 1 and None not in floors else ""  # pyright: ignore[reportArgumentType]
    foot = tuple(floor if c.head in _DISTANCES else "" for c in columns) if floor else ()
    return Table(title, note, tuple(c.head for c in columns), by_row, foot)


def _entries(column: Column, rows: Sequence[TokenizerRow]) -> list[Entry | None]:
    """One column; all that are written like the best are best."""
    values = [column.value(row) for row in rows]
    there = [v for v in values if v is not None and math.isfinite(v)]
    best = None
    if column.better != "neither" and len(there) > 1:
        best = column.write(min(there) if column.better == "low" else max(there))
    return [
        None if value is None else Entry(text := column.write(value), column.small(row), text == best)
        for value, row in zip(values, rows, strict=True)
    ]


def _fixed(decimals: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{decimals}f}"


def _whole(value: float) -> str:
    """`64,000`, and powers beyond a billion as such."""
    return f"{int(value):,}" if value < 1e9 else f"2^{math.log2(value):.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def _groups(row: TokenizerRow) -> str:
    return f"{row.groups} a position" if row.groups > 1 else ""


def _of_tokens(row: TokenizerRow) -> str:
    return "" if row.counted is None else f"of {row.counted:,} tokens"


def _of_draws(row: TokenizerRow) -> str:
    return "" if row.psnr_sampled is None else f"{row.psnr_sampled:.2f} of draws"


def _unsnapped(row: TokenizerRow, index: int) -> str:
    return "" if row.psnr_snapped is None else f"{row.psnr_noisy[index]:.2f} not snapped"


def _noise_columns(rows: Sequence[TokenizerRow]) -> list[Column]:
    def column(index: int, sigma: float) -> Column:
        return Column(
            f"sigma {sigma:g}",
            lambda row: (row.psnr_snapped or row.psnr_noisy)[index],
            _fixed(2),
            "high",
            lambda row: _unsnapped(row, index),
        )

    return [column(index, sigma) for index, sigma in enumerate(rows[0].noise)] if rows else []


_RECONSTRUCTION = (
    Column("bits per image", lambda row: row.bits if row.bits is not None else row.rate, number),
    Column("PSNR, dB", lambda row: row.psnr, _fixed(2), "high", _of_draws),
    Column("SSIM", lambda row: row.ssim, _fixed(4), "high"),
    Column("LPIPS", lambda row: row.lpips, _fixed(4), "low"),
    Column("distance", lambda row: row.distance, number, "low"),
    Column("interpolated", lambda row: row.interpolated, number, "low"),
)
_DISTANCES = ("distance", "interpolated")
_CODES = (
    Column("codebook", lambda row: row.codebook, _whole, small=_groups),
    Column("tokens", lambda row: row.tokens, _whole, small=lambda row: row.latent_shape),
    Column("usage", lambda row: row.usage, _percent, "high"),
    Column("dead codes", lambda row: row.dead, _whole, small=_of_tokens),
    Column("perplexity", lambda row: row.perplexity, number),
    Column("entropy, bits", lambda row: row.entropy_bits, number),
    Column("code rank", lambda row: row.code_rank, _fixed(2), small=lambda row: _stable(row.code_stable_rank)),
    Column("latent rank", lambda row: row.latent_rank, _fixed(2), small=lambda row: _stable(row.latent_stable_rank)),
)
_COST = (
    Column("parameters", lambda row: row.parameters, _whole, "low"),
    Column("encoding, s", lambda row: row.encode_seconds, number, "low"),
    Column("decoding, s", lambda row: row.decode_seconds, number, "low"),
)


TERSE = ("codebook", "usage", "perplexity", "entropy, bits", "code rank", "latent rank")
"""What of the codes a terminal has room for."""


def _stable(rank: float | None) -> str:
    return "" if rank is None else f"{rank:.2f} stable"


def _reconstruction_note(rows: Sequence[TokenizerRow]) -> str:
    features = _joined(row.features for row in rows)
    distances = (
        f" Distance: Fréchet distance ({features}) of the reconstructions to all training images; interpolated: of latents "
        "half-way to their nearest neighbour, which says more about a latent model's samples (iFID). The floor: the same "
        "held-out images themselves."
        if features
        else ""
    )
    return (
        "PSNR is the mean over images; bits of a continuous tokenizer are the rate of its posterior. "
        f"Higher is better for PSNR and SSIM, lower for LPIPS and distances.{distances}"
    )


_CODES_NOTE = (
    "Usage: share of the codebook seen at least once. Perplexity: how many equally used codes would say as much. Entropy: what "
    "an image's tokens cost an entropy coder without context. Rank: effective rank of the codes as used and of the latents, at "
    "most their channels."
)
_NOISE_NOTE = (
    "PSNR when Gaussian noise of this many standard deviations of each channel is added to the latents, decoded as samples are. "
    "Few solver steps leave such noise; what a tokenizer forgives here, a latent model need not get right."
)


def _joined(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def provenance(rows: Sequence[TokenizerRow], context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of all that is needed to repeat the measurement."""
    facts = [
        *((row.name, f"{row.quantizer}; tokenizer@{row.tokenizer}") for row in rows),
        ("data", context.data),
        ("images", f"{_joined(row.n for row in rows)} of {_joined(row.images for row in rows)}"),
        ("features", _joined(row.features for row in rows)),
        ("reference", _joined(row.reference for row in rows)),
        ("perceptual distance", _joined(row.perceptual for row in rows)),
        ("seed", context.seeds),
        ("hardware", context.hardware),
        ("versions", ", ".join(f"{name} {version}" for name, version in context.versions.items())),
        ("command", context.command),
    ]
    return [(name, value) for name, value in facts if value]
