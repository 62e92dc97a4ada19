"""The report of tokenizers as one self-contained page: tables, plots, and the same images as every tokenizer gives them back."""

from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.records import ReportContext, number
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import Measurement
from midway.gen.report.explorer import image_tag
from midway.gen.report.html import entry_cell, notes_list
from midway.gen.report.style import STYLE
from midway.gen.report.tokenizer_tables import Table, provenance, tables

_STRIP = 1280  # pixels: large images are shown fewer, or the page would be slow to open

_STYLE = """
.strips { display: grid; gap: .9rem 1rem; grid-template-columns: minmax(6rem, 10rem) minmax(0, 1fr); align-items: center;
  margin-top: 1rem; max-width: 860px; }
.strips p { margin: 0; font-weight: 600; overflow-wrap: anywhere; line-height: 1.35; }
.strips p small { display: block; font-weight: 400; color: var(--quiet); font-size: .8rem; }
.strips img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 6px; background: #fff; }
.first p { color: var(--quiet); font-weight: 400; font-style: italic; }
.strips > div { display: contents; }
.plots.single { max-width: 530px; }
@media (max-width: 600px) { .strips { grid-template-columns: minmax(0, 1fr); gap: .3rem; }
  .strips > div + div p { margin-top: .6rem; } }
@media print { .strips > div { break-inside: avoid; } }
"""
PLOTS: Mapping[str, tuple[str, str]] = {
    "rate_distortion.png": (
        "PSNR against bits per image",
        "Upper left is better. Filled: tokens of equal length; the thin line leads to what an entropy coder would spend. "
        "Hollow: a posterior's rate and the PSNR of its draws.",
    ),
    "codebook_usage.png": (
        "Frequency of codes by rank",
        "A codebook used evenly is the dashed line up to 1. Where a line ends, the codes beyond were never seen. Codebooks of "
        "more than a million codes are left out.",
    ),
    "noise.png": (
        "PSNR against noise on the latents",
        "Filled markers: snapped to the nearest code before decoding, as samples are; the thin dashed line of the same colour is "
        "without snapping. Hollow: never snapped.",
    ),
}


def _html_table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th>{"".join(map(entry_cell, entries))}</tr>'
        for row, entries in table.rows
    )
    if table.floor:
        cells = "".join(f"<td>{text}</td>" for text in table.floor)
        body += f'<tr class="floor"><th scope="row">floor</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col">tokenizer</th>{heads}</tr></thead>'
    return (
        f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
        f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    )


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


def _plot(name: str, png: bytes) -> str:
    words, caption = PLOTS[name]
    return f'<figure><div class="plot">{image_tag(png, words)}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _strip(name: str, small: str, images: Tensor, kind: str = "") -> str:
    few = images[: max(4, _STRIP // images.shape[-1])]
    picture = image_tag(grid_png(few, columns=len(few)), f"{name}, {small}" if small else name)
    return f'<div class="{kind}"><p>{escape(name)}<small>{escape(small)}</small></p>{picture}</div>'


def _strips(measurements: Sequence[Measurement], originals: Tensor) -> str:
    """The same images as every tokenizer reconstructs them, then half-way to their neighbours."""
    first = _strip("held-out images", "", originals, "first")
    rows = "".join(_strip(m.row.name, f"{m.row.psnr:.2f} dB", m.reconstructions) for m in measurements)
    text = (
        "<h2>Reconstructions</h2><p>The same held-out images, as every tokenizer gives them back.</p>"
        f'<div class="strips">{first}{rows}</div>'
    )
    between = [
        _strip(m.row.name, f"distance {number(m.row.interpolated)}", m.interpolations)
        for m in measurements
        if m.interpolations is not None and m.row.interpolated is not None
    ]
    if not between:
        return text
    return (
        f"{text}<h2>Half-way to the nearest neighbour</h2><p>The latent of each of these images mixed in equal parts with that "
        "of its nearest neighbour. Where the result is no plausible image, a latent model that interpolates between what it has "
        f'seen is unlikely to make one.</p><div class="strips">{first}{"".join(between)}</div>'
    )


def _details(rows: Sequence[TokenizerRow], context: ReportContext) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(value)}</code>' if name == 'command' else escape(value)}</dd>"
        for name, value in provenance(rows, context)
    )
    return f"<details><summary>How these numbers were made</summary><dl>{items}</dl></details>"


def page(
    measurements: Sequence[Measurement], originals: Tensor, context: ReportContext, plots: Mapping[str, bytes]
) -> str:
    rows = [m.row for m in measurements]
    title = escape(context.title)
    first, codes, *others = map(_html_table, tables(rows))
    rate, usage, noise = (_plot(name, plots[name]) for name in PLOTS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}{_STYLE}</style></head><body><main>
<header><h1>{title}</h1><p class="quiet">{escape(context.model)} · {escape(context.data)}</p>{_lead(rows)}</header>
{first}
<div class="plots">{rate}{noise}</div>
{_strips(measurements, originals)}
{codes}
<div class="plots single">{usage}</div>
{"".join(others)}
{notes_list(context.notes)}
{_details(rows, context)}
</main></body></html>
"""
