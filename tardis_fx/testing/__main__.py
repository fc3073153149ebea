"""``python -m tardis_fx.testing NAME``: a table of the laws that a registered rewrite keeps and breaks."""

import logging
from typing import Annotated

import typer

from tardis_fx.errors import TardisError
from tardis_fx.testing.suite import Verdict, examine


def main(
    method: Annotated[str, typer.Argument(help="Name of a rewrite in the entry-point group tardis_fx.passes.")],
    examples: Annotated[int, typer.Option(min=1, help="Number of examples drawn for each law.")] = 10,
) -> None:
    """Check a rewrite against every law and print the results; exit code 1 if one is broken."""
    try:
        verdicts = examine(method, examples=examples)
    except TardisError as error:
        typer.echo(f"tardis_fx.testing: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(table(verdicts))
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


def table(verdicts: list[Verdict]) -> str:
    """Formats verdicts as a Markdown table."""
    lines = ["| law | result | smallest failing example |", "|---|---|---|"]
    for verdict in verdicts:
        failure = "" if verdict.failure is None else f"{verdict.failure.strip().splitlines()[0]}; {verdict.example}"
        result = "pass" if verdict.passed else "FAIL"
        lines.append(f"| {verdict.law} | {result} | {failure.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger("tardis_fx").setLevel(logging.ERROR)  # hides the warning that drawn models see few tokens
    typer.run(main)
