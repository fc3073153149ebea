"""Writes docs/results.md from the prose and the figures in docs/results.

    python benchmarks/results.py

``prose.md`` holds the text. ``{{ NAME }}`` stands for the table of ``NAME.json``, and ``{{ NAME.command }}`` for the
command that measured it. A data file holds, for each table:

    command, conditions     the command that measured the figures, and where
    headings, titles        of the columns, and how many of them are the names of the rows
    forms                   for each column, the texts that figures are put into: one for each number of figures
    rows                    for each column a text, a figure, or a list of figures
"""

import json
import re
from pathlib import Path
from typing import Any

from tardis_fx.measure.tables import markdown

DATA = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = DATA.with_suffix(".md")


def page() -> str:
    """Renders the page as Markdown.

    Raises:
        KeyError: the prose names a figure that no data file holds.
    """
    tables = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("*.json")}

    def content(match: re.Match[str]) -> str:
        table = tables[match["name"]]
        return str(table[match["key"]]) if match["key"] else rendered(table)

    prose = (DATA / "prose.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (?P<name>[\w-]+)(\.(?P<key>\w+))? \}\}", content, prose)


def rendered(table: dict[str, Any]) -> str:
    """Renders a table of a data file as Markdown."""
    columns = list(zip(table["headings"], table["forms"], strict=True))
    rows = [{h: cell(value, forms) for value, (h, forms) in zip(row, columns, strict=True)} for row in table["rows"]]
    return markdown(rows, table["titles"])


def cell(value: str | float | list[float], forms: list[str]) -> str:
    """Text of a cell; figures are put into the form with the same number of placeholders."""
    if isinstance(value, str):
        return value
    figures = value if isinstance(value, list) else [value]
    (form,) = (form for form in forms if form.count("{") == len(figures))
    return form.format(*figures)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
