"""Draws the Pareto plot: loss of quality over the bytes read per token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tardis_fx.errors import BenchError
from tardis_fx.measure.requirements import needed_by


def draw_pareto(
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]], path: Path, *, title: str, loss: str, minimum: float
) -> None:
    """Draws one line per rewrite on a logarithmic axis, with bars from the smallest to the largest loss.

    Args:
        lines: by label, points: the touched share of the dense FFN bytes, and the losses of one or several seeds.
        path: its extension determines the format.
        title: of the picture.
        loss: label of the axis of losses.
        minimum: loss at which the axis ends; smaller losses are drawn there.

    Raises:
        BenchError: matplotlib is not installed, or the picture cannot be written.
    """
    with needed_by("the plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = [(f"C{color}", marker) for marker in "os^Dv" for color in range(10)]
    for (label, points), (color, marker) in zip(lines.items(), styles, strict=False):
        shares, losses = zip(*sorted(points), strict=True)
        shown = [np.maximum(minimum, values) for values in losses]
        means = np.array([values.mean() for values in shown])
        bars = means - [values.min() for values in shown], [values.max() for values in shown] - means
        axes.errorbar(
            100 * np.array(shares), means, bars, label=label, color=color, marker=marker, markersize=4, capsize=2
        )
    axes.set_yscale("log")
    axes.set_xlabel("FFN weight bytes touched per token, % of the dense model's")
    axes.set_ylabel(f"{loss} ({minimum:g} stands for {minimum:g} and less)")
    axes.set_title(title)
    if lines:
        figure.legend(fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write the picture to {path}: {error}") from error
