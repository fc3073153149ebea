"""Options that several commands share, and the parsing of their text."""

import ast
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.measure.requirements import check_writable
from tardis_fx.passes.registry import check_rewrites, owners_of_options

T = TypeVar("T")
DType = Literal["float32", "bfloat16", "float16"]
FOLDER = "demo, or a folder with config.json, weights and tokenizer.json."
Model = Annotated[str, typer.Option(help=FOLDER)]
StoredDType = Annotated[Literal["auto", DType], typer.Option(help="auto: as stored.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: under torchrun each process takes a GPU.")]
Windows = Annotated[
    int, typer.Option(min=1, help="Number of 256-token windows of text; `compare` measures on as many others.")
]


def comma_separated(
    parse: Callable[[str], T], kind: str, valid: Callable[[T], bool] = lambda value: True
) -> Callable[[Any], list[T]]:
    """A parser of comma-separated values for an option; ``parse`` raises ValueError for a wrong one."""

    def parse_all(text: Any) -> list[T]:
        if not isinstance(text, str):  # the default
            return list(text)
        try:
            values = [parse(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(map(valid, values)):
            raise typer.BadParameter(f"expected {kind} separated by commas, not {text!r}")
        return values

    return parse_all


def writable(path: Path | None) -> Path | None:
    """Checks that a file can be written before minutes are spent on its contents."""
    if path is not None:
        check_writable(path)
    return path


def available(device: str) -> torch.device:
    """The device of this name; under torchrun, this process's.

    Raises:
        ConfigError: PyTorch does not find it.
    """
    if device == "cpu":
        return torch.device(device)
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no CUDA device: leave out --device cuda")
    return torch.device(device, int(os.environ.get("LOCAL_RANK", "0")))


def methods_with_settings(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parses methods separated by commas; each may have a colon and settings ``name=value`` separated by commas.

    Settings are fields of :class:`tardis_fx.Config`, options of the rewrites, and ``healed=True``.

    Raises:
        ConfigError: the text has another form, or a field is unknown.
    """
    fixed = [f.name for f in fields(Config) if f.name not in ("method", "options", "progress")] + ["healed"]
    methods: list[tuple[str, dict[str, Any]]] = []
    for method in re.split(r",(?=[^,:=]*(?:[,:]|$))", text):  # commas in front of a name, not of a setting
        name, colon, settings = (part.strip() for part in method.partition(":"))
        values: dict[str, Any] = {}
        for setting in settings.split(",") if colon else [name] if "=" in name else ():
            key, equals, value = (part.strip() for part in setting.partition("="))
            if not equals or not colon:
                raise ConfigError(f"methods are given as name or name:field=value,field=value, not {setting!r}")
            if key not in (known := [*fixed, *owners_of_options(name)]):
                raise ConfigError(f"unknown field {key!r} of {name}: {', '.join(known)}")
            try:
                values[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                values[key] = value
        methods.append((name, values))
    return methods


def config_of(method: str, settings: dict[str, Any]) -> tuple[Config, bool]:
    """The config of a method with its settings, and whether its plan is healed.

    Raises:
        ConfigError: a value is out of its range.
    """
    healed = settings.get("healed", False)
    if not isinstance(healed, bool):
        raise ConfigError(f"healed must be True or False, not {healed!r}")
    owners = owners_of_options(method)
    config = Config(method=method, **{k: v for k, v in settings.items() if k != "healed" and k not in owners})
    for name, value in settings.items():
        for rewrite in owners.get(name, ()):
            config = config.with_options(rewrite, **{name: value})
    check_rewrites(config)
    return config, healed
