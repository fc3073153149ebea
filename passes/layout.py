"""Layouts: each rewrite declares the tensors of its entries, and they are checked against it.

Kernels and ``index_select`` on a GPU do not check indices, and NaN spreads silently through a model. So names, dtypes,
shapes, indices and scales of an entry are compared with the layout of its rewrite before they are used.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tardis_fx.plan import SitePlan
from tardis_fx.runtime import tables
from tardis_fx.runtime.packing import group_count, packed_bytes, row_bytes, split


@dataclass(frozen=True)
class Expected:
    """The expected properties of one tensor of an entry.

    Attributes:
        dtype: of the tensor.
        shape: of the tensor.
        below: the values are distinct integers from 0 to less than this one; None for no check.
        unbounded: whether infinities are allowed; NaN never is.
        row: bits and columns of rows of codes with their scales (:func:`tardis_fx.runtime.packing.join`), or None.
        scaled: whether every row ends in a scale (:func:`tardis_fx.runtime.tables.join`).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    below: int | None = None
    unbounded: bool = False
    row: tuple[int, int] | None = None
    scaled: bool = False


#: Tensors by name: of an entry, or read by the rewritten site.
Tensors = Mapping[str, Tensor]

#: The expected tensors of an entry, by name.
Layout = dict[str, Expected]


def indices(count: int, below: int) -> Expected:
    """Distinct indices of neurons, [count], int32."""
    return Expected(torch.int32, (count,), below)


def codes(prefix: str, rows: tuple[int, ...], columns: int, bits: int, group_size: int) -> Layout:
    """Codes, scales and zero points of a matrix [*rows, columns], as separate tensors."""
    groups = group_count(columns, group_size)
    return {
        f"{prefix}codes": Expected(torch.uint8, (*rows, packed_bytes(columns, bits))),
        f"{prefix}scale": Expected(torch.float16, (*rows, groups)),
        f"{prefix}zero": Expected(torch.uint8, (*rows, groups)),
    }


def coded_rows(rows: int, columns: int, bits: int, group_size: int) -> Expected:
    """Rows of codes with scales, from :func:`tardis_fx.runtime.packing.join`."""
    return Expected(torch.uint8, (rows, row_bytes(columns, bits, group_size)), row=(bits, columns))


def table_rows(rows: int, columns: int, bits: int) -> Expected:
    """Rows of codes with a scale each, from :func:`tardis_fx.runtime.tables.join`."""
    return Expected(torch.uint8, (rows, tables.row_bytes(columns, bits)), scaled=True)


def like(tensors: Tensors) -> Layout:
    """Layout with the dtypes and shapes of the given tensors."""
    return {name: Expected(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def setting(plan: SitePlan, name: str, allowed: Collection[Any]) -> Any:
    """Reads and checks one of an entry's settings.

    Raises:
        ValueError: it is missing, not among the allowed values, or of another type.
    """
    value = plan.settings.get(name)
    if not (value in allowed and type(value) in map(type, allowed)):  # True == 1 == 1.0
        few = allowed if len(allowed) <= 16 else f"{min(allowed)} to {max(allowed)}"
        raise ValueError(f"setting {name} must be one of {few}, not {str(value)[:80]}")
    return value


def check_settings(plan: SitePlan, *names: str) -> None:
    """Checks that an entry has settings of these names and no others.

    Raises:
        ValueError: it has others.
    """
    if plan.settings.keys() != set(names):
        raise ValueError(f"it has the settings {', '.join(plan.settings)[:200]}, not {', '.join(names)}")


def check(tensors: Tensors, layout: Layout) -> None:
    """Checks tensors against a layout.

    Raises:
        ValueError: they do not match.
    """
    if wrong := sorted(tensors.keys() ^ layout.keys()):
        raise ValueError(f"tensors are missing or not known: {', '.join(wrong)[:200]}")
    for name, expected in layout.items():
        if reason := _difference(tensors[name], expected):
            raise ValueError(f"tensor {name} {reason}")


def _difference(tensor: Tensor, expected: Expected) -> str | None:
    if (tensor.dtype, tuple(tensor.shape)) != (expected.dtype, expected.shape):
        return (
            f"is {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"where {expected.dtype} of shape {expected.shape} is expected"
        )
    if tensor.is_floating_point() and not _is_finite(tensor, unbounded=expected.unbounded):
        return "holds NaN" if expected.unbounded else "holds NaN or infinity"
    if expected.row is not None and not _is_finite(split(tensor, *expected.row)[1], unbounded=False):
        return "holds a scale that is NaN or infinity"
    if expected.scaled and not _is_finite(tables.scales(tensor), unbounded=False):
        return "holds a scale that is NaN or infinity"
    if expected.below is not None and len(tensor):
        least, most = (int(value) for value in tensor.aminmax())
        if least < 0 or most >= expected.below:
            return f"has indices from {least} to {most}, where 0 to {expected.below - 1} are allowed"
        if len(tensor.unique()) < len(tensor):
            return "has an index twice"
    return None


def _is_finite(tensor: Tensor, *, unbounded: bool) -> bool:
    return not bool(tensor.isnan().any()) if unbounded else bool(tensor.isfinite().all())
