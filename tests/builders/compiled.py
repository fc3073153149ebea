"""Models on the tardis backend."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn


@overload
def compiled(model: nn.Module, plan: Any, **options: Any) -> nn.Module: ...


@overload
def compiled(model: Callable[..., Any], plan: Any, **options: Any) -> Callable[..., Any]: ...


def compiled(
    model: Callable[..., Any],
    plan: Any,
    *,
    inner: str | None = "eager",
    fullgraph: bool = True,
    dynamic: bool | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """As a user would write it, but with a quick inner backend; ``inner=None`` is the default one."""
    given: Any = {"plan": plan} | ({"inner": inner} if inner else {}) | options
    return torch.compile(model, backend="tardis", options=given, fullgraph=fullgraph, dynamic=dynamic)
