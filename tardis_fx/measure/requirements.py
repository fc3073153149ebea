"""Checks made before a measurement: libraries that the base installation omits, and files that must be writable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tardis_fx.errors import BenchError, TardisError


@contextmanager
def needed_by(user: str, error: type[TardisError] = BenchError) -> Iterator[None]:
    """Turns a failed import into an error that says what the user of the library needs, and how to install it."""
    try:
        yield
    except ImportError as missing:
        raise error(f"{user} needs {missing.name}: pip install 'tardis-fx[demo]'") from missing


def check_writable(path: Path, error: type[TardisError] = BenchError) -> None:
    """Raises an error if a file cannot be written, before minutes are spent on its contents."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise error(f"cannot write {path}: name a file in a folder that exists and is writable")
