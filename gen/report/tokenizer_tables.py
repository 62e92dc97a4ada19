"""Tables of the tokenizer report: which columns and notes it has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from midway.gen.evaluation.records import FLOOR
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.report.table import Column, Entry, Line, ReportContext, Table, columns_table, joined, number


def tables(rows: Sequence[TokenizerRow]) -> list[Table]:
    """All tables; columns without any value are left out, and tables without columns."""
    made = (
        columns_table(title, note, "tokenizer", [row.name for row in rows], rows, columns)
        for title, note, columns in (
            ("Reconstruction", _reconstruction_note(rows), _RECONSTRUCTION),
            ("Codes and latents", _CODES_NOTE, _CODES),
            ("Noise on the latents", _NOISE_NOTE, _noise_columns(rows)),
            ("Cost", "Seconds are for 1000 images on the machine named below, in batches.", _COST),
        )
    )
    return [_with_floor(table, rows) for table in made if table.heads[1:]]


def _with_floor(table: Table, rows: Sequence[TokenizerRow]) -> Table:
    """The floor of the distances as the last line, if all rows have the same."""
    floors = {row.floor for row in rows}
    floor = floors.pop() if len(floors) == 1 else None
    if floor is None or not any(head in _DISTANCES for head in table.heads):
        return table
    entries = tuple(Entry(number(floor)) if head in _DISTANCES else None for head in table.heads[1:])
    return replace(table, lines=(*table.lines, Line(FLOOR, entries, floor=True)))


def terse(table: Table, heads: Sequence[str] | None = None) -> Table:
    """Some columns, or all, without small print: what fits on a terminal."""
    wanted = [i for i, head in enumerate(table.heads[1:]) if heads is None or head in heads]
    plain = [[replace(e, small="") if (e := line.entries[i]) else None for i in wanted] for line in table.lines]
    lines = tuple(replace(line, entries=tuple(some)) for line, some in zip(table.lines, plain, strict=True))
    return replace(table, heads=(table.heads[0], *(table.heads[i + 1] for i in wanted)), lines=lines)


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


def _noise_columns(rows: Sequence[TokenizerRow]) -> list[Column[TokenizerRow]]:
    def column(index: int, sigma: float) -> Column[TokenizerRow]:
        return Column[TokenizerRow](
            f"sigma {sigma:g}",
            lambda row: (row.psnr_snapped or row.psnr_noisy)[index],
            _fixed(2),
            "high",
            lambda row: _unsnapped(row, index),
        )

    return [column(index, sigma) for index, sigma in enumerate(rows[0].noise)] if rows else []


_RECONSTRUCTION: tuple[Column[TokenizerRow], ...] = (
    Column("bits per image", lambda row: row.bits if row.bits is not None else row.rate, number),
    Column("PSNR, dB", lambda row: row.psnr, _fixed(2), "high", _of_draws),
    Column("SSIM", lambda row: row.ssim, _fixed(4), "high"),
    Column("LPIPS", lambda row: row.lpips, _fixed(4), "low"),
    Column("distance", lambda row: row.distance, number, "low"),
    Column("interpolated", lambda row: row.interpolated, number, "low"),
)
_DISTANCES = ("distance", "interpolated")
_CODES: tuple[Column[TokenizerRow], ...] = (
    Column("codebook", lambda row: row.codebook, _whole, small=_groups),
    Column("tokens", lambda row: row.tokens, _whole, small=lambda row: row.latent_shape),
    Column("usage", lambda row: row.usage, _percent, "high"),
    Column("dead codes", lambda row: row.dead, _whole, small=_of_tokens),
    Column("perplexity", lambda row: row.perplexity, number),
    Column("entropy, bits", lambda row: row.entropy_bits, number),
    Column("code rank", lambda row: row.code_rank, _fixed(2), small=lambda row: _stable(row.code_stable_rank)),
    Column("latent rank", lambda row: row.latent_rank, _fixed(2), small=lambda row: _stable(row.latent_stable_rank)),
)
_COST: tuple[Column[TokenizerRow], ...] = (
    Column("parameters", lambda row: row.parameters, _whole, "low"),
    Column("encoding, s", lambda row: row.encode_seconds, number, "low"),
    Column("decoding, s", lambda row: row.decode_seconds, number, "low"),
)


TERSE = ("codebook", "usage", "perplexity", "entropy, bits", "code rank", "latent rank")
"""What of the codes a terminal has room for."""


def _stable(rank: float | None) -> str:
    return "" if rank is None else f"{rank:.2f} stable"


def _reconstruction_note(rows: Sequence[TokenizerRow]) -> str:
    features = joined(row.features for row in rows)
    distances = (
        f" Distance: Fréchet distance ({features}) of the reconstructions to all training images; interpolated: of latents "
        "half-way to their nearest neighbour, which predicts a latent model's samples better (iFID). The floor: the "
        "same held-out images themselves."
        if features
        else ""
    )
    return (
        "PSNR is the mean over images; bits of a continuous tokenizer are the rate of its posterior. "
        f"Higher is better for PSNR and SSIM, lower for LPIPS and distances.{distances}"
    )


_CODES_NOTE = (
    "Usage: share of the codebook seen at least once. Perplexity: the number of equally used codes of the same entropy. Entropy: "
    "what an image's tokens cost an entropy coder without context. Rank: effective rank of the codes as used and of the latents, "
    "at most their channels."
)
_NOISE_NOTE = (
    "PSNR when Gaussian noise of this many standard deviations of each channel is added to the latents, decoded as samples are. "
    "Few solver steps leave such noise; a latent model need not remove what a tokenizer tolerates here."
)


def provenance(rows: Sequence[TokenizerRow], context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of all that is needed to repeat the measurement."""
    facts = [
        *((row.name, f"{row.quantizer}; tokenizer@{row.tokenizer}") for row in rows),
        ("data", context.data),
        ("images", f"{joined(row.n for row in rows)} of {joined(row.images for row in rows)}"),
        ("features", joined(row.features for row in rows)),
        ("reference", joined(row.reference for row in rows)),
        ("perceptual distance", joined(row.perceptual for row in rows)),
        ("seed", context.seeds),
        ("hardware", context.hardware),
        ("versions", context.version_text),
        ("command", context.command),
    ]
    return [(name, value) for name, value in facts if value]
