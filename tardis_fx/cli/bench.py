"""The commands ``tardis bench ffn`` and ``tardis bench model``."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, get_args

import torch
import typer

from tardis_fx.bench import shapes
from tardis_fx.bench.codes import CALIBRATED, FEW, FOUR_BITS, CodedRecipe, Reads
from tardis_fx.bench.ffn import Shape, bench_ffn
from tardis_fx.bench.folds import FoldRecipe
from tardis_fx.bench.llama_cpp import llama_cpp
from tardis_fx.bench.model import bench_model
from tardis_fx.bench.plans import Recipe
from tardis_fx.bench.timings import Timing, report
from tardis_fx.cli.options import DType, comma_separated, writable
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Kind
from tardis_fx.measure.machine import Machine
from tardis_fx.measure.tables import write_csv
from tardis_fx.measure.timing import LEAST_ROUNDS
from tardis_fx.partial_linear.precision import Widths
from tardis_fx.plan import Plan

bench = typer.Typer(help="Time decoding against Inductor and print a Markdown table.", no_args_is_help=True)


def _bits(text: str) -> FoldRecipe:
    predictor, *others = map(int, text.split("/"))
    if predictor not in (2, 3, 4, 8) or len(others) not in (0, 2) or not {3, 4, 8, 16}.issuperset(others):
        raise ValueError
    return FoldRecipe(predictor, *others)


def _reads(text: str) -> Reads:
    """Parses ``projections/columns/fold:shares``, with base and refinement such as 2+3/4+2/4:0.5/0.2/0.1."""
    bits, shares = text.split(":")
    projections, columns, fold = bits.split("/")
    widths = Widths(*map(int, [*projections.split("+"), *columns.split("+"), fold]))
    parts = [float(share) for share in shares.split("/")]
    if not (set(widths[:4]) <= set(range(1, 9)) and widths.fold_bits in range(9) and len(parts) in (3, 4)):
        raise ValueError
    if not all(0 <= part <= 1 for part in parts):
        raise ValueError
    return Reads(widths, *parts)


def _open_range(rate: float) -> float:
    if not 0 < rate < 0.5:
        raise typer.BadParameter(f"{rate} is not above 0 and below 0.5.")
    return rate


_NUMBERS = comma_separated(int, "positive whole numbers", lambda number: number > 0)
_DTYPES = comma_separated(str, "float32, bfloat16 or float16", get_args(DType).__contains__)
_KINDS = comma_separated(str, "plain or gated", get_args(Kind).__contains__)
_BITS = comma_separated(_bits, "2, 3, 4 or 8, or predictor/fold/rows (fold and rows: 3, 4, 8 or 16)")
_READS = comma_separated(_reads, "projections/columns/fold:column/row/refinement[/up], such as 2+3/4+2/4:0.5/0.2/0.1,")
#: Guarded folds of a model that are timed by default.
FOLDS = FoldRecipe(2), FoldRecipe(2, 4, 4)
Bits = Annotated[
    Sequence[FoldRecipe],
    typer.Option(
        parser=_BITS,
        metavar="BITS,...",
        help="Of guarded_fold: bits of the predictor (2, 3, 4 or 8), or of predictor/fold/rows such as 2/4/3 (fold and "
        "rows: 3, 4, 8 or 16). Separate several with commas.",
    ),
]
Reading = Annotated[
    Sequence[Reads] | None,
    typer.Option(
        parser=_READS,
        metavar="BITS:SHARES,...",
        help="Of partial_linear: bits of projections, columns (base+refinement) and fold (0: none), and the shares of "
        "(token, neuron) pairs that read the column, the projections' refinements, the column's refinement and, in a "
        "gated FFN, up: 2+3/4+2/4:0.5/0.2/0.1.",
    ),
]
Outliers = Annotated[
    float, typer.Option(callback=_open_range, help="Of guarded_fold: share of corrected (token, neuron) pairs.")
]
Rounds = Annotated[int, typer.Option(min=LEAST_ROUNDS, help="Interleaved timing rounds, after one warm-up round.")]
Csv = Annotated[Path | None, typer.Option(callback=writable, help="Also write the figures to this CSV file.")]


@bench.command("ffn")
def time_ffn(
    shape: Annotated[Sequence[Kind], typer.Option(parser=_KINDS, metavar="KIND,...", help="plain or gated.")] = (
        "plain",
        "gated",
    ),
    d: Annotated[Sequence[int], typer.Option("--d", parser=_NUMBERS, metavar="N,...", help="Input sizes.")] = (2048,),
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Neurons; by default 4 d, and 2.75 d in a gated FFN, as in Llama.")
    ] = None,
    dtype: Annotated[
        Sequence[str], typer.Option(parser=_DTYPES, metavar="DTYPE,...", help="float32, bfloat16 or float16.")
    ] = ("bfloat16",),
    tokens: Annotated[
        Sequence[int], typer.Option(parser=_NUMBERS, metavar="N,...", help="Numbers of tokens in a step.")
    ] = (1, 4, 8, 16, 32),
    bits: Bits = (),
    outliers: Outliers = 0.05,
    reads: Reading = None,
    rounds: Rounds = 9,
    copies: Annotated[
        int | None,
        typer.Option(min=1, help="FFNs called one after another; by default enough that no weight is in the cache."),
    ] = None,
    csv: Csv = None,
) -> None:
    """Time one FFN for each shape, d, dtype and number of tokens; separate several values with commas."""
    timings: list[Timing] = []
    remarks: list[str] = []
    for kind, n, name in itertools.product(shape, d, dtype):
        recipes = [*_folds(bits, outliers), *(_coded(reads) if reads else [FEW[kind]])]
        ffn = Shape(kind, n, hidden or (4 * n if kind == "plain" else 11 * n // 4))
        rows, notes = bench_ffn(ffn, getattr(torch, name), tokens, recipes, rounds, copies)
        timings += rows
        remarks += notes
    _show(timings, remarks, csv)


@bench.command("model")
def time_model(
    shape: Annotated[
        str | None,
        typer.Option(help="gpt2-xl (the default), opt-6.7b, falcon-7b, llama-7b, tinyllama-1.1b, gpt2 or demo."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--model", help="Folder of your own model, instead of --shape: config.json, weights.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Your plan for --model, instead of random ones.")] = None,
    dtype: DType = "bfloat16",
    method: Annotated[
        Literal["partial_linear", "guarded_fold"], typer.Option(help="Of random plans.")
    ] = "partial_linear",
    bits: Bits = FOLDS[1:],
    outliers: Outliers = 0.05,
    reads: Reading = None,
    rounds: Rounds = 9,
    steps: Annotated[int, typer.Option(min=2, help="Tokens decoded in a round.")] = 32,
    context: Annotated[int, typer.Option(help="Length of the static cache.")] = 128,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of the model's layers; all by default.")] = None,
    programs: Annotated[
        Path | None,
        typer.Option("--llama-cpp", help="Folder of llama-bench, to time llama.cpp with weights of 8 and of 4 bits."),
    ] = None,
    csv: Csv = None,
) -> None:
    """Time a whole model at batch 1 with a static cache, and with torchao's integers where torchao is installed."""
    if folder and shape:
        raise ConfigError("--model takes the place of --shape: give one of them")
    if plan and not folder:
        raise ConfigError("--plan needs a model of your own: give its folder as --model, too")
    coded = _coded(reads) if reads else [CALIBRATED, FOUR_BITS]
    recipes = coded if method == "partial_linear" else _folds(bits, outliers)
    plans = Plan.load(plan) if plan else recipes
    name = folder or shape or "gpt2-xl"
    with TemporaryDirectory() as files:
        config = shapes.config_of(name, layers)
        rivals = llama_cpp(programs, config, steps, Path(files)) if programs else {}
        timings, remarks = bench_model(
            name, getattr(torch, dtype), plans, rounds, steps, context, layers, rivals=rivals
        )
    _show(timings, remarks, csv)


def _folds(bits: Sequence[FoldRecipe], outliers: float) -> Sequence[Recipe]:
    return [replace(recipe, rate=outliers) for recipe in bits]


def _coded(reads: Sequence[Reads]) -> Sequence[Recipe]:
    return [CodedRecipe(str(one), one, one) for one in reads]


def _show(timings: Sequence[Timing], remarks: Sequence[str], csv: Path | None) -> None:
    machine = Machine.measured()
    typer.echo("\n".join([report(timings, machine), *remarks]))
    if csv is not None:
        write_csv([timing.figures(machine) for timing in timings], csv)
