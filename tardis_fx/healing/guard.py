"""Guards of trainable sites: their trainable bounds, and the distance of estimates past each bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from tardis_fx.runtime.reference import biased, surrogate_error


@runtime_checkable
class Guard(Protocol):
    """The guard of a site's guarded neurons."""

    #: For each bound, 1 if increasing it widens the hot range, or -1 if decreasing it does.
    outwards: ClassVar[tuple[int, ...]]
    #: [guarded, bounds], from the plan.
    bounds: Tensor
    #: [guarded], width of the hot ranges.
    width: Tensor

    def excess(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """Distance of neurons past each bound, [tokens, guarded]; positive values are outside.

        Args:
            z_hat: estimates without biases, k of [tokens, guarded].
            bounds: [guarded, bounds].
        """

    def tensor(self, bounds: Tensor) -> Tensor:
        """The guard tensor of a plan with other bounds."""


class Interval:
    """A lower and an upper bound of one estimate."""

    outwards: ClassVar[tuple[int, ...]] = (-1, 1)

    def __init__(self, guard: Tensor) -> None:
        self.bounds, self.width = guard, guard[:, 1] - guard[:, 0]

    def excess(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """See :meth:`Guard.excess`."""
        lower, upper = bounds.unbind(1)
        return [lower - z_hat[0], z_hat[0] - upper]

    def tensor(self, bounds: Tensor) -> Tensor:
        """See :meth:`Guard.tensor`."""
        return bounds


class Score:
    """Threshold on the distance between the response and a fixed plane of several estimates."""

    outwards: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, guard: Tensor, biases: Tensor | None, activation: str) -> None:
        """Takes planes and thresholds, [guarded, k + 2], and biases, [guarded, k], of an activation."""
        self._plane, self.bounds, self.width = guard[:, :-1], guard[:, -1:], guard[:, -1]
        self._biases, self._activation = biases, activation

    def excess(self, z_hat: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """See :meth:`Guard.excess`."""
        z_hat = biased(z_hat, self._biases, len(self._plane))
        return [surrogate_error(z_hat, self._plane, self._activation).abs() - bounds[:, 0]]

    def tensor(self, bounds: Tensor) -> Tensor:
        """See :meth:`Guard.tensor`."""
        return torch.cat([self._plane, bounds], 1)
