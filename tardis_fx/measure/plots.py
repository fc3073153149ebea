"""Draws the Pareto plot: loss of quality over the bytes read per token."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tardis_fx.errors import BenchError
from tardis_fx.measure.extras import needed_by


def draw_pareto(
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], path: Path, *, title: str, loss: str, least: float
) -> None:
    """Draws one line per rewrite on a logarithmic axis, with bars from the smallest to the largest loss.

    Args:
        lines: by label, points: the touched share of the dense FFN bytes, and the losses of one or several seeds.
        path: of the picture; its extension determines the format.
        title: of the picture.
        loss: label of the axis of losses.
        least: loss at which the axis ends; smaller losses are drawn there.

    Raises:
        BenchError: matplotlib is not installed, or the picture cannot be written.
    """
    with needed_by("the plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = [(f"C{color}", marker) for marker in "os^Dv" for color in range(10)]
    for (label, points), (color, marker) in zip(lines.items(), styles, strict=False):
        shares, means, below, above = [], [], [], []
        for share, losses in sorted(points):
            shown = [max(least, value) for value in losses]
            shares.append(100 * share)
            means.append(statistics.mean(shown))
            below.append(means[-1] - min(shown))
            above.append(max(shown) - means[-1])
        axes.errorbar(shares, means, (below, above), label=label, color=color, marker=marker, markersize=4, capsize=2)
    axes.set_yscale("log")
    axes.set_xlabel("FFN weight bytes touched per token, % of the dense model's")
    axes.set_ylabel(f"{loss} ({least:g} stands for {least:g} and less)")
    axes.set_title(title)
    if lines:
        figure.legend(fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write the picture to {path}: {error}") from error
