"""How observers that saw different batches become one that saw them all.

An observer says it in ``merged``, a mapping from the names of its attributes to one of

    "sum"       a tensor or a number that is zero at first and to which every batch adds
    "least"     a tensor that is infinite at first; the smaller of two elements
    "greatest"  likewise, minus infinite; the greater
    "joined"    a list of tensors, [tokens] each, whose order says nothing
    "parts"     an observer, or a list of them, with a ``merged`` of its own

All other attributes are taken to be the same in every process. An observer that has seen nothing changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tardis_fx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tardis_fx.observation.ranks import Ranks

Merge = Literal["sum", "least", "greatest", "joined", "parts"]


@dataclass(frozen=True)
class Statistic:
    """One attribute of an observer that batches have changed.

    Attributes:
        owner: the observer.
        attribute: its name.
        how: it is merged.
    """

    owner: Any
    attribute: str
    how: Merge

    @property
    def value(self) -> Tensor:
        """As a tensor: the attribute itself where it is one."""
        held = getattr(self.owner, self.attribute)
        if self.how == "joined":
            return torch.cat(held) if held else torch.zeros(0, dtype=torch.float32, device="cpu")
        if isinstance(held, Tensor):
            return held
        return torch.tensor(held, dtype=torch.float64 if isinstance(held, float) else torch.int64, device="cpu")

    def assign(self, value: Tensor) -> None:
        """Puts a value of the same form in its place."""
        held = getattr(self.owner, self.attribute)
        if self.how == "joined":
            held[:] = [value]
        elif isinstance(held, Tensor):
            held.copy_(value)
        else:
            setattr(self.owner, self.attribute, value.item())

    @property
    def form(self) -> str:
        """What must be the same in two observers that are merged."""
        return self.how if self.how == "joined" else f"{self.how} {self.value.dtype} {tuple(self.value.shape)}"


def statistics(observers: Mapping[str, Any]) -> dict[str, Statistic]:
    """All that batches have changed in some observers, by the observers' names and the attributes'.

    Raises:
        CalibrationError: an observer does not say how it is merged.
    """
    return {name: each for key, observer in observers.items() for name, each in _walk(key, observer)}


def _walk(name: str, observer: Any) -> Iterator[tuple[str, Statistic]]:
    if not hasattr(observer, "merged"):
        raise CalibrationError(
            f"{type(observer).__name__} cannot be kept or shared with other processes: it has no `merged`, "
            "see tardis_fx.observation.merging"
        )
    for attribute, how in observer.merged.items():
        if how == "parts":
            held = getattr(observer, attribute)
            for i, part in enumerate(held if isinstance(held, list) else [held]):
                yield from _walk(f"{name}.{attribute}.{i}", part)
        else:
            yield f"{name}.{attribute}", Statistic(observer, attribute, how)


def merge(observers: Mapping[str, Any], ranks: Ranks) -> None:
    """Leaves the same in the observers of all ranks: what they have seen together.

    Raises:
        CalibrationError: an observer does not say how it is merged, those of two ranks differ in form, or a rank died.
    """
    found = statistics(observers)
    ranks.agree("statistics", {name: each.form for name, each in found.items()})
    for each in found.values():
        each.assign(ranks.merged(each.value, each.how))
