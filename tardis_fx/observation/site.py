"""Observed sites, and the protocol of their observers."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from tardis_fx.graph.site import Site, SiteWeights

#: Share of each batch, its last tokens, that is used to measure the error and not to fit.
HELD_BACK = 1 / 8

#: How two values of an observer's attribute are merged: see :mod:`tardis_fx.observation.merging`.
Merge = Literal["sum", "least", "greatest", "joined", "parts"]


@runtime_checkable
class SiteObserver(Protocol):
    """Accumulates the statistics of a site that a rewrite needs.

    For calibration by several processes, or with checkpoints, it must also declare how it is merged; see
    :mod:`tardis_fx.observation.merging`.
    """

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds inputs of the site."""


@dataclass(frozen=True, eq=False)
class ObservedSite:
    """A site of the model with its weights.

    Attributes:
        site: as matched, with the reason if it is refused.
        fingerprint: of its weights.
        weights: in the model's dtype and on its device.
        parameters: the stored weights in the order of ``site.parameters``; the plain tensors of a tensor subclass.
    """

    site: Site
    fingerprint: str
    weights: SiteWeights
    parameters: tuple[Tensor, ...]


def fitted_tokens(tokens: int) -> int:
    """Number of leading tokens of a batch that are used to fit; the rest measure the error."""
    return tokens - int(tokens * HELD_BACK)


def thinned(tokens: Shaped[Tensor, "tokens ..."], most: int) -> Shaped[Tensor, "fewer ..."]:
    """At most ``most`` of the tokens, in order; drawn, because frames of speech repeat with a period."""
    if len(tokens) <= most:
        return tokens
    generator = torch.Generator(device="cpu").manual_seed(len(tokens))
    order = torch.randperm(len(tokens), generator=generator, dtype=torch.int64, device="cpu")
    return tokens[order[:most].sort().values.to(tokens.device)]
