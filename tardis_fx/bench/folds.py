"""Random plans of ``guarded_fold`` with a requested rate of outliers.

Every neuron is guarded, and its hot range ends at quantiles of the guard's level, so that the requested rate falls
outside.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.site import SiteWeights
from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.settled import AffineValue, Settled
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import low_bits
from tardis_fx.statistics.surrogates import Sums, products

#: Columns that share a scale and a zero point.
GROUP_SIZE = GuardedFold.Options().group_size


@dataclass(frozen=True)
class FoldRecipe:
    """Bits of a plan's predictor, folded weight, and rows that corrections read, and the rate of outliers.

    16 stands for the model's own dtype.
    """

    predictor: int
    fold: int = 16
    rows: int = 16
    rate: float = 0.05

    @property
    def rewrite(self) -> GuardedFold:
        """The rewrite of the plans."""
        return GuardedFold()

    @property
    def config(self) -> Config:
        """The config of the plans."""
        options = {"predictor_bits": self.predictor, "fold_bits": self.fold, "row_bits": self.rows}
        return Config(method=GuardedFold.name, options=options, progress=False)

    def added(self, size: int) -> float:
        """Approximate bytes that a plan adds, relative to an FFN with four times as many neurons as inputs.

        A gated FFN with the same number of weights adds no more. ``size`` is that of a weight in bytes.
        """
        wide = 8 * size
        fold = (wide if self.fold == 16 else self.fold) / 4
        rows = wide if self.rows == 16 else low_bits(self.predictor, self.rows) + self.rows  # down alone, or both
        return (fold + self.predictor + rows) / (2 * wide)

    def site_plan(self, site: ObservedSite, x: Float32[Tensor, "tokens d"]) -> SitePlan:
        """The plan of one site: every neuron guarded, limits at quantiles of the levels, codes rounded to nearest."""
        observer = DraftObserver(site)
        observer.update(x)
        draft = Draft.from_observer(site, observer, Quantisation(self.predictor, GROUP_SIZE, "nearest"))
        level, (z, response) = draft.guard.level(draft.estimates(x)), draft.neurons.evaluate(x)
        limits = draft.guard.quantiles(level, self.rate)
        folded = ~draft.guard.leaves(level, limits)
        sums = Sums(torch.stack([torch.where(folded, p, 0).double().sum(0) for p in products(z, response)]), len(z))
        every = torch.ones(len(draft.neurons), dtype=torch.bool, device="cpu")
        columns = None if self.rows == 16 else draft.columns(self.rows)
        uncorrected = AffineValue(sums.regress().float())
        settled = Settled(draft, self.fold, self.rows, uncorrected, limits, every, ~every, columns)
        weight, bias = settled.store_fold(*uncorrected.fold(draft.neurons))
        costs = settled.costs
        return SitePlan.from_site(
            site.site,
            site.parameters,
            method=GuardedFold.name,
            touched_bytes=costs.fold + (costs.predictor + costs.row * self.rate) * len(every),
            outlier_rate=self.rate,
            settings=settled.settings,
            tensors=settled.tensors | {"folded_weight": weight, "folded_bias": bias},
        )

    def step(self, entry: SitePlan, weights: SiteWeights, x: Float32[Tensor, "tokens d"]) -> tuple[float, float]:
        """Bytes that a step of several tokens reads, and the share of pairs that are outliers; a row counts once."""
        tensors, k = {name: tensor.to(x.device) for name, tensor in entry.tensors.items()}, len(weights.projections)
        parts = [tensors[name].unbind(1) for name in ("codes", "scale", "zero")]
        estimates = [
            reference.estimate(x, codes, scale, zero, self.predictor) for codes, scale, zero in zip(*parts, strict=True)
        ]
        biases = [bias for _, bias in weights.projections.values() if bias is not None]
        table = torch.stack(biases, 1).to(x.dtype) if len(biases) == k else None
        outlier = reference.outside(estimates, table, tensors["guard"], str(entry.activation))
        costs = Costs.from_weights(weights, self.predictor, self.fold, self.rows, GROUP_SIZE)
        read = costs.fold + costs.predictor * len(tensors["guard"]) + costs.row * int(outlier.any(0).sum())
        return read, float(outlier.float().mean())

    def __str__(self) -> str:
        if 16 not in (self.fold, self.rows):
            return f"guarded_fold, {self.predictor}/{self.fold}/{self.rows} bits"
        fold = "" if self.fold == 16 else f", fold {self.fold}"
        rows = "rows whole" if self.rows == 16 else f"rows {self.rows}"
        return f"guarded_fold, {self.predictor} bits{fold}, {rows}"
