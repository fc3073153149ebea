"""Options that several commands share, and the parsing of their text.

Checks run as callbacks and raise this package's errors, so that a mistake gives one line and exit code 1. typer's own
types and parsers would print its usage text and give exit code 2.
"""

from __future__ import annotations

import ast
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from tardis_fx.config import Config
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.passes.registry import check_rewrites, owners_of_options

Number = TypeVar("Number", int, float)
Model = Annotated[str, typer.Option(help="demo, or a folder with config.json, weights and tokenizer.json.")]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype with the given name.

    Raises:
        ConfigError: a model cannot be cast to it.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype must be {', '.join(known)}, not {name!r}")
    return known[name]


def writable(path: Path | None) -> Path | None:
    """Checks that a file can be written before spending minutes."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise BenchError(f"cannot write {path}")
    return path


def numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    """Parses numbers separated by commas.

    Args:
        name: of the option.
        text: of the option.
        kind: int or float.

    Raises:
        ConfigError: the text is anything else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{name} must be {kinds} with commas between, not {text!r}") from None


def positive(name: str, text: str) -> list[int]:
    """Parses positive whole numbers separated by commas.

    Raises:
        ConfigError: the text is anything else.
    """
    found = numbers(name, text, int)
    if min(found) < 1:
        raise ConfigError(f"{name} must be positive, not {text}")
    return found


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
            values[key] = _literal(value)
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


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
