"""Sample grids of the same seeds to look through: a slider over NFE, two panes with a list of solvers each.

All panels are in one table, which readers without JavaScript and printers see; page.js folds it up and shows two of its images,
so that each is in the page once.
"""

from collections.abc import Mapping, Sequence

from midway.gen.core.text import html
from midway.gen.report.html import image_tag

Panel = tuple[str, int]
"""(solver, NFE)."""


def explorer(grids: Mapping[Panel, bytes], captions: Mapping[Panel, str], below: str = "Fréchet distance") -> str:
    """The section as HTML, nothing without grids.

    grids: (solver, NFE) -> PNG of samples, all of the same seeds; solvers keep their order. captions: plain text below each,
    such as distance and time grid; may lack some. below: what the figure in them is.
    """
    if not grids:
        return ""
    solvers = list(dict.fromkeys(solver for solver, _ in grids))
    budgets = sorted({nfe for _, nfe in grids})
    return (
        '<section class="explorer"><h2>Samples from the same seeds</h2><p>Every panel starts from the same noise, so a '
        f"difference between panels is the solver's doing. Below each: {html(below)} and grid.</p>"
        f'<div class="chooser" hidden>{_slider(budgets, _first_budget(grids, solvers, budgets))}'
        f'<div class="panes">{_pane("a", solvers, 0)}{_pane("b", solvers, min(1, len(solvers) - 1))}</div></div>'
        f"<details open><summary>All panels</summary>{_table(grids, captions, solvers, budgets)}</details></section>"
    )


def _first_budget(grids: Mapping[Panel, bytes], solvers: Sequence[str], budgets: Sequence[int]) -> int:
    """The index of the smallest budget at which both panes have a picture, else of the smallest."""
    both = (i for i, nfe in enumerate(budgets) if all((solver, nfe) in grids for solver in solvers[:2]))
    return next(both, 0)


def _slider(budgets: Sequence[int], start: int) -> str:
    """Steps through the budgets, however far apart they are; the script displays the current one."""
    ticks = "".join(f"<span>{nfe}</span>" for nfe in budgets)
    return (
        '<div class="budget"><label><span>evaluations per image</span><b aria-hidden="true"></b>'
        f'<input type="range" min="0" max="{len(budgets) - 1}" step="1" value="{start}" autocomplete="off" '
        f'data-values="{" ".join(map(str, budgets))}"></label>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></div>'
    )


def _pane(letter: str, solvers: Sequence[str], start: int) -> str:
    options = "".join(
        f'<option value="{i}"{" selected" if i == start else ""}>{html(solver)}</option>'
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
        f'<tr><th scope="row">{html(solver)}</th>'
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
    return f'<td data-panel="{place}">{image}<small>{html(caption)}</small></td>'
