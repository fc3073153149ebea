"""Makes plans for random weights with a requested outlier rate, without calibration text.

The speed of a plan depends only on the bytes that it reads. Every neuron is guarded, and its hot range ends at
quantiles of the guard's level, so that the requested rate falls outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tardis_fx.config import Config
from tardis_fx.errors import BenchError
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.partial_linear.costs import Costs
from tardis_fx.partial_linear.draft import Draft, DraftObserver, Quantisation
from tardis_fx.partial_linear.settled import AffineValue, Settled
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.runtime.packing import low_bits
from tardis_fx.statistics.surrogates import Sums, products

#: Columns that share a scale and a zero point.
GROUP_SIZE = PartialLinear.Options().group_size


class Widths(NamedTuple):
    """Bits of a plan's predictor, folded weight, and rows that corrections read.

    16 stands for the model's own dtype.
    """

    predictor: int
    fold: int = 16
    rows: int = 16

    def costs(self, d: int, d_out: int, size: int, *, bias: bool, k: int = 1) -> Costs:
        """Bytes of a site; arguments as in :meth:`tardis_fx.partial_linear.costs.Costs.from_sizes`."""
        bits = self.predictor, size, self.fold, self.rows
        return Costs.from_sizes(d, d_out, *bits, k=k, group_size=GROUP_SIZE, bias=bias)

    def added(self, size: int) -> float:
        """Approximate bytes that a plan adds, relative to an FFN with four times as many neurons as inputs.

        A gated FFN with the same number of weights adds no more.

        Args:
            size: bytes of a weight.
        """
        wide = 8 * size
        fold = (wide if self.fold == 16 else self.fold) / 4
        rows = wide if self.rows == 16 else low_bits(self.predictor, self.rows) + self.rows  # W2 anew, or both in codes
        return (fold + self.predictor + rows) / (2 * wide)

    def __str__(self) -> str:
        parts = [f"{self.predictor} bits"]
        parts += [f"{part} {bits}" for part, bits in (("fold", self.fold), ("rows", self.rows)) if bits != 16]
        return ", ".join(parts)


class _Inputs:
    """Observer that keeps a site's inputs."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Stores tokens, [tokens, d]."""
        self._inputs.append(x)

    @property
    def x(self) -> Tensor:
        """All stored tokens, [tokens, d]."""
        return torch.cat(self._inputs)


def ffn_weights(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The weights of all FFNs of a model.

    Args:
        model: in eval mode.
        example: its first argument.
    """
    return [p for site in BatchObservation(model, [example], progress=False).sites for p in site.parameters]


@torch.no_grad()
def random_plans(model: nn.Module, batch: Tensor, widths: Sequence[Widths], rate: float) -> dict[Widths, Plan]:
    """Makes plans of every FFN of a model, by width.

    Args:
        model: in eval mode.
        batch: its first argument, of 500 tokens or more; thresholds are set on the resulting inputs of the FFNs.
        widths: of the plans.
        rate: share of (token, neuron) pairs that are outliers.

    Raises:
        BenchError: the model has no FFN that partial linearity accepts.
    """
    observation = BatchObservation(model, [batch], progress=False)
    rewrite = PartialLinear()
    sites = [s for s in observation.sites if s.site.reason is None and rewrite.refuse(s.site) is None]
    if not sites:
        raise BenchError("the model has no FFN that partial linearity takes")
    kept = observation.answer(Run("inputs of the FFNs", lambda _: _Inputs(), sites))
    return {
        w: Plan(
            tuple(_site_plan(site, kept[site.fingerprint].x, w, rate) for site in sites),
            Config(options={"predictor_bits": w.predictor, "fold_bits": w.fold, "row_bits": w.rows}, progress=False),
        )
        for w in widths
    }


def _site_plan(site: ObservedSite, x: Tensor, widths: Widths, rate: float) -> SitePlan:
    """Makes the plan of one site: every neuron guarded, limits at quantiles of the levels, codes rounded to nearest."""
    seen = DraftObserver(site)
    seen.update(x)
    draft = Draft.from_observer(site, seen, Quantisation(widths.predictor, GROUP_SIZE, "nearest"))
    level, (z, response) = draft.guard.level(draft.estimates(x)), draft.neurons.evaluate(x)
    limits = draft.guard.quantiles(level, rate)
    kept = ~draft.guard.leaves(level, limits)
    sums = Sums(torch.stack([torch.where(kept, one, 0).double().sum(0) for one in products(z, response)]), len(z))
    every = torch.ones(len(draft.neurons), dtype=torch.bool, device="cpu")
    columns = None if widths.rows == 16 else draft.columns(widths.rows)
    uncorrected = AffineValue(sums.regress().float())
    settled = Settled(draft, widths.fold, widths.rows, uncorrected, limits, every, ~every, columns)
    weight, bias = settled.store_fold(*uncorrected.fold(draft.neurons))
    costs = settled.costs
    return SitePlan.from_site(
        site.site,
        site.parameters,
        method=PartialLinear.name,
        touched_bytes=costs.fold + (costs.predictor + costs.row * rate) * len(every),
        outlier_rate=rate,
        settings=settled.settings,
        tensors=settled.tensors | {"folded_weight": weight, "folded_bias": bias},
    )
