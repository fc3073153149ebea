"""The plain TARDIS recipe (arXiv 2501.10054), for comparison.

1. The hot range of a neuron is the narrowest interval that holds a given share of its estimates, the same for all
   neurons (section 5.1).
2. Slope and intercept are least squares on the hot range; all neurons are folded and all are guarded.
3. The fold is not regressed.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.site import Site
from tardis_fx.guarded_fold.draft import Draft
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.passes.guarded_fold import GuardedFold


class Paper(GuardedFold):
    """The TARDIS recipe of the paper, for plain FFNs."""

    name: ClassVar[str] = "paper"
    regressed: ClassVar[bool] = False
    widths: ClassVar[tuple[tuple[int, int], ...]] = ((16, 16),)

    def refuse(self, site: Site) -> str | None:
        """Also refuses gated sites."""
        if site.kind == "gated":
            return "gated FFN: the paper's surrogate is a line in one pre-activation, and a gated neuron has two"
        return super().refuse(site)

    def floor(self, draft: Draft, widths: tuple[int, int]) -> int:
        """Bytes of the fold and of a predictor for every neuron."""
        costs = draft.costs(*widths)
        return costs.fold + costs.predictor * len(draft.neurons)

    def choose(self, sites: Sequence[PricedSite], allowed: float) -> list[tuple[PricedSite, Ranges]]:
        """Chooses hot ranges with the same outlier rate for every neuron of the model."""
        fixed = sum(site.costs.fold + site.costs.predictor * len(site.importance) for site in sites)
        rate = (allowed - fixed) / sum(site.costs.row * len(site.importance) for site in sites)
        if rate < 0:
            raise CalibrationError(
                f"the budget allows {allowed:,.0f} bytes per token; the fold and the predictor alone read {fixed:,}"
            )
        return [_frequent(site, rate) for site in sites]


def _frequent(site: PricedSite, rate: float) -> tuple[PricedSite, Ranges]:
    """Narrowest hot ranges that exclude at most ``rate`` of each neuron's tokens."""
    count = site.sums.count
    start, stop = _narrowest(count, (1 - rate) * count.sum(0))
    bins = torch.arange(len(count), dtype=torch.int64, device="cpu")[:, None]
    hot = (bins >= start) & (bins < stop)
    guarded = torch.ones(count.shape[1], dtype=torch.bool, device="cpu")
    return site.refit(hot), site.touching(hot, guarded, ~guarded)


def _narrowest(
    count: Float64[Tensor, "bins h"], wanted: Float64[Tensor, " h"]
) -> tuple[Int64[Tensor, " h"], Int64[Tensor, " h"]]:
    """Start and stop of each neuron's shortest run of bins that holds ``wanted`` tokens."""
    prefix = torch.cat([torch.zeros_like(count[:1]), count.cumsum(0)]).T.contiguous()
    best_start = torch.zeros_like(prefix[:, 0], dtype=torch.int64)
    best_stop = torch.full_like(best_start, len(count))
    for start in range(len(count)):
        target = (prefix[:, start] + wanted - 0.5)[:, None]
        stop = torch.searchsorted(prefix, target)[:, 0]
        better = (stop <= len(count)) & (stop - start < best_stop - best_start)
        best_start, best_stop = torch.where(better, start, best_start), torch.where(better, stop, best_stop)
    return best_start, best_stop
