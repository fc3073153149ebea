"""Plans for random weights: an outlier rate that is asked for, and no calibration text.

For speed, what a plan decides matters only through the bytes that it reads. Every neuron is guarded; W1 is rounded, and
the hot range of each neuron ends at the quantiles of its own estimates, so that the rate asked for falls outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tardis_fx.calibration.observe import BatchObservation
from tardis_fx.calibration.predictor import quantise
from tardis_fx.calibration.ranges import Costs
from tardis_fx.config import Config
from tardis_fx.errors import BenchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.runtime.packing import low_bits
from tardis_fx.runtime.reference import estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from tardis_fx.calibration.observe import ObservedSite
    from tardis_fx.graph.site import SiteWeights

#: Columns that share a scale and a zero point.
GROUP_SIZE = Config().group_size
#: Neurons made at once: the temporaries of a large site do not fit in memory.
_CHUNK = 2048


class Widths(NamedTuple):
    """Bits of a plan's parts: of the predictor, of the folded weight, of the rows that corrections read.

    16 stands for the model's own dtype.
    """

    predictor: int
    fold: int = 16
    rows: int = 16

    def costs(self, d: int, d_out: int, size: int, *, bias: bool) -> Costs:
        """Bytes of a site of such a plan; arguments as of :meth:`tardis_fx.calibration.ranges.Costs.of`."""
        return Costs.of(d, d_out, self.predictor, size, self.fold, self.rows, group_size=GROUP_SIZE, bias=bias)

    def added(self, size: int) -> float:
        """About the bytes that such a plan adds to an FFN of four times as many neurons as inputs, over the FFN's own.

        Args:
            size: bytes of a weight.
        """
        wide = 8 * size
        fold = (wide if self.fold == 16 else self.fold) / 4
        rows = wide if self.rows == 16 else low_bits(self.predictor, self.rows) + self.rows  # W2 anew, or both in codes
        return (fold + self.predictor + rows) / (2 * wide)

    def __str__(self) -> str:
        """As contenders are named."""
        parts = [f"{self.predictor} bits"]
        parts += [f"{part} {bits}" for part, bits in (("fold", self.fold), ("rows", self.rows)) if bits != 16]
        return ", ".join(parts)


class _Kept:
    """Keeps a site's inputs."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Keeps tokens, [tokens, d]."""
        self._inputs.append(x)

    @property
    def x(self) -> Tensor:
        """All tokens, [tokens, d]."""
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
    """Plans of every plain FFN of a model, by their widths.

    Args:
        model: in eval mode.
        batch: its first argument; thresholds are set on the inputs that its FFNs then see, 500 tokens or more.
        widths: of the plans.
        rate: share of (token, neuron) pairs that are outliers.

    Raises:
        BenchError: the model has no plain FFN that partial linearity takes.
    """
    observation = BatchObservation(model, [batch], progress=False)
    rewrite = PartialLinear()
    plain = [s for s in observation.sites if s.site.kind == "plain" and s.site.reason is None]
    sites = [s for s in plain if rewrite.refuse(s.site) is None]
    if not sites:
        raise BenchError("the model has no plain FFN that partial linearity takes")
    kept = observation.run(lambda _: _Kept(), sites, "inputs of the FFNs")
    return {
        w: Plan(
            tuple(_site_plan(site, kept[site.fingerprint].x, w, rate) for site in sites),
            Config(predictor_bits=w.predictor, fold_bits=w.fold, row_bits=w.rows, progress=False),
        )
        for w in widths
    }


def _site_plan(site: ObservedSite, x: Tensor, widths: Widths, rate: float) -> SitePlan:
    weights = site.weights
    hidden, d = weights.w1.shape
    parts = [_guard(weights, rows, x, widths, rate, str(site.site.activation)) for rows in _rows(hidden)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["neurons"] = torch.arange(hidden, dtype=torch.int32, device=x.device)
    tensors |= _fold(weights, tensors["slope"], tensors["intercept"], widths.fold)
    costs = widths.costs(d, weights.w2.shape[0], weights.w1.element_size(), bias=weights.b1 is not None)
    return SitePlan.of(
        site.site,
        site.parameters,
        method=PartialLinear.name,
        touched_bytes=costs.fold + (costs.predictor + costs.row * rate) * hidden,
        outlier_rate=rate,
        settings={
            "bits": widths.predictor,
            "fold_bits": widths.fold,
            "row_bits": widths.rows,
            "group_size": GROUP_SIZE,
            "activation": site.site.activation,
        },
        tensors=tensors,
    )


def _rows(hidden: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, hidden)) for start in range(0, hidden, _CHUNK)]


def _guard(
    weights: SiteWeights, rows: slice, x: Tensor, widths: Widths, rate: float, activation: str
) -> dict[str, Tensor]:
    """Predictor, hot ranges, surrogates and, where they are codes, rows of some neurons."""
    bits = widths.predictor
    w1 = weights.w1[rows].float().contiguous()
    b1 = 0 if weights.b1 is None else weights.b1[rows].float()
    rounded = quantise(w1, None, bits, GROUP_SIZE)
    z_hat = estimate(x, rounded.codes, rounded.scale, rounded.zero, bits)
    ordered = z_hat.sort(0).values
    cut = max(1, round(rate / 2 * len(x)))  # so many tokens fall on each side
    lower, upper = (ordered[cut - 1] + ordered[cut]) / 2, (ordered[-cut] + ordered[-cut - 1]) / 2
    z = x @ w1.T + b1
    hot = ((z_hat >= lower) & (z_hat <= upper)).float()
    activated = ACTIVATIONS[activation].eager(z)
    count = hot.sum(0)
    stored = {}
    if widths.rows != 16:
        low = quantise(w1 - rounded.weight, None, low_bits(bits, widths.rows), GROUP_SIZE)
        stored = {"w1": low.rows, "w2t": quantise(weights.w2[:, rows].float().T, None, widths.rows, GROUP_SIZE).rows}
    mean_z, mean_a = (hot * z).sum(0) / count, (hot * activated).sum(0) / count
    slope = (hot * (z - mean_z) * (activated - mean_a)).sum(0) / (hot * (z - mean_z).square()).sum(0)
    return stored | {
        "codes": rounded.codes,
        "scale": rounded.scale,
        "zero": rounded.zero,
        "lower": lower,
        "upper": upper,
        "slope": slope,
        "intercept": mean_a - slope * mean_z,
    }


def _fold(weights: SiteWeights, slope: Tensor, intercept: Tensor, bits: int) -> dict[str, Tensor]:
    """Folded weight and bias, in the model's dtype, or the weight as codes."""
    folded = slope.new_zeros(weights.w2.shape[0], weights.w1.shape[1])
    shift = intercept if weights.b1 is None else intercept + slope * weights.b1.float()
    for rows in _rows(weights.w1.shape[0]):
        folded += (weights.w2[:, rows].float() * slope[rows]) @ weights.w1[rows].float()
    bias = weights.w2.float() @ shift
    if weights.b2 is not None:
        bias += weights.b2.float()
    stored = folded.to(weights.w1.dtype) if bits == 16 else quantise(folded, None, bits, GROUP_SIZE).rows
    return {"folded_weight": stored, "folded_bias": bias.to(weights.w1.dtype)}
