"""Defines the command ``tardis`` and its small subcommands."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from tardis_fx.bench.large import large_decoding
from tardis_fx.cli.bench import bench
from tardis_fx.cli.calibrate import calibrate
from tardis_fx.cli.compare import compare
from tardis_fx.cli.evaluate import evaluate
from tardis_fx.demo.run import run_demo
from tardis_fx.errors import ConfigError, TardisError
from tardis_fx.explain import Report
from tardis_fx.plan import Plan


class TypedErrors(TyperGroup):
    """Commands that raise this package's own error for a bad value: one line and exit code 1, without usage text."""

    def invoke(self, context: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(context)
        except typer.BadParameter as error:
            raise ConfigError(error.format_message()) from None


app = typer.Typer(
    cls=TypedErrors,
    help="Makes transformer feed-forward networks partially linear.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(bench, name="bench")
app.command()(compare)
app.command()(calibrate)
app.command("eval")(evaluate)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="File of the Pareto plot, as PNG.")] = Path("tardis_demo.png"),
) -> None:
    """Calibrate, compile and measure an embedded model: about three minutes on two cores."""
    console = Console()
    run_demo(out, console)
    large_decoding(console)


@app.command()
def inspect(plan: Annotated[Path, typer.Argument(help="A file written by Plan.save.")]) -> None:
    """Print what a plan does to every site."""
    typer.echo(str(Report.from_plan(Plan.load(plan))))


def main() -> None:
    """Runs the command; reports a user's mistake as one line on stderr with exit code 1."""
    try:
        app()
    except TardisError as error:
        typer.echo(f"tardis: {error}", err=True)
        raise SystemExit(1) from None
