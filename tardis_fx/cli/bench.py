"""The commands ``tardis bench ffn`` and ``tardis bench model``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

from tardis_fx.bench.ffn import bench_ffn
from tardis_fx.bench.model import bench_model
from tardis_fx.bench.plans import Widths
from tardis_fx.bench.timings import Timing, report
from tardis_fx.cli.options import DType, comma_separated, writable
from tardis_fx.errors import ConfigError
from tardis_fx.measure.machine import Machine
from tardis_fx.measure.tables import write_csv
from tardis_fx.measure.timing import LEAST_ROUNDS
from tardis_fx.plan import Plan

bench = typer.Typer(help="Time decoding against Inductor and print a Markdown table.", no_args_is_help=True)


def _widths(text: str) -> Widths:
    predictor, *others = map(int, text.split("/"))
    if predictor not in (2, 3, 4, 8) or len(others) not in (0, 2) or not {3, 4, 8, 16}.issuperset(others):
        raise ValueError
    return Widths(predictor, *others)


def _open_range(rate: float) -> float:
    if not 0 < rate < 0.5:
        raise typer.BadParameter(f"{rate} is not above 0 and below 0.5.")
    return rate


_NUMBERS = comma_separated(int, "positive whole numbers", lambda number: number > 0)
_DTYPES = comma_separated(str, "float32, bfloat16 or float16", get_args(DType).__contains__)
_WIDTHS = comma_separated(_widths, "2, 3, 4 or 8, or predictor/fold/rows (fold and rows: 3, 4, 8 or 16)")
DEFAULT_WIDTHS = Widths(2), Widths(4)
Bits = Annotated[
    Sequence[Widths],
    typer.Option(
        parser=_WIDTHS,
        metavar="BITS,...",
        help="Bits of the predictor (2, 3, 4 or 8), or of predictor/fold/rows such as 2/4/3 (fold and rows: 3, 4, 8 or "
        "16). Separate several with commas.",
    ),
]
Outliers = Annotated[float, typer.Option(callback=_open_range, help="Share of corrected (token, neuron) pairs.")]
Rounds = Annotated[int, typer.Option(min=LEAST_ROUNDS, help="Interleaved timing rounds, after one warm-up round.")]
Csv = Annotated[Path | None, typer.Option(callback=writable, help="Also write the figures to this CSV file.")]


@bench.command("ffn")
def time_ffn(
    d: Annotated[
        Sequence[int],
        typer.Option("--d", parser=_NUMBERS, metavar="N,...", help="Input sizes; the FFN has 4 d neurons."),
    ] = (1792, 4096),
    dtype: Annotated[
        Sequence[str], typer.Option(parser=_DTYPES, metavar="DTYPE,...", help="float32, bfloat16 or float16.")
    ] = ("float32", "bfloat16"),
    tokens: Annotated[
        Sequence[int], typer.Option(parser=_NUMBERS, metavar="N,...", help="Numbers of tokens in a step.")
    ] = (1, 4, 8, 64),
    bits: Bits = DEFAULT_WIDTHS,
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    copies: Annotated[
        int | None,
        typer.Option(min=1, help="FFNs called one after another; by default enough that no weight is in the cache."),
    ] = None,
    csv: Csv = None,
) -> None:
    """Time one FFN for each d, dtype and number of tokens; separate several values with commas."""
    cases = [bench_ffn(n, getattr(torch, t), tokens, bits, outliers, rounds, copies) for n in d for t in dtype]
    _show([timing for case in cases for timing in case], [], csv)


@bench.command("model")
def time_model(
    shape: Annotated[
        str | None,
        typer.Option(help="gpt2-xl (the default), opt-6.7b, falcon-7b, llama-7b, tinyllama-1.1b, gpt2 or demo."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--model", help="Folder of your own model, instead of --shape: config.json, weights.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Your plan for --model, instead of --bits and --outliers.")] = None,
    dtype: DType = "float32",
    bits: Bits = DEFAULT_WIDTHS[:1],
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    steps: Annotated[int, typer.Option(min=2, help="Tokens decoded in a round.")] = 32,
    context: Annotated[int, typer.Option(help="Length of the static cache.")] = 128,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of the model's layers; all by default.")] = None,
    csv: Csv = None,
) -> None:
    """Time a whole model at batch 1 with a static cache, and with torchao's integers where torchao is installed."""
    if folder and shape:
        raise ConfigError("--model takes the place of --shape: give one of them")
    if plan and not folder:
        raise ConfigError("--plan needs a model of your own: give its folder as --model, too")
    plans = Plan.load(plan) if plan else bits
    name = folder or shape or "gpt2-xl"
    timings, remarks = bench_model(name, getattr(torch, dtype), plans, outliers, rounds, steps, context, layers)
    _show(timings, remarks, csv)


def _show(timings: Sequence[Timing], remarks: Sequence[str], csv: Path | None) -> None:
    machine = Machine.measured()
    typer.echo("\n".join([report(timings, machine), *remarks]))
    if csv is not None:
        write_csv([timing.figures(machine) for timing in timings], csv)
