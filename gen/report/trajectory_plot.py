"""Two panels of how flat sampling trajectories are: variance explained by their first components, and some paths.

The left panel has the mean over trajectories with the standard deviation as bars, and for comparison a random walk of as
many steps; the right one the first trajectories, each in its own plane, since two samples move in nearly orthogonal
directions where there are many. Colours and ink are those of `plots`.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from midway.gen.diffusion.trajectories import Spread, TrajectoryGeometry, random_walk
from midway.gen.report.plots import COLOURS, HAIR, INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trajectory_figure(geometry: TrajectoryGeometry) -> "Figure":
    """Explained variance beside paths, 11 x 5 inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 5), dpi=160, facecolor="white", layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _dress(axes)
    _explained(left, geometry)
    _paths(right, geometry)
    return figure


def trajectory_png(geometry: TrajectoryGeometry) -> bytes:
    """`trajectory_figure` as PNG (1760 x 800), the same bytes for the same geometry."""
    buffer = io.BytesIO()
    trajectory_figure(geometry).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _dress(axes: "Axes") -> None:
    axes.grid(True, color=HAIR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET, labelsize=11)
    for side in axes.spines.values():
        side.set_visible(False)


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, color=INK, fontsize=12.5, loc="left", pad=10)


def _explained(axes: "Axes", geometry: TrajectoryGeometry) -> None:
    """Cumulative shares in per cent, cut at 100; the random walk dashed."""
    components = range(1, len(geometry.explained) + 1)
    walk = (100 * random_walk(geometry.steps, len(components)).cumsum(0)).tolist()
    axes.plot(components, walk, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, label="random walk of as many steps")
    axes.errorbar(
        components,
        [100 * spread.mean for spread in geometry.explained],
        yerr=_bars(geometry.explained),
        color=COLOURS[0],
        marker="o",
        markersize=7,
        linewidth=1.8,
        elinewidth=1.1,
        capsize=3,
        label=f"{geometry.solver}, {geometry.steps} steps, {geometry.count} trajectories",
        zorder=3,
    )
    low = min(walk[0], *(100 * (spread.mean - spread.std) for spread in geometry.explained))
    axes.set_ylim(max(low - 5, 0), 101.5)
    axes.set_xlim(0.75, len(components) + 0.25)
    axes.set_xticks(components)
    axes.set_xlabel("principal components of each trajectory", color=INK, labelpad=8, fontsize=12)
    axes.set_ylabel("variance explained, %", color=INK, labelpad=8, fontsize=12)
    _title(axes, f"effective rank {_pair(geometry.effective_rank)}, deviation {_pair(geometry.deviation)}")
    axes.legend(loc="lower right", frameon=False, labelcolor=INK, fontsize=11)


def _bars(explained: Sequence[Spread]) -> list[list[float]]:
    """Lengths below and above in per cent; none reaches over 100."""
    below = [100 * spread.std for spread in explained]
    above = [100 * min(spread.std, 1 - spread.mean) for spread in explained]
    return [below, above]


def _pair(spread: Spread) -> str:
    return f"{spread.mean:.2f} ± {spread.std:.2f}"


def _paths(axes: "Axes", geometry: TrajectoryGeometry) -> None:
    """Lines from noise (hollow) to image (filled), on axes of one scale."""
    for index, path in enumerate(geometry.paths.tolist()):
        colour = COLOURS[index % len(COLOURS)]
        across, up = zip(*path, strict=True)
        axes.plot(across, up, color=colour, linewidth=1.6, zorder=3)
        axes.plot(*path[0], marker="o", markersize=8, markerfacecolor="white", markeredgecolor=colour, zorder=4)
        axes.plot(*path[-1], marker="o", markersize=8, color=colour, zorder=5)
    axes.plot([], [], "o", markersize=8, markerfacecolor="white", markeredgecolor=INK, label="noise")
    axes.plot([], [], "o", markersize=8, color=INK, label="image")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.set_xlabel("first component", color=INK, labelpad=8, fontsize=12)
    axes.set_ylabel("second component", color=INK, labelpad=8, fontsize=12)
    _title(axes, f"{len(geometry.paths)} trajectories, each on its own two components")
    axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=11, handletextpad=0.2)
