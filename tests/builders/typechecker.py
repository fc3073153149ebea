"""The checker of types and shapes that the tests run the package under."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep484Exception, BeartypeDecorHintPep673Exception

#: A float may be an int, and an int may be a size that is being traced.
_CONF = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({int: int | torch.SymInt}))
_checked = beartype(conf=_CONF)

F = TypeVar("F", bound=Callable[..., Any])


def typechecker(function: F) -> F:
    """Beartype, except for two annotations that only mypy reads: ``-> Self`` and ``**unknown: NoReturn``."""
    try:
        return _checked(function)
    except (BeartypeDecorHintPep673Exception, BeartypeDecorHintPep484Exception) as error:
        if "Self" not in str(error) and "NoReturn" not in str(error):
            raise
        return function
