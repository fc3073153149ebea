"""Reports a comparison as a Markdown table and a Pareto plot."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tardis_fx.compare.records import Record
from tardis_fx.compare.subjects import Subject
from tardis_fx.measure.plots import draw_pareto
from tardis_fx.measure.tables import markdown
from tardis_fx.measure.timing import Ratio


def table(records: Sequence[Record], subject: Subject) -> str:
    """Formats a Markdown table with a row per method and budget: mean over the seeds, smallest and largest value."""
    heads = ["method", "budget", "stored", "touched", "counted", "prefill FLOPs", *(m.heading for m in subject.metrics)]
    heads += ["decode against Inductor (min to max)"] * any(record.decode for record in records)
    rows = []
    for group in _rows(records):
        first = group[0]
        row = dict.fromkeys(heads, "")
        row |= {"method": first.label, "budget": "" if first.budget is None else f"{first.budget:.1%}"}
        if first.reason is not None:
            row[heads[-1]] = f"out of reach: {first.reason}"
        else:
            row["stored"] = _spread((r.stored for r in group), ".1%")
            row["touched"] = _spread((r.touched for r in group), ".2%")
            row["counted"] = _spread((r.counted for r in group), ".2%")
            row["prefill FLOPs"] = _spread((r.flops for r in group), ".0%")
            row |= {m.heading: _spread((r.metrics[m.name] for r in group), m.form) for m in subject.metrics}
            if times := [r.decode for r in group if r.decode]:
                row[heads[-1]] = str(Ratio(*map(statistics.mean, zip(*times, strict=True))))
        rows.append(row)
    return markdown(rows)


def draw(records: Sequence[Record], subject: Subject, path: Path) -> None:
    """Draws the loss of quality over the bytes touched, with one line per method.

    Raises:
        BenchError: matplotlib is not installed, or the picture cannot be written.
    """
    metric, loss, factor, minimum = subject.plotted
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for group in _rows(records):
        if group[0].reason is None and group[0].touched < 1:
            touched = statistics.mean(record.touched for record in group)
            lines.setdefault(group[0].label, []).append((touched, [factor * r.metrics[metric] for r in group]))
    draw_pareto(lines, path, title=subject.name, loss=loss, minimum=minimum)


def _rows(records: Sequence[Record]) -> Iterable[list[Record]]:
    """Groups the records of all seeds of each case, in the order in which cases first appear.

    A case that is out of reach for some seeds only makes two rows.
    """
    rows: dict[tuple[str, bool], list[Record]] = {}
    for record in records:
        rows.setdefault((record.case, record.reason is None), []).append(record)
    return rows.values()


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean, low, high = (f"{v:{form}}" for v in (statistics.mean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"
