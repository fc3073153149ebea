"""Makes plans for random weights with a requested outlier rate, without calibration text.

The speed of a plan depends only on the bytes that it reads. Every neuron is guarded, and its hot range ends at
quantiles of the guard's level, so that the requested rate falls outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tardis_fx.config import Config
from tardis_fx.errors import BenchError
from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.settled import AffineValue, Settled
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.runtime.packing import low_bits
from tardis_fx.statistics.surrogates import Sums, products

#: Columns that share a scale and a zero point.
GROUP_SIZE = GuardedFold.Options().group_size


@dataclass(frozen=True)
class Widths:
    """Bits of a plan's predictor, folded weight, and rows that corrections read.

    16 stands for the model's own dtype.
    """

    predictor: int
    fold: int = 16
    rows: int = 16

    def costs(self, d: int, d_out: int, size: int) -> Costs:
        """Bytes of a plain FFN with biases; arguments as in :meth:`tardis_fx.guarded_fold.costs.Costs.from_sizes`."""
        bits = self.predictor, size, self.fold, self.rows
        return Costs.from_sizes(d, d_out, *bits, k=1, group_size=GROUP_SIZE, bias=True)

    def added(self, size: int) -> float:
        """Approximate bytes that a plan adds, relative to an FFN with four times as many neurons as inputs.

        A gated FFN with the same number of weights adds no more. ``size`` is that of a weight in bytes.
        """
        wide = 8 * size
        fold = (wide if self.fold == 16 else self.fold) / 4
        rows = wide if self.rows == 16 else low_bits(self.predictor, self.rows) + self.rows  # down alone, or both
        return (fold + self.predictor + rows) / (2 * wide)

    def __str__(self) -> str:
        parts = [f"{self.predictor} bits"]
        parts += [f"{part} {bits}" for part, bits in (("fold", self.fold), ("rows", self.rows)) if bits != 16]
        return ", ".join(parts)


class _Inputs(list[Tensor]):
    """Observer that keeps a site's inputs."""

    update = list[Tensor].append


def ffn_weights(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The weights of all FFNs of a model in eval mode, found by running it on an example of its first argument."""
    return [p for site in BatchObservation(model, [example], progress=False).sites for p in site.parameters]


@torch.no_grad()
def random_plans(model: nn.Module, batch: Tensor, widths: Sequence[Widths], rate: float) -> dict[Widths, Plan]:
    """Makes plans of every FFN of a model in eval mode, by width; a rate of the (token, neuron) pairs are outliers.

    Thresholds are set on the inputs of the FFNs for a batch, the model's first argument, of 500 tokens or more.

    Raises:
        BenchError: the model has no FFN that the guarded fold accepts.
    """
    observation = BatchObservation(model, [batch], progress=False)
    rewrite = GuardedFold()
    sites = [s for s in observation.sites if s.site.reason is None and rewrite.refuse(s.site) is None]
    if not sites:
        raise BenchError("the model has no FFN that the guarded fold accepts")
    inputs = observation.answer(Run("inputs of the FFNs", lambda _: _Inputs(), sites))
    return {
        w: Plan(
            tuple(_site_plan(site, torch.cat(inputs[site.fingerprint]), w, rate) for site in sites),
            Config(
                method=GuardedFold.name,
                options={"predictor_bits": w.predictor, "fold_bits": w.fold, "row_bits": w.rows},
                progress=False,
            ),
        )
        for w in widths
    }


def _site_plan(site: ObservedSite, x: Float[Tensor, "tokens d"], widths: Widths, rate: float) -> SitePlan:
    """Makes the plan of one site: every neuron guarded, limits at quantiles of the levels, codes rounded to nearest."""
    observer = DraftObserver(site)
    observer.update(x)
    draft = Draft.from_observer(site, observer, Quantisation(widths.predictor, GROUP_SIZE, "nearest"))
    level, (z, response) = draft.guard.level(draft.estimates(x)), draft.neurons.evaluate(x)
    limits = draft.guard.quantiles(level, rate)
    folded = ~draft.guard.leaves(level, limits)
    sums = Sums(torch.stack([torch.where(folded, p, 0).double().sum(0) for p in products(z, response)]), len(z))
    every = torch.ones(len(draft.neurons), dtype=torch.bool, device="cpu")
    columns = None if widths.rows == 16 else draft.columns(widths.rows)
    uncorrected = AffineValue(sums.regress().float())
    settled = Settled(draft, widths.fold, widths.rows, uncorrected, limits, every, ~every, columns)
    weight, bias = settled.store_fold(*uncorrected.fold(draft.neurons))
    costs = settled.costs
    return SitePlan.from_site(
        site.site,
        site.parameters,
        method=GuardedFold.name,
        touched_bytes=costs.fold + (costs.predictor + costs.row * rate) * len(every),
        outlier_rate=rate,
        settings=settled.settings,
        tensors=settled.tensors | {"folded_weight": weight, "folded_bias": bias},
    )
