"""The report of tokenizers: results.csv, results.jsonl, report.md, three plots and one self-contained report.html.

A ranking at equal rate, then four tables, a line per tokenizer: reconstruction, codes and latents, noise on the latents, cost.
The best of a column is bold where one direction is better. The directory is written whole or not at all.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from midway.gen.core.errors import DiskError, UsageError, remedy
from midway.gen.core.files import replacing, write_atomically
from midway.gen.core.locks import check_no_link
from midway.gen.core.text import markdown, printable
from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.records import FLOOR
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.report.html import Block, Page, Picture, facts_block, html_page, notes_block, table_block
from midway.gen.report.rates import answer, rate_table
from midway.gen.report.table import Column, Entry, ReportContext, Table, columns_table, joined, number, with_floor
from midway.gen.report.text import csv_text, jsonl_text, markdown_page, markdown_section, text_table, under_warnings
from midway.gen.report.tokenizer_plots import drawings

_STRIP = 1280  # pixels: large images are shown fewer, or the page would be slow to open
PLOTS = ("rate_distortion.png", "codebook_usage.png", "noise.png")
FILES = ("results.csv", "results.jsonl", "report.md", "report.html", *PLOTS)

# ---- columns ----


def _fixed(decimals: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{decimals}f}"


def _whole(value: float) -> str:
    """`64,000`, and powers beyond a billion as such."""
    return f"{int(value):,}" if value < 1e9 else f"2^{math.log2(value):.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def _stable(rank: float | None) -> str:
    return "" if rank is None else f"{rank:.2f} stable"


Columns = Sequence[Column[TokenizerRow]]
_DISTANCES = ("distance", "interpolated")
_RECONSTRUCTION: Columns = (
    Column("bits per image", lambda row: row.bits if row.bits is not None else row.rate),
    Column(
        "PSNR, dB",
        lambda row: row.psnr,
        _fixed(2),
        "high",
        lambda row: row.psnr_sampled and f"{row.psnr_sampled:.2f} of draws",
    ),
    Column("SSIM", lambda row: row.ssim, _fixed(4), "high"),
    Column("LPIPS", lambda row: row.lpips, _fixed(4), "low"),
    Column("distance", lambda row: row.distance, better="low"),
    Column("interpolated", lambda row: row.interpolated, better="low"),
)
_CODES: Columns = (
    Column("codebook", lambda row: row.codebook, _whole, small=lambda r: r.groups > 1 and f"{r.groups} a position"),
    Column("tokens", lambda row: row.tokens, _whole, small=lambda row: row.latent_shape),
    Column("usage", lambda row: row.usage, _percent, "high"),
    Column("dead codes", lambda row: row.dead, _whole, small=lambda r: r.counted and f"of {r.counted:,} tokens"),
    Column("perplexity", lambda row: row.perplexity),
    Column("entropy, bits", lambda row: row.entropy_bits),
    Column("code rank", lambda row: row.code_rank, _fixed(2), small=lambda row: _stable(row.code_stable_rank)),
    Column("latent rank", lambda row: row.latent_rank, _fixed(2), small=lambda row: _stable(row.latent_stable_rank)),
)
_COST: Columns = (
    Column("parameters", lambda row: row.parameters, _whole, "low"),
    Column("encoding, s", lambda row: row.encode_seconds, better="low"),
    Column("decoding, s", lambda row: row.decode_seconds, better="low"),
)


def _noise(index: int, sigma: float) -> Column[TokenizerRow]:
    """PSNR at one of the sigmas."""
    return Column(
        f"sigma {sigma:g}",
        lambda row: (row.psnr_snapped or row.psnr_noisy)[index],
        _fixed(2),
        "high",
        lambda row: row.psnr_snapped and f"{row.psnr_noisy[index]:.2f} not snapped",
    )


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


def tables(rows: Sequence[TokenizerRow]) -> list[Table]:
    """All tables; columns without any value are left out, and tables without columns."""
    noise = [_noise(index, sigma) for index, sigma in enumerate(rows[0].noise)] if rows else []
    ranking = rate_table(rows)
    made = (
        *([ranking] if ranking.lines else []),
        _table(rows, "Reconstruction", _RECONSTRUCTION, _reconstruction_note(rows)),
        _table(rows, "Codes and latents", _CODES, _CODES_NOTE),
        _table(rows, "Noise on the latents", noise, _NOISE_NOTE),
        _table(rows, "Cost", _COST, "Seconds are for 1000 images on the machine named below, in batches."),
    )
    return [table for table in made if table.heads[1:]]


def _table(rows: Sequence[TokenizerRow], title: str, columns: Iterable[Column[TokenizerRow]], note: str) -> Table:
    """One table; the floor of the distances is the last line, if all rows have the same."""
    table = columns_table(title, note, "tokenizer", [row.name for row in rows], rows, columns)
    floors = {row.floor for row in rows}
    floor = floors.pop() if len(floors) == 1 else None
    if floor is None or not any(head in _DISTANCES for head in table.heads):
        return table
    return with_floor(table, FLOOR, (Entry(number(floor)) if head in _DISTANCES else None for head in table.heads[1:]))


# ---- text ----


def terminal_text(rows: Sequence[TokenizerRow], warnings: Sequence[str] = ()) -> str:
    """Ranking, reconstruction and codes for a terminal, as far as there is room, between warnings and answer."""
    codes = [column for column in _CODES if column.head not in ("tokens", "dead codes")]
    ranking = [table for table in [rate_table(rows)] if table.lines]
    made = [
        _table(rows, title, [replace(column, small=lambda _: "") for column in columns], "")
        for title, columns in (("Reconstruction", _RECONSTRUCTION), ("Codes and latents", codes))
    ]
    parts = [f"{table.title}\n\n{text_table(table)}" for table in (*ranking, *made)]
    return under_warnings("\n\n".join([*parts, printable(answer(rows))]) + "\n", warnings)


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


def report_md(rows: Sequence[TokenizerRow], context: ReportContext) -> str:
    """The answer, tables, plots by relative name, notes and provenance."""
    plots = [f"![{plot.title}]({plot.name}.png)\n" for plot in drawings([])]
    parts = [f"{markdown(answer(rows))}\n", *map(markdown_section, tables(rows)), *plots]
    return markdown_page(context, parts, provenance(rows, context))


# ---- page ----


def _strip(name: str, small: str, images: Tensor) -> Picture:
    few = images[: max(4, _STRIP // images.shape[-1])]
    return Picture(grid_png(few, columns=len(few)), f"{name}, {small}" if small else name, name, small)


def _strips(results: Sequence[TokenizerResult], originals: Tensor) -> Iterator[Block]:
    """The same images as every tokenizer reconstructs them, then half-way to their neighbours."""
    first = _strip("held-out images", "", originals)
    made = (_strip(m.row.name, f"{m.row.psnr:.2f} dB", m.reconstructions) for m in results)
    yield Block(
        "Reconstructions", "The same held-out images, as every tokenizer reconstructs them.", strips=(first, *made)
    )
    between = [
        _strip(m.row.name, f"distance {number(m.row.interpolated)}", m.interpolations)
        for m in results
        if m.interpolations is not None and m.row.interpolated is not None
    ]
    text = (
        "The latent of each of these images mixed in equal parts with that of its nearest neighbour. Where the result is no "
        "plausible image, a latent model that interpolates between training images is unlikely to make one."
    )
    if between:
        yield Block("Half-way to the nearest neighbour", text, strips=(first, *between), folded=True)


def report_html(results: Sequence[TokenizerResult], originals: Tensor, context: ReportContext) -> str:
    """One self-contained page."""
    rows = [result.row for result in results]
    rate, noise, usage = drawings(results)
    ranking = [table for table in [rate_table(rows)] if table.lines]
    first, *others = tables(rows)[len(ranking) :]
    blocks = [
        *map(table_block, (*ranking, first)),
        *_strips(results, originals),
        Block("Noise and codes", drawings=(noise, usage)),
        *(table_block(table, folded=True) for table in others),
        *([notes_block(context.notes)] if context.notes else []),
        facts_block(provenance(rows, context)),
    ]
    return html_page(Page(context, answer(rows), (), rate, blocks))


# ---- files ----


def flat_record(row: TokenizerRow) -> dict[str, object]:
    """A row of the CSV: a column for each sigma instead of the curves."""
    values = dataclasses.asdict(row)
    for name in ("noise", "psnr_noisy", "psnr_snapped"):
        del values[name]
    snapped = row.psnr_snapped or (None,) * len(row.noise)
    for sigma, noisy, after in zip(row.noise, row.psnr_noisy, snapped, strict=True):
        values |= {f"psnr_noisy_{sigma:g}": noisy, f"psnr_snapped_{sigma:g}": after}
    return values


def check_out(directory: Path) -> None:
    """UsageError if the directory holds anything but an earlier report, which `write_tokenizer_report` replaces, or is a link."""
    check_no_link(directory)
    if directory.exists() and not (directory.is_dir() and _is_report({path.name for path in directory.iterdir()})):
        raise UsageError(f"{directory} holds other files", "a report replaces its directory", "choose another --out")


def _is_report(names: set[str]) -> bool:
    """Whether a directory of these names is empty, or a report, which is always whole."""
    return not names or {*FILES[:4]} <= names <= {*FILES}


def write_tokenizer_report(
    directory: Path, results: Sequence[TokenizerResult], originals: Tensor, context: ReportContext
) -> None:
    """All seven files, replacing an earlier report; `originals` uint8 are the images shown. DiskError, UsageError."""
    check_out(directory)
    rows = [m.row for m in results]
    files = {f"{drawing.name}.png": drawing.png() for drawing in drawings(results)} | {
        "results.csv": csv_text([flat_record(row) for row in rows]).encode(),
        "results.jsonl": jsonl_text([dataclasses.asdict(row) for row in rows]).encode(),
        "report.md": report_md(rows, context).encode(),
        "report.html": report_html(results, originals, context).encode(),
    }
    try:
        with replacing(directory) as new:
            for name, content in files.items():
                write_atomically(new / name, content)
    except OSError as error:
        raise DiskError(f"{directory} cannot be written", str(error), remedy(error, "choose another --out")) from error
