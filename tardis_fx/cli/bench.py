"""The commands ``tardis bench ffn`` and ``tardis bench model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tardis_fx.bench.plans import Widths
from tardis_fx.bench.timings import Timing
from tardis_fx.cli.options import positive, torch_dtype, writable
from tardis_fx.errors import ConfigError
from tardis_fx.measure.timing import LEAST_ROUNDS

bench = typer.Typer(help="Time decoding against Inductor and print a Markdown table.", no_args_is_help=True)


def _checked_outliers(rate: float) -> float:
    if not 0 < rate < 0.5:
        raise ConfigError(f"outliers must lie in (0, 0.5), not {rate}")
    return rate


def _checked_rounds(count: int) -> int:
    if count < LEAST_ROUNDS:
        raise ConfigError(f"rounds must be {LEAST_ROUNDS} or more, not {count}")
    return count


Dtypes = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Bits = Annotated[
    str,
    typer.Option(
        help="Bits of the predictor (2, 3, 4 or 8), or of predictor/fold/rows such as 2/4/3 (fold and rows: 3, 4, 8 or "
        "16). Separate several with commas."
    ),
]
Outliers = Annotated[
    float, typer.Option(callback=_checked_outliers, help="Share of (token, neuron) pairs that are corrected.")
]
Rounds = Annotated[
    int, typer.Option(callback=_checked_rounds, help="Interleaved timing rounds, after one warm-up round; 9 or more.")
]
Csv = Annotated[Path | None, typer.Option(callback=writable, help="Also write the figures to this CSV file.")]


@bench.command("ffn")
def time_ffn(
    d: Annotated[str, typer.Option("--d", help="Input sizes; the FFN has 4 d neurons.")] = "1792,4096",
    dtype: Dtypes = "float32,bfloat16",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens in a step.")] = "1,4,8,64",
    bits: Bits = "2,4",
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    copies: Annotated[
        int | None,
        typer.Option(help="FFNs called one after another; by default enough that no weight is in the cache."),
    ] = None,
    csv: Csv = None,
) -> None:
    """Time one FFN for each d, dtype and number of tokens; separate several values with commas."""
    sizes, counts, widths = positive("d", d), positive("tokens", tokens), _widths(bits)
    dtypes = [torch_dtype(name) for name in dtype.split(",")]
    if copies is not None and copies < 1:
        raise ConfigError(f"copies must be positive, not {copies}")
    from tardis_fx.bench.ffn import bench_ffn

    timings = [bench_ffn(n, t, counts, widths, outliers, rounds, copies) for n in sizes for t in dtypes]
    _show([timing for case in timings for timing in case], [], csv)


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
    dtype: Dtypes = "float32",
    bits: Bits = "2",
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    steps: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 32,
    context: Annotated[int, typer.Option(help="Length of the static cache.")] = 128,
    layers: Annotated[int | None, typer.Option(help="Number of the model's layers; all by default.")] = None,
    csv: Csv = None,
) -> None:
    """Time a whole model at batch 1 with a static cache, and with torchao's integers where torchao is installed."""
    (kind, *others), widths = [torch_dtype(name) for name in dtype.split(",")], _widths(bits)
    if others:
        raise ConfigError(f"one dtype at a time, not {dtype}")
    if folder and shape:
        raise ConfigError("--model takes the place of --shape: give one of them")
    if plan and not folder:
        raise ConfigError("--plan is one for a model of your own: give its --model, too")
    from tardis_fx.bench.model import bench_model
    from tardis_fx.plan import Plan

    plans = Plan.load(plan) if plan else widths
    name = folder or shape or "gpt2-xl"
    _show(*bench_model(name, kind, plans, outliers, rounds, steps, context, layers), csv)


def _show(timings: Sequence[Timing], remarks: Sequence[str], csv: Path | None) -> None:
    from tardis_fx.bench.timings import report
    from tardis_fx.measure.machine import Machine
    from tardis_fx.measure.tables import write_csv

    machine = Machine.measured()
    typer.echo("\n".join([report(timings, machine), *remarks]))
    if csv is not None:
        write_csv([timing.figures(machine) for timing in timings], csv)


def _widths(text: str) -> list[Widths]:
    from tardis_fx.bench.plans import Widths

    widths = []
    for part in text.split(","):
        predictor, *rest = positive("bits", part.replace("/", ","))
        if predictor not in (2, 3, 4, 8):
            raise ConfigError(f"bits must be 2, 3, 4 or 8, not {predictor}")
        if len(rest) not in (0, 2) or not set(rest) <= {3, 4, 8, 16}:
            raise ConfigError(f"behind the predictor's come bits of fold and rows, of 3, 4, 8 or 16, not {part!r}")
        widths.append(Widths(predictor, *rest))
    return widths
