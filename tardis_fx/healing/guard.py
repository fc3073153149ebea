"""The guards of trainable sites: which of their numbers are trained, and how far beyond them estimates lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from tardis_fx.runtime.reference import biased, surrogate_error

if TYPE_CHECKING:
    from collections.abc import Sequence


class Guard(Protocol):
    """The guard of the guarded neurons of a site."""

    #: Of each bound, whether a hot range widens as it grows (1) or as it falls (-1).
    outwards: ClassVar[tuple[int, ...]]
    #: [guarded, bounds], as the plan has them.
    bounds: Tensor
    #: [guarded], of the hot ranges.
    width: Tensor

    def beyond(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """How far beyond each bound neurons are, [tokens, guarded]; above zero is outside.

        Args:
            z_hat: estimates without biases, k of [tokens, guarded].
            bounds: [guarded, bounds].
        """

    def tensor(self, bounds: Tensor) -> Tensor:
        """The guard with other bounds, as the plan has it."""


class Interval:
    """A lower and an upper bound of one estimate."""

    outwards: ClassVar[tuple[int, ...]] = (-1, 1)

    def __init__(self, guard: Tensor) -> None:
        self.bounds, self.width = guard, guard[:, 1] - guard[:, 0]

    def beyond(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """See :meth:`Guard.beyond`."""
        lower, upper = bounds.unbind(1)
        return [lower - z_hat[0], z_hat[0] - upper]

    def tensor(self, bounds: Tensor) -> Tensor:
        """See :meth:`Guard.tensor`."""
        return bounds


class Score:
    """A threshold of the distance between response and plane of several estimates; the plane is fixed."""

    outwards: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, guard: Tensor, biases: Tensor | None, activation: str) -> None:
        """Takes planes and thresholds, [guarded, k + 2], and biases, [guarded, k], of an activation."""
        self._plane, self.bounds, self.width = guard[:, :-1], guard[:, -1:], guard[:, -1]
        self._biases, self._activation = biases, activation

    def beyond(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """See :meth:`Guard.beyond`."""
        z_hat = biased(z_hat, self._biases, len(self._plane))
        return [surrogate_error(z_hat, self._plane, self._activation).abs() - bounds[:, 0]]

    def tensor(self, bounds: Tensor) -> Tensor:
        """See :meth:`Guard.tensor`."""
        return torch.cat([self._plane, bounds], 1)
