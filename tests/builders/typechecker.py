"""The checker of types and shapes that the tests run the package under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep484Exception, BeartypeDecorHintPep673Exception

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a float may be an int

F = TypeVar("F", bound=Callable[..., Any])


def typechecker(function: F) -> F:
    """Beartype, except for two annotations that only mypy reads: ``-> Self`` and ``**unknown: NoReturn``."""
    try:
        return _checked(function)
    except (BeartypeDecorHintPep673Exception, BeartypeDecorHintPep484Exception) as error:
        if "Self" not in str(error) and "NoReturn" not in str(error):
            raise
        return function
