"""The boundary to third-party code: turns exceptions of a rewrite into errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tardis_fx.errors import RewriteError, TardisError


@contextmanager
def raising_typed(action: str) -> Iterator[None]:
    """Turns exceptions into a :class:`RewriteError` that keeps the cause.

    Errors of this package, the exceptions by which Dynamo restarts or abandons a trace, and out-of-memory errors pass
    unchanged, because callers handle them by type.

    Args:
        action: names the rewrite, what it does and the site.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TardisError, torch.OutOfMemoryError, MemoryError, *_of_dynamo())):
            raise
        raise RewriteError(f"{action} raised {type(error).__name__}: {error}") from error


def _of_dynamo() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return TorchDynamoException, ConstraintViolationError
