"""Tokenizers ranked at equal rate: what they reconstruct for the bits that an image takes.

Reconstructions compare at equal rate alone: more bits buy more decibels. Those of different rates compare by the Pareto front:
one on it is beaten by none of its rate or below.
"""

from collections.abc import Sequence

from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.report.table import Entry, Line, Table, number

EQUAL = 1.02
"""Rates within this factor of the lowest of their group are equal: 1000 codes against 1024 are."""


def rate_of(row: TokenizerRow) -> tuple[float, float] | None:
    """(bits per image, PSNR): of codes, all equally long; of a posterior, its rate and the PSNR of its draws; else None."""
    if row.bits is not None:
        return row.bits, row.psnr
    return None if row.rate is None or row.psnr_sampled is None else (row.rate, row.psnr_sampled)


Rated = tuple[TokenizerRow, float, float]
"""A tokenizer, its bits per image, and the PSNR that goes with them."""


def groups(rows: Sequence[TokenizerRow]) -> list[list[Rated]]:
    """Tokenizers of equal rate together, lowest rate first; within a group the best PSNR first. None without a rate."""
    rated = [(row, *rate) for row in rows if (rate := rate_of(row)) is not None and rate[0] > 0]
    found: list[list[Rated]] = []
    for one in sorted(rated, key=lambda one: one[1]):
        if found and one[1] <= EQUAL * found[-1][0][1]:
            found[-1].append(one)
        else:
            found.append([one])
    return [sorted(group, key=lambda one: -one[2]) for group in found]


def front(rows: Sequence[TokenizerRow]) -> list[Rated]:
    """The best of those groups that no group of lower rate reaches, lowest rate first: the Pareto front of rate and PSNR."""
    found: list[Rated] = []
    for best, *_ in groups(rows):
        if not found or best[2] > found[-1][2]:
            found.append(best)
    return found


def rate_table(rows: Sequence[TokenizerRow]) -> Table:
    """A line per tokenizer with a rate, lowest first: its place among those of equal rate, and whether it is on the front.

    No lines below two.
    """
    on_front = {row.name for row, _, _ in front(rows)}
    lines = [
        Line(
            row.name,
            (
                Entry(number(bits)),
                Entry(f"{psnr:.2f}", best=place == 1 and len(group) > 1),
                Entry(f"{place} of {len(group)}" if len(group) > 1 else "alone"),
                Entry("yes" if row.name in on_front else "no"),
            ),
        )
        for group in groups(rows)
        for place, (row, bits, psnr) in enumerate(group, 1)
    ]
    note = (
        f"Comparisons are at equal rate within a group, whose bits per image differ by at most {100 * (EQUAL - 1):.0f} %; "
        "bold: the best of a group. Across groups: a tokenizer on the Pareto front is beaten by none of its rate or below. Of a "
        "posterior: its rate, and the PSNR of its draws."
    )
    heads = ("tokenizer", "bits per image", "PSNR, dB", "at equal rate", "Pareto front")
    return Table("Ranking at equal rate", note, heads, tuple(lines) if len(lines) > 1 else ())


def answer(rows: Sequence[TokenizerRow]) -> str:
    """The ranking in a sentence: the largest group of equal rate (of several, that of most bits), and the front."""
    found = groups(rows)
    several = [group for group in found if len(group) > 1]
    if several:
        best, second, *_ = group = max(several, key=lambda group: (len(group), group[0][1]))
        start = (
            f"At equal rate, {number(best[1])} bits per image, {best[0].name} reconstructs best of {len(group)}: "
            f"{best[2]:.2f} dB, {best[2] - second[2]:.2f} dB above {second[0].name}"
        )
    elif len(found) > 1:
        start = "No two of these tokenizers have the same rate"
    else:
        best = max(rows, key=lambda row: row.psnr)
        bits = "" if not found else f" with {number(found[0][0][1])} bits per image"
        return f"{best.name} reconstructs held-out images at {best.psnr:.2f} dB{bits if len(rows) == 1 else ''}."
    if len(found) == 1:
        return f"{start}."
    listed = ", ".join(f"{row.name} ({number(bits)} bits, {psnr:.2f} dB)" for row, bits, psnr in front(rows))
    return f"{start}; on the Pareto front of bits and PSNR: {listed}."
