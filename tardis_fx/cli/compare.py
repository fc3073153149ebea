"""The command ``tardis compare``, which compares rewrites on one model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from tardis_fx.cli.options import DType, Model, Windows, comma_separated, config_of, methods_with_settings, writable
from tardis_fx.compare.cases import Case, Dense, Planned
from tardis_fx.compare.compare import compare_rewrites
from tardis_fx.compare.records import Records
from tardis_fx.compare.report import draw, table
from tardis_fx.compare.subjects import load_subject
from tardis_fx.config import GOALS
from tardis_fx.demo.model import WINDOWS


def compare(
    model: Model = "demo",
    methods: Annotated[
        str, typer.Option(help="Options and fields of Config after a colon: guarded_fold:fold_bits=4,paper")
    ] = "partial_linear,paper",
    budgets: Annotated[
        Sequence[float],
        typer.Option(parser=comma_separated(float, "numbers"), metavar="X,...", help="Fractions of the FFN's bytes."),
    ] = (0.2, 0.3),
    seeds: Annotated[
        Sequence[int],
        typer.Option(
            parser=comma_separated(int, "whole numbers"),
            metavar="N,...",
            help="Each chooses other calibration text; 0 spreads its windows evenly.",
        ),
    ] = (0,),
    text: Annotated[
        Path | None, typer.Option(help="A file: its first half calibrates, quality is measured on the second.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Cast the model.")] = "bfloat16",
    windows: Windows = WINDOWS,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also time decoding against Inductor, in interleaved rounds: slow.")
    ] = False,
    out: Annotated[Path, typer.Option(help="File of finished cases; a second run resumes.")] = Path("compare.jsonl"),
    plot: Annotated[Path | None, typer.Option(callback=writable, help="Also draw a Pareto plot to this file.")] = None,
) -> None:
    """Compare rewrites over budgets on one model: quality, bytes, FLOPs, and decoding where asked."""
    rows = cases(methods, budgets)
    subject = load_subject(model, getattr(torch, dtype), text, windows)
    records = compare_rewrites(subject, rows, seeds, Records(out), decode=decode)
    typer.echo(table(records, subject))
    if plot is not None:
        draw(records, subject, plot)


def cases(methods: str, budgets: Sequence[float]) -> list[Case]:
    """The dense case, and every method at every budget, or at its own budget, bits or target if it gives one.

    Raises:
        ConfigError: a field is unknown, or a value out of range.
    """
    rows: list[Case] = [Dense()]
    for method, settings in methods_with_settings(methods):
        label = " ".join([method, *(f"{name}={value}" for name, value in settings.items() if name != "budget")])
        for values in [settings] if settings.keys() & GOALS else [{"budget": budget, **settings} for budget in budgets]:
            config, healed = config_of(method, values)
            rows.append(Planned(label, replace(config, progress=False), healed))
    return rows
