"""Recognises tensor subclasses with their own arithmetic: quantised, sharded and nested tensors."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def subclass_name(value: Any) -> str | None:
    """Library and type of a tensor with its own arithmetic, such as ``"torchao's Int8Tensor"``, else None."""
    kind = type(value)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return None
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return None
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"


def stored_tensors(values: Iterable[Tensor]) -> list[Tensor]:
    """The plain tensors that store the values, in a fixed order; a plain tensor stores itself."""
    stored: list[Tensor] = []
    for value in values:
        if is_traceable_wrapper_subclass(value):
            parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            stored += stored_tensors(part for part in parts if isinstance(part, Tensor))  # a DTensor has its mesh, too
        else:
            stored.append(value)
    return stored
