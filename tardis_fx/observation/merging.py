"""Merges observers that saw different batches into one that saw all of them.

An observer declares this in ``merged``, a mapping from the names of its attributes to one of

    "sum"       a tensor or a number that starts at zero and to which every batch adds
    "least"     a tensor that starts at infinity and takes the elementwise minimum
    "greatest"  a tensor that starts at minus infinity and takes the elementwise maximum
    "joined"    a list of tensors, [tokens] each, whose order does not matter
    "parts"     an observer, or a list of observers, with its own ``merged``

All other attributes must be the same in every process. Merging an observer that has seen nothing changes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.ranks import Ranks
from tardis_fx.observation.site import Merge


@dataclass(frozen=True)
class Statistic:
    """One attribute of an observer that batches change, and the rule by which it is merged."""

    owner: Any
    attribute: str
    how: Merge

    @property
    def value(self) -> Tensor:
        """The value as a tensor: the attribute itself if it is one."""
        value = getattr(self.owner, self.attribute)
        if self.how == "joined":
            return torch.cat(value) if value else torch.zeros(0, dtype=torch.float32, device="cpu")
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64, device="cpu")

    def assign(self, value: Tensor) -> None:
        """Replaces the value by one of the same form."""
        current = getattr(self.owner, self.attribute)
        if self.how == "joined":
            current[:] = [value]
        elif isinstance(current, Tensor):
            current.copy_(value)
        else:
            setattr(self.owner, self.attribute, value.item())

    @property
    def form(self) -> str:
        """Description that must be equal in two observers to merge them."""
        return self.how if self.how == "joined" else f"{self.how} {self.value.dtype} {tuple(self.value.shape)}"


def statistics(observers: Mapping[str, Any]) -> dict[str, Statistic]:
    """All attributes of observers that batches change, by the names of observer and attribute.

    Raises:
        CalibrationError: an observer has no ``merged``.
    """
    return {name: stat for key, observer in observers.items() for name, stat in _walk(key, observer)}


def _walk(name: str, observer: Any) -> Iterator[tuple[str, Statistic]]:
    if not hasattr(observer, "merged"):
        raise CalibrationError(
            f"{type(observer).__name__} cannot be stored or shared with other processes: it has no `merged`, "
            "see tardis_fx.observation.merging"
        )
    for attribute, how in observer.merged.items():
        if how == "parts":
            parts = getattr(observer, attribute)
            for i, part in enumerate(parts if isinstance(parts, list) else [parts]):
                yield from _walk(f"{name}.{attribute}.{i}", part)
        else:
            yield f"{name}.{attribute}", Statistic(observer, attribute, how)


def merge(observers: Mapping[str, Any], ranks: Ranks) -> None:
    """Merges the observers of all ranks, so that each holds the statistics of all batches.

    Raises:
        CalibrationError: an observer has no ``merged``, the observers of two ranks differ in form, or a rank died.
    """
    by_name = statistics(observers)
    ranks.agree("statistics", {name: statistic.form for name, statistic in by_name.items()})
    for statistic in by_name.values():
        statistic.assign(ranks.merged(statistic.value, statistic.how))
