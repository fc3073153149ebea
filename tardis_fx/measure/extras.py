"""Errors for missing libraries that only measurements need, and that the base installation omits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tardis_fx.errors import BenchError, TardisError


@contextmanager
def needed_by(user: str, error: type[TardisError] = BenchError) -> Iterator[None]:
    """Turns a failed import into an error that says what to install.

    Args:
        user: the feature that needs the library, as the subject of the message.
        error: the type to raise.
    """
    try:
        yield
    except ImportError as missing:
        raise error(f"{user} needs {missing.name}: pip install 'tardis-fx[demo]'") from missing
