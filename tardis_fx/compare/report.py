"""How a comparison is shown: one Markdown table, one Pareto plot."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from tardis_fx.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tardis_fx.compare.records import Record
    from tardis_fx.compare.subjects import Subject


def table(records: Sequence[Record], subject: Subject) -> str:
    """One row a method and budget: the mean over the seeds and, of several, the least and the greatest, as Markdown.

    Args:
        records: of one comparison.
        subject: whose metrics are the columns.
    """
    decoded = any(record.decode for record in records)
    heads = ["method", "budget", "stored", "touched", "counted", "prefill FLOPs", *(m.heading for m in subject.metrics)]
    heads += ["decode against Inductor (min to max)"] if decoded else []
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for group in _rows(records):
        first = group[0]
        cells = [first.label, "" if first.budget is None else f"{first.budget:.1%}"]
        if first.reason is not None:
            cells += ["out of reach: " + first.reason.replace("|", "/")] + [""] * (len(heads) - 3)
        else:
            cells += [_spread([r.stored for r in group], ".1%"), _spread([r.touched for r in group], ".2%")]
            counted = [r.counted for r in group if r.counted is not None]
            cells += [_spread(counted, ".2%") if counted else "", _spread([r.flops for r in group], ".0%")]
            cells += [_spread([r.metrics[m.name] for r in group], m.form) for m in subject.metrics]
            if decoded:
                times = [r.decode for r in group if r.decode]
                low, median, high = (statistics.mean(t[i] for t in times) for i in range(3)) if times else (0, 0, 0)
                cells += [f"{median:.2f}× ({low:.2f} to {high:.2f})" if times else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], subject: Subject, path: Path) -> None:
    """Draws the loss of quality over the bytes touched, one line a method, with bars from least to greatest.

    Args:
        records: of one comparison.
        subject: says what is drawn.
        path: of the picture; its ending says which format.

    Raises:
        BenchError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"the plot needs {error.name}: pip install 'tardis-fx[demo]'") from error
    metric, label, factor, least = subject.plotted
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for group in _rows(records):
        if group[0].reason is None and group[0].touched < 1:
            values = [max(least, factor * record.metrics[metric]) for record in group]
            share, middle = 100 * statistics.mean(r.touched for r in group), statistics.mean(values)
            lines.setdefault(group[0].label, []).append((share, middle, middle - min(values), max(values) - middle))
    styles = [(color, marker) for marker in "os^Dv" for color in range(10)]
    for (name, points), (color, marker) in zip(lines.items(), styles, strict=False):
        touched, mean, below, above = zip(*sorted(points), strict=True)
        axes.errorbar(
            touched, mean, (below, above), label=name, color=f"C{color}", marker=marker, markersize=4, capsize=2
        )
    axes.set_yscale("log")
    axes.set_xlabel("FFN weight bytes touched per token, % of the dense model's")
    axes.set_ylabel(f"{label} ({least:g} stands for {least:g} and less)")
    axes.set_title(subject.name)
    if lines:
        figure.legend(fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write the picture to {path}: {error}") from error


def _rows(records: Sequence[Record]) -> Iterator[list[Record]]:
    """The records of all seeds of a case together, in the order in which cases first come.

    A case that is out of reach with one seed and not with another is two rows.
    """
    rows: dict[tuple[str, bool], list[Record]] = {}
    for record in records:
        rows.setdefault((record.case, record.reason is None), []).append(record)
    yield from rows.values()


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (f"{v:{form}}" for v in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
