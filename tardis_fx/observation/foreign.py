"""The boundary to code that others wrote: what a rewrite raises becomes an error that names it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tardis_fx.errors import RewriteError, TardisError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def raising_typed(what: str) -> Iterator[None]:
    """Turns exceptions into a :class:`RewriteError` with their cause.

    Untouched are errors of this package, what Dynamo raises to restart or to give up a trace, and memory that ran out,
    which callers handle by type.

    Args:
        what: the rewrite, what it was doing, and at which site.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TardisError, torch.OutOfMemoryError, MemoryError, *_of_dynamo())):
            raise
        raise RewriteError(f"{what} raised {type(error).__name__}: {error}") from error


def _of_dynamo() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return TorchDynamoException, ConstraintViolationError
