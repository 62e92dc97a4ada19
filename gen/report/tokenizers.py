"""The report of tokenizers: results.csv, results.jsonl, report.md, three plots and one self-contained report.html.

Four tables, a line per tokenizer: reconstruction, codes and latents, noise on the latents, cost. The best of a column is bold
where one direction is better. The directory is written whole or not at all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from midway.gen.core.errors import DiskError, UsageError
from midway.gen.core.files import replacing, write_atomically
from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.report.html import facts_list, figure, image_tag, notes_list, page, titled_table
from midway.gen.report.table import ReportContext, number
from midway.gen.report.text import (
    csv_text,
    escape_markdown,
    jsonl_text,
    markdown_facts,
    markdown_notes,
    markdown_table,
    text_table,
)
from midway.gen.report.tokenizer_plots import noise_png, rate_png, usage_png
from midway.gen.report.tokenizer_tables import TERSE, provenance, tables, terse

FILES = (
    "results.csv",
    "results.jsonl",
    "report.md",
    "report.html",
    "codebook_usage.png",
    "rate_distortion.png",
    "noise.png",
)


_STRIP = 1280  # pixels: large images are shown fewer, or the page would be slow to open
PLOTS: Mapping[str, tuple[str, str]] = {
    "rate_distortion.png": (
        "PSNR against bits per image",
        "Upper left is better. Filled: tokens of equal length; the thin line leads to what an entropy coder would spend. "
        "Hollow: a posterior's rate and the PSNR of its draws.",
    ),
    "codebook_usage.png": (
        "Frequency of codes by rank",
        "A codebook used evenly is the dashed line up to 1. Where a line ends, the codes beyond were never used. Codebooks of "
        "more than a million codes are left out.",
    ),
    "noise.png": (
        "PSNR against noise on the latents",
        "Filled markers: snapped to the nearest code before decoding, as samples are; the thin dashed line of the same colour is "
        "without snapping. Hollow: never snapped.",
    ),
}


def terminal_text(rows: Sequence[TokenizerRow]) -> str:
    """Reconstruction and codes for a terminal."""
    first, second = tables(rows)[:2]
    return "\n\n".join(f"{t.title}\n\n{text_table(t)}" for t in (terse(first), terse(second, TERSE))) + "\n"


def markdown_tables(rows: Sequence[TokenizerRow]) -> str:
    """All tables under their headings."""
    return "\n".join(f"## {t.title}\n\n{escape_markdown(t.note)}\n\n{markdown_table(t)}\n" for t in tables(rows))


def report_md(rows: Sequence[TokenizerRow], context: ReportContext) -> str:
    """Tables, plots by relative name, notes and provenance."""
    plots = [f"![{words}]({name})\n" for name, (words, _) in PLOTS.items()]
    parts = [f"# {escape_markdown(context.title)}", "", markdown_tables(rows), *plots, *markdown_notes(context.notes)]
    return "\n".join([*parts, *markdown_facts(provenance(rows, context))]) + "\n"


# ---- page ----


def _lead(rows: Sequence[TokenizerRow]) -> str:
    """The result in a sentence."""
    if len(rows) < 2:
        return ""
    best = max(rows, key=lambda row: row.psnr)
    parts = [f"<b>{escape(best.name)}</b> reconstructs best ({best.psnr:.2f} dB)"]
    for name, head in (("distance", "is nearest to the training images"), ("interpolated", "interpolates best")):
        found = [(value, row.name) for row in rows if (value := getattr(row, name)) is not None]
        if found:
            value, winner = min(found)
            parts.append(f"<b>{escape(winner)}</b> {head} ({number(value)})")
    return f'<p class="lead">{"; ".join(parts)}.</p>'


def _strip(name: str, small: str, images: Tensor, kind: str = "") -> str:
    few = images[: max(4, _STRIP // images.shape[-1])]
    picture = image_tag(grid_png(few, columns=len(few)), f"{name}, {small}" if small else name)
    return f'<div class="{kind}"><p>{escape(name)}<small>{escape(small)}</small></p>{picture}</div>'


def _strips(results: Sequence[TokenizerResult], originals: Tensor) -> str:
    """The same images as every tokenizer reconstructs them, then half-way to their neighbours."""
    first = _strip("held-out images", "", originals, "first")
    rows = "".join(_strip(m.row.name, f"{m.row.psnr:.2f} dB", m.reconstructions) for m in results)
    text = (
        "<h2>Reconstructions</h2><p>The same held-out images, as every tokenizer reconstructs them.</p>"
        f'<div class="strips">{first}{rows}</div>'
    )
    between = [
        _strip(m.row.name, f"distance {number(m.row.interpolated)}", m.interpolations)
        for m in results
        if m.interpolations is not None and m.row.interpolated is not None
    ]
    if not between:
        return text
    return (
        f"{text}<h2>Half-way to the nearest neighbour</h2><p>The latent of each of these images mixed in equal parts with that "
        "of its nearest neighbour. Where the result is no plausible image, a latent model that interpolates between training "
        f'images is unlikely to make one.</p><div class="strips">{first}{"".join(between)}</div>'
    )


def report_html(
    results: Sequence[TokenizerResult], originals: Tensor, context: ReportContext, plots: Mapping[str, bytes]
) -> str:
    """One self-contained page."""
    rows = [result.row for result in results]
    first, codes, *others = map(titled_table, tables(rows))
    rate, usage, noise = (figure(plots[name], words, caption) for name, (words, caption) in PLOTS.items())
    return page(
        context,
        _lead(rows),
        [
            first,
            f'<div class="plots">{rate}{noise}</div>',
            _strips(results, originals),
            codes,
            f'<div class="plots single">{usage}</div>',
            *others,
            notes_list(context.notes),
            facts_list(provenance(rows, context)),
        ],
    )


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
    """UsageError if the directory holds anything but an earlier report, which `write_tokenizer_report` replaces."""
    if directory.exists() and (not directory.is_dir() or any(p.name not in FILES for p in directory.iterdir())):
        raise UsageError(f"{directory} holds other files", "a report replaces its directory", "choose another --out")


def write_tokenizer_report(
    directory: Path, results: Sequence[TokenizerResult], originals: Tensor, context: ReportContext
) -> None:
    """All seven files, replacing an earlier report; `originals` uint8 are the images shown. DiskError, UsageError."""
    check_out(directory)
    rows = [m.row for m in results]
    plots = {
        "rate_distortion.png": rate_png(rows),
        "codebook_usage.png": usage_png(results),
        "noise.png": noise_png(rows),
    }
    texts = {
        "results.csv": csv_text([flat_record(row) for row in rows]),
        "results.jsonl": jsonl_text([dataclasses.asdict(row) for row in rows]),
        "report.md": report_md(rows, context),
        "report.html": report_html(results, originals, context, plots),
    }
    _replace_directory(directory, plots | {name: text.encode() for name, text in texts.items()})


def _replace_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put these files, and no others, at `directory`: written beside it, then moved there."""
    try:
        with replacing(directory) as new:
            for name, content in files.items():
                write_atomically(new / name, content)
    except OSError as error:
        raise DiskError(f"{directory} cannot be written", str(error), "free space, or choose another --out") from error
