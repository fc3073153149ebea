"""The command ``tardis compare``, which compares rewrites on one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tardis_fx.cli.options import Model, config_of, methods_with_settings, numbers, torch_dtype, writable
from tardis_fx.compare.cases import Case


def compare(
    model: Model = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas; options and fields of Config after a colon: partial_linear:fold_bits=4,paper"
        ),
    ] = "partial_linear,paper",
    budgets: Annotated[str, typer.Option(help="Fractions of the FFN's bytes, separated by commas.")] = "0.2,0.3",
    seeds: Annotated[
        str, typer.Option(help="Each chooses other calibration text; 0 spreads its windows evenly.")
    ] = "0",
    text: Annotated[
        Path | None, typer.Option(help="A file: its first half calibrates, quality is measured on the second.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Cast the model to bfloat16, float32 or float16.")] = "bfloat16",
    windows: Annotated[
        int, typer.Option(help="Number of 256-token windows to calibrate on, and as many to measure on.")
    ] = 64,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also time decoding against Inductor, in interleaved rounds: slow.")
    ] = False,
    out: Annotated[Path, typer.Option(help="File of finished cases; a second run resumes after them.")] = Path(
        "compare.jsonl"
    ),
    plot: Annotated[Path | None, typer.Option(callback=writable, help="Also draw a Pareto plot to this file.")] = None,
) -> None:
    """Compare rewrites over budgets on one model: quality, bytes, FLOPs, and decoding where asked."""
    chosen = cases(methods, numbers("budgets", budgets, float))
    drawn = numbers("seeds", seeds, int)
    from tardis_fx.compare.compare import compare_rewrites
    from tardis_fx.compare.records import Records
    from tardis_fx.compare.report import draw, table
    from tardis_fx.compare.subjects import load_subject

    subject = load_subject(model, torch_dtype(dtype), text, windows)
    records = compare_rewrites(subject, chosen, drawn, Records(out), decode=decode)
    typer.echo(table(records, subject))
    if plot is not None:
        draw(records, subject, plot)


def cases(methods: str, budgets: Sequence[float]) -> list[Case]:
    """The dense case, and every method at every budget, or at its own budget or target_error if it gives one.

    Args:
        methods: as for :func:`tardis_fx.cli.options.methods_with_settings`.
        budgets: fractions of the dense bytes.

    Raises:
        ConfigError: a field is unknown, or a value out of range.
    """
    from tardis_fx.compare.cases import Dense, Planned

    rows: list[Case] = [Dense()]
    for method, settings in methods_with_settings(methods):
        label = " ".join([method, *(f"{name}={value}" for name, value in settings.items() if name != "budget")])
        own_budget = {"budget", "target_error"} & set(settings)
        for each in [settings] if own_budget else [{"budget": budget, **settings} for budget in budgets]:
            config, healed = config_of(method, each)
            rows.append(Planned(label, replace(config, progress=False), healed))
    return rows
