"""Writes tables of results as Markdown and CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from tardis_fx.errors import BenchError
from tardis_fx.measure.requirements import needed_by


def markdown(rows: Sequence[Mapping[str, str]], titles: int = 1) -> str:
    """Formats a Markdown table.

    Args:
        rows: cells by heading; a missing cell stays empty.
        titles: number of leading columns that name the row, aligned to the left; others go to the right.

    Raises:
        BenchError: tabulate is not installed.
    """
    with needed_by("a table"):
        from tabulate import tabulate
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    alignment = ["left"] * titles + ["right"] * (len(headings) - titles)
    cells = [[row.get(heading, "").replace("|", "/") for heading in headings] for row in rows]
    return str(tabulate(cells, headings, "pipe", disable_numparse=True, colalign=alignment))


def write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Writes rows as CSV; the keys of the first are the headings.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error}") from error
