"""The commands ``tardis bench ffn`` and ``tardis bench model``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tardis_fx.errors import BenchError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tardis_fx.bench.plans import Widths
    from tardis_fx.measure.table import Row

bench = typer.Typer(help="Time decoding beside Inductor: a Markdown table.", no_args_is_help=True)

Bits = Annotated[
    str,
    typer.Option(
        help="Bits of the predictor (2, 3, 4 or 8); as 2/4/3 also of fold and rows (3, 4, 8 or 16); commas between."
    ),
]
Outliers = Annotated[float, typer.Option(help="Share of the (token, neuron) pairs that are corrected.")]
Rounds = Annotated[int, typer.Option(help="Rounds in turn, after one to warm up; 9 or more.")]
Csv = Annotated[Path | None, typer.Option(help="Where the figures go, as CSV.")]


@bench.command()
def ffn(
    d: Annotated[str, typer.Option("--d", help="Inputs of the FFN, which has 4 d neurons.")] = "1792,4096",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    tokens: Annotated[str, typer.Option(help="Tokens of a step.")] = "1,4,8,64",
    bits: Bits = "2,4",
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    copies: Annotated[
        int | None, typer.Option(help="FFNs called in turn; as many as leave the last-level cache cold.")
    ] = None,
    csv: Csv = None,
) -> None:
    """One FFN, one case for each d, dtype and number of tokens; lists are given with commas."""
    sizes, dtypes, counts, widths = _numbers("d", d), _dtypes(dtype), _numbers("tokens", tokens), _bits(bits)
    _check(outliers, rounds, csv)
    if copies is not None and copies < 1:
        raise ConfigError(f"copies must be positive, not {copies}")
    from tardis_fx.bench.ffn import compare

    rows = [row for n in sizes for t in dtypes for row in compare(n, t, counts, widths, outliers, rounds, copies)]
    _show(rows, [], csv)


@bench.command()
def model(
    shape: Annotated[
        str | None,
        typer.Option(help="gpt2-xl (the default), opt-6.7b, falcon-7b, llama-7b, tinyllama-1.1b, gpt2 or demo."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--model", help="In place of a shape, a model of your own: config.json and weights.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Your plan for it, in place of --bits and --outliers.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    bits: Bits = "2",
    outliers: Outliers = 0.05,
    rounds: Rounds = 9,
    steps: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 32,
    context: Annotated[int, typer.Option(help="Length of the static cache.")] = 128,
    layers: Annotated[int | None, typer.Option(help="As many of the model's layers; all by default.")] = None,
    csv: Csv = None,
) -> None:
    """A whole model at batch 1 with a static cache; also beside and with torchao's integers, where it is installed."""
    dtypes, widths = _dtypes(dtype), _bits(bits)
    _check(outliers, rounds, csv)
    if len(dtypes) > 1:
        raise ConfigError(f"one dtype at a time, not {dtype}")
    if folder and shape:
        raise ConfigError("--model takes the place of --shape: give one of them")
    if plan and not folder:
        raise ConfigError("--plan is one for a model of your own: give its --model, too")
    from tardis_fx.bench.model import compare
    from tardis_fx.plan import Plan

    own = Plan.load(plan) if plan else None
    rows, remarks = compare(
        folder or shape or "gpt2-xl", dtypes[0], own or widths, outliers, rounds, steps, context, layers
    )
    _show(rows, remarks, csv)


def _show(rows: Sequence[Row], remarks: Sequence[str], csv: Path | None) -> None:
    from tardis_fx.measure.machine import Machine
    from tardis_fx.measure.table import markdown, write_csv

    machine = Machine.measured()
    typer.echo("\n".join([markdown(rows, machine), *remarks]))
    if csv is not None:
        write_csv(rows, machine, csv)


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} must be whole numbers with commas between, not {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError(f"{name} must be positive, not {text}")
    return numbers


def _bits(text: str) -> list[Widths]:
    from tardis_fx.bench.plans import Widths

    found = []
    for part in text.split(","):
        predictor, *rest = _numbers("bits", part.replace("/", ","))
        if predictor not in (2, 3, 4, 8):
            raise ConfigError(f"bits must be 2, 3, 4 or 8, not {predictor}")
        if len(rest) not in (0, 2) or not set(rest) <= {3, 4, 8, 16}:
            raise ConfigError(f"behind the predictor's come bits of fold and rows, of 3, 4, 8 or 16, not {part!r}")
        found.append(Widths(predictor, *rest))
    return found


def _dtypes(text: str) -> list[torch.dtype]:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wrong := [name for name in text.split(",") if name not in known]:
        raise ConfigError(f"dtype must be {', '.join(known)}, not {wrong[0]!r}")
    return [known[name] for name in text.split(",")]


def _check(outliers: float, rounds: int, csv: Path | None) -> None:
    from tardis_fx.measure.table import LEAST_ROUNDS

    if not 0 < outliers < 0.5:
        raise ConfigError(f"outliers must lie in (0, 0.5), not {outliers}")
    if rounds < LEAST_ROUNDS:
        raise ConfigError(f"rounds must be {LEAST_ROUNDS} or more, not {rounds}")
    if csv is not None and (csv.is_dir() or not os.access(csv.absolute().parent, os.W_OK)):
        raise BenchError(f"cannot write {csv}")  # told before minutes are spent
