"""The command ``tardis compare``."""

from __future__ import annotations

import ast
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tardis_fx.config import Config
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.passes.base import check_rewrites, owners_of_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tardis_fx.compare.cases import Case
    from tardis_fx.compare.subjects import Subject

#: That models may be cast to.
DTYPES = ("bfloat16", "float32", "float16")


def compare(
    model: Annotated[str, typer.Option(help="demo, or a folder: config.json, weights, tokenizer.json.")] = "demo",
    methods: Annotated[
        str,
        typer.Option(help="With commas; options and fields of Config after a colon: partial_linear:fold_bits=4,paper"),
    ] = "partial_linear,paper",
    budgets: Annotated[str, typer.Option(help="Fractions of the FFN's bytes, with commas.")] = "0.2,0.3",
    seeds: Annotated[str, typer.Option(help="Each chooses other calibration text; 0 spreads it evenly.")] = "0",
    text: Annotated[
        Path | None, typer.Option(help="A file: its first half calibrates, the second is measured on.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="That the model is cast to: bfloat16, float32 or float16.")] = "bfloat16",
    windows: Annotated[int, typer.Option(help="Of 256 tokens, to calibrate on, and as many to measure on.")] = 64,
    decode: Annotated[bool, typer.Option("--decode", help="Time decoding beside Inductor, in turns: slow.")] = False,
    out: Annotated[Path, typer.Option(help="Where finished cases are kept; a second run goes on.")] = Path(
        "compare.jsonl"
    ),
    plot: Annotated[Path | None, typer.Option(help="Where the Pareto plot goes.")] = None,
) -> None:
    """Compare rewrites over budgets on one model: quality, bytes, FLOPs, and decoding where asked."""
    chosen = cases(methods, [_number("budgets", part) for part in budgets.split(",")])
    numbers = [_whole("seeds", part) for part in seeds.split(",")]
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be {', '.join(DTYPES)}, not {dtype!r}")
    if windows < 1:
        raise ConfigError(f"windows must be positive, not {windows}")
    run(subject(model, text, dtype, windows), chosen, numbers, out, plot, decode=decode)


def run(
    subject: Subject,
    cases: Sequence[Case],
    seeds: Sequence[int],
    out: Path,
    plot: Path | None = None,
    *,
    decode: bool = False,
) -> None:
    """Compares, prints the table and draws the plot.

    Args:
        subject: the model.
        cases: what is compared.
        seeds: of the calibration text.
        out: file of the records.
        plot: file of the picture, or None.
        decode: whether decoding is timed.

    Raises:
        TardisError: a case, the text or a file cannot be used.
    """
    from tardis_fx.compare.compare import compare
    from tardis_fx.compare.records import Records
    from tardis_fx.compare.report import draw, table

    if plot is not None and (plot.is_dir() or not os.access(plot.absolute().parent, os.W_OK)):
        raise BenchError(f"cannot write {plot}")  # told before minutes are spent
    records = compare(subject, cases, seeds, Records(out), decode=decode)
    typer.echo(table(records, subject))
    if plot is not None:
        draw(records, subject, plot)


def subject(model: str, text: Path | None, dtype: str, windows: int) -> Subject:
    """The language model of a folder, cast to a dtype.

    Raises:
        TardisError: the folder holds no model, or the text cannot be used.
    """
    import torch

    from tardis_fx.compare.subjects import LanguageModel
    from tardis_fx.demo.model import FOLDER, load

    demo = load(FOLDER if model == "demo" else Path(model))
    demo.model.to(getattr(torch, dtype))
    return LanguageModel.of(f"{Path(model).name}, {dtype}", demo, text, windows)


def cases(methods: str, budgets: Sequence[float]) -> list[Case]:
    """The dense row, and every method at every budget; at its own one where a method gives budget or target_error.

    Args:
        methods: names with commas between; after a name a colon and fields of Config or options of the rewrite,
            ``name=value``, with commas; ``healed=True`` heals the plan.
        budgets: fractions of the dense bytes.

    Raises:
        ConfigError: a field is unknown, or a value out of its range.
    """
    from tardis_fx.compare.cases import Dense, Planned

    found: list[Case] = [Dense()]
    for method, given in _methods(methods):
        label = " ".join([method, *(f"{k}={v}" for k, v in given.items() if k != "budget")])
        own = {"budget", "target_error"} & set(given)
        for each in [given] if own else [{"budget": budget, **given} for budget in budgets]:
            config, healed = _parsed(method, each)
            found.append(Planned(label, replace(config, progress=False), healed))
    return found


def configs(methods: str) -> list[tuple[Config, bool]]:
    """The config of every method, and whether its plan is healed; ``methods`` as of :func:`cases`.

    Raises:
        ConfigError: a field is unknown, or a value out of its range.
    """
    return [_parsed(method, given) for method, given in _methods(methods)]


def _parsed(method: str, given: dict[str, Any]) -> tuple[Config, bool]:
    healed = given.get("healed", False)
    if not isinstance(healed, bool):
        raise ConfigError(f"healed must be True or False, not {healed!r}")
    owners = owners_of_options(method)
    config = Config(method=method, **{k: v for k, v in given.items() if k != "healed" and k not in owners})
    for name, value in given.items():
        for rewrite in owners.get(name, ()):
            config = config.with_options(rewrite, **{name: value})
    check_rewrites(config)
    return config, healed


def _methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names with what is given for each; a part that has ``=`` and no colon goes on with the method before it."""
    fixed = [f.name for f in fields(Config) if f.name not in ("method", "options", "progress")] + ["healed"]
    found: list[tuple[str, dict[str, Any]]] = []
    for part in text.split(","):
        name, colon, first = part.partition(":")
        field = part
        if colon or "=" not in part:
            found.append((name.strip(), {}))
            field = first
        if not field and not colon:
            continue
        key, equals, value = (piece.strip() for piece in field.partition("="))
        if not equals or not found:
            raise ConfigError(f"methods are given as name or name:field=value,field=value, not {part!r}")
        if key not in (known := [*fixed, *owners_of_options(found[-1][0])]):
            raise ConfigError(f"unknown field {key!r} of {found[-1][0]}: {', '.join(known)}")
        found[-1][1][key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be numbers with commas between, not {text!r}") from None


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} must be whole numbers with commas between, not {text!r}") from None
