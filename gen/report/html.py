"""Tables, pictures and facts as one self-contained HTML page.

Images are base64 PNG, style and script are inline (page.css, page.js), light or dark by the reader's preference, and the page
works at the width of a phone and in print. Every text from outside is escaped (core/text.py).
"""

import base64
from collections.abc import Sequence
from pathlib import Path

from midway.gen.core.text import html
from midway.gen.report.table import Entry, Line, ReportContext, Table

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def image_tag(png: bytes, alt: str) -> str:
    """An image inside the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html(alt)}">'


def figure(png: bytes, alt: str, caption: str) -> str:
    """A plot with its caption."""
    return f'<figure><div class="plot">{image_tag(png, alt)}</div><figcaption>{html(caption)}</figcaption></figure>'


def _value(entry: Entry) -> str:
    """`3.21 ± 0.12` with the deviation set back and the best in bold."""
    mean, sign, std = entry.value.partition(" ± ")
    mean = f"<b>{html(mean)}</b>" if entry.best else html(mean)
    return f'{mean}<span class="std"> ± {html(std)}</span>' if sign else mean


def _small(text: str) -> str:
    return f"<small>{html(text)}</small>" if text else ""


def _entry(entry: Entry | None, floor: bool) -> str:
    if entry is None:
        return "<td></td>" if floor else '<td class="quiet">–</td>'
    kind = ' class="best"' if entry.best else ""
    return f"<td{kind}>{_value(entry)}{_small(entry.small)}</td>"


def _row(line: Line, last: str | None) -> str:
    cells = "".join(_entry(entry, line.floor) for entry in line.entries) + ("" if last is None else f"<td>{last}</td>")
    kind = ' class="floor"' if line.floor else ""
    return f'<tr{kind}><th scope="row">{html(line.name)}{_small(line.small)}</th>{cells}</tr>'


def html_table(table: Table, pictures: Sequence[str] | None = None, kind: str = "") -> str:
    """The table alone, in a box that scrolls; `pictures`, HTML per line, make a last column."""
    heads = [*table.heads, *(["samples"] if pictures is not None else [])]
    head = "".join(f'<th scope="col">{html(text)}</th>' for text in heads)
    rows = zip(table.lines, pictures if pictures is not None else [None] * len(table.lines), strict=True)
    body = "".join(_row(line, picture) for line, picture in rows)
    attribute = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{attribute}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def titled_table(table: Table, folded: bool = False) -> str:
    """The table under its title and note, unfolded by a click if `folded`; nothing without lines."""
    if not table.lines:
        return ""
    title, note = html(table.title), f"<p>{html(table.note)}</p>" if table.note else ""
    body = f"{note}{html_table(table)}"
    return f"<details><summary>{title}</summary>{body}</details>" if folded else f"<h2>{title}</h2>{body}"


def notes_list(notes: Sequence[str]) -> str:
    """Notes under their heading; nothing without any."""
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{html(note)}</li>' for note in notes)}</ul>" if notes else ""


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, folded."""
    items = "".join(
        f"<dt>{html(name)}</dt><dd>{f'<code>{html(value)}</code>' if name == 'command' else html(value)}</dd>"
        for name, value in facts
    )
    return f"<details><summary>How these numbers were made</summary><dl>{items}</dl></details>"


def page(context: ReportContext, lead: str, parts: Sequence[str], script: str = "") -> str:
    """The whole page: title, model and data, `lead` (HTML), and parts (HTML); `script` runs at its end."""
    title = html(context.title)
    warned = "".join(f'<p class="warning">{html(warning)}</p>' for warning in context.warnings)
    run = f"<script>{script}</script>" if script else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style></head><body><main>
<header><h1>{title}</h1><p class="quiet">{html(context.model)} · {html(context.data)}</p>{warned}{lead}</header>
{chr(10).join(part for part in parts if part)}
</main>{run}</body></html>
"""
