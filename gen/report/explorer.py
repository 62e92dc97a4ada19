"""Sample grids of the same seeds to look through: a slider over NFE, two panes with a list of solvers each.

All panels are in one table, which readers without JavaScript and printers see; `report_script.EXPLORER_SCRIPT` folds it up
and shows two of its images, so that each is in the page once. The caller puts `EXPLORER_STYLE` after the report's own style,
whose colours it takes, and the script at the end of the body.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape

Panel = tuple[str, int]
"""(solver, NFE)."""

EXPLORER_STYLE = """
.explorer [hidden] { display: none; }
.chooser { background: var(--card); border: 1px solid var(--hair); border-radius: 10px; padding: 1rem 1.1rem 1.1rem; }
.chooser label { font-size: .85rem; font-weight: 600; color: var(--quiet); }
.budget label { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 0 1rem; }
.budget b { color: var(--ink); font-size: 1.05rem; font-variant-numeric: tabular-nums; }
.budget input { display: block; width: 100%; margin: .5rem 0 0; height: 1.5rem; accent-color: var(--accent);
  cursor: pointer; }
.ticks { display: flex; justify-content: space-between; padding: 0 8px; font-size: .8rem; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
.ticks span { width: 0; display: flex; justify-content: center; }
.ticks .chosen { color: var(--accent); font-weight: 700; }
.panes { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.1rem; margin-top: 1.1rem; }
.pane select { display: block; width: 100%; margin: .3rem 0 .6rem; padding: .45rem .5rem; font: inherit;
  font-weight: 600; color: var(--ink); background: var(--paper); border: 1px solid var(--edge); border-radius: 7px;
  text-overflow: ellipsis; }
.explorer :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.pane img, .missing { display: block; width: 100%; border-radius: 6px; }
.pane img { height: auto; background: #fff; image-rendering: pixelated; }
.missing { aspect-ratio: 1; border: 1.5px dashed var(--edge); }
.pane figcaption { min-height: 1.5em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.explorer { --edge: #8a919e; }
.explorer details { margin-top: 1rem; border: 0; padding: 0; }
.explorer summary { margin-bottom: .6rem; }
@media (prefers-color-scheme: dark) { .explorer { --edge: #6b7382; } }
@media (max-width: 600px) { .chooser { padding: .8rem; } .panes { gap: .7rem; } }
.explorer .samples small { white-space: normal; }
@media print { .explorer .chooser, .explorer summary { display: none; }
  .explorer .samples { table-layout: fixed; font-size: .85em; }
  .explorer .samples th, .explorer .samples td { padding: .3rem .2rem; min-width: 0; overflow-wrap: anywhere; } }
"""


def image_tag(png: bytes, alt: str) -> str:
    """An image inside the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt)}">'


def explorer(grids: Mapping[Panel, bytes], captions: Mapping[Panel, str]) -> str:
    """The section as HTML, nothing without grids.

    grids: (solver, NFE) -> PNG of samples, all of the same seeds; solvers keep their order. captions: plain text below each,
    such as distance and time grid; may lack some.
    """
    if not grids:
        return ""
    solvers = list(dict.fromkeys(solver for solver, _ in grids))
    budgets = sorted({nfe for _, nfe in grids})
    return (
        '<section class="explorer"><h2>Samples from the same seeds</h2><p>Every panel starts from the same noise, so a '
        "difference between panels is the solver's doing. Below each: Fréchet distance and grid.</p>"
        f'<div class="chooser" hidden>{_slider(budgets, _first_budget(grids, solvers, budgets))}'
        f'<div class="panes">{_pane("a", solvers, 0)}{_pane("b", solvers, min(1, len(solvers) - 1))}</div></div>'
        f"<details open><summary>All panels</summary>{_table(grids, captions, solvers, budgets)}</details></section>"
    )


def _first_budget(grids: Mapping[Panel, bytes], solvers: Sequence[str], budgets: Sequence[int]) -> int:
    """The index of the smallest budget at which both panes have a picture, else of the smallest."""
    both = (i for i, nfe in enumerate(budgets) if all((solver, nfe) in grids for solver in solvers[:2]))
    return next(both, 0)


def _slider(budgets: Sequence[int], start: int) -> str:
    """Steps through the budgets, however far apart they are; the script says which one it is at."""
    ticks = "".join(f"<span>{nfe}</span>" for nfe in budgets)
    return (
        '<div class="budget"><label><span>evaluations per image</span><b aria-hidden="true"></b>'
        f'<input type="range" min="0" max="{len(budgets) - 1}" step="1" value="{start}" autocomplete="off" '
        f'data-values="{" ".join(map(str, budgets))}"></label>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></div>'
    )


def _pane(letter: str, solvers: Sequence[str], start: int) -> str:
    options = "".join(
        f'<option value="{i}"{" selected" if i == start else ""}>{escape(solver)}</option>'
        for i, solver in enumerate(solvers)
    )
    return (
        f'<figure class="pane"><label>solver {letter}<select autocomplete="off">{options}</select></label>'
        '<img alt="" hidden><div class="missing" hidden></div><figcaption aria-live="polite"></figcaption></figure>'
    )


def _table(
    grids: Mapping[Panel, bytes], captions: Mapping[Panel, str], solvers: Sequence[str], budgets: Sequence[int]
) -> str:
    """Every panel, a row per solver and a column per budget; `data-panel` has their two indices."""
    head = "".join(f'<th scope="col">{nfe} NFE</th>' for nfe in budgets)
    rows = (
        f'<tr><th scope="row">{escape(solver)}</th>'
        + "".join(
            _cell(f"{i} {j}", (solver, nfe), grids.get((solver, nfe)), captions.get((solver, nfe), ""))
            for j, nfe in enumerate(budgets)
        )
        + "</tr>"
        for i, solver in enumerate(solvers)
    )
    return (
        f'<div class="scroll"><table class="samples"><thead><tr><th scope="col">solver</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(place: str, panel: Panel, png: bytes | None, caption: str) -> str:
    if png is None:
        return f'<td data-panel="{place}"><small>not measured at this budget</small></td>'
    image = image_tag(png, f"samples of {panel[0]} with {panel[1]} evaluations")
    return f'<td data-panel="{place}">{image}<small>{escape(caption)}</small></td>'
