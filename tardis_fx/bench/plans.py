"""Plans for random weights: an outlier rate that is asked for, and no calibration text.

For speed, what a plan decides matters only through the bytes that it reads. Every neuron is guarded; W1 is rounded, and
the hot range of each neuron ends at the quantiles of its own estimates, or its score's in a gated FFN, so that the rate
asked for falls outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tardis_fx.config import Config
from tardis_fx.errors import BenchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.partial_linear.ranges import Costs
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.quantisation import quantise
from tardis_fx.runtime.packing import low_bits
from tardis_fx.runtime.reference import estimate
from tardis_fx.runtime.reference_gated import beyond
from tardis_fx.statistics.affine import regress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite

#: Columns that share a scale and a zero point.
GROUP_SIZE = PartialLinear.Options().group_size
#: Neurons made at once: the temporaries of a large site do not fit in memory.
_CHUNK = 2048


class Widths(NamedTuple):
    """Bits of a plan's parts: of the predictor, of the folded weight, of the rows that corrections read.

    16 stands for the model's own dtype.
    """

    predictor: int
    fold: int = 16
    rows: int = 16

    def costs(self, d: int, d_out: int, size: int, *, bias: bool, gated: bool = False) -> Costs:
        """Bytes of a site of such a plan; arguments as of :meth:`tardis_fx.partial_linear.ranges.Costs.of`."""
        bits = self.predictor, size, self.fold, self.rows
        return Costs.of(d, d_out, *bits, group_size=GROUP_SIZE, bias=bias, gated=gated)

    def added(self, size: int) -> float:
        """About the bytes that such a plan adds to an FFN of four times as many neurons as inputs, over the FFN's own.

        A gated one of as many weights adds no more.

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
    """Plans of every FFN of a model, by their widths.

    Args:
        model: in eval mode.
        batch: its first argument; thresholds are set on the inputs that its FFNs then see, 500 tokens or more.
        widths: of the plans.
        rate: share of (token, neuron) pairs that are outliers.

    Raises:
        BenchError: the model has no FFN that partial linearity takes.
    """
    observation = BatchObservation(model, [batch], progress=False)
    rewrite = PartialLinear()
    sites = [s for s in observation.sites if s.site.reason is None and rewrite.refuse(s.site) is None]
    if not sites:
        raise BenchError("the model has no FFN that partial linearity takes")
    kept = observation.answer(Run("inputs of the FFNs", lambda _: _Kept(), sites))
    return {
        w: Plan(
            tuple(_site_plan(site, kept[site.fingerprint].x, w, rate) for site in sites),
            Config(options={"predictor_bits": w.predictor, "fold_bits": w.fold, "row_bits": w.rows}, progress=False),
        )
        for w in widths
    }


def _site_plan(site: ObservedSite, x: Tensor, widths: Widths, rate: float) -> SitePlan:
    weights, (hidden, d) = site.weights, site.weights.up.shape
    parts = [_part(weights, rows, x, widths, rate, str(site.site.activation)) for rows in _rows(hidden)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["neurons"] = torch.arange(hidden, dtype=torch.int32, device=x.device)
    gated = weights.gate is not None
    surrogate = tensors["surrogate"] if gated else torch.stack([tensors["slope"], tensors["intercept"]], 1)
    tensors |= _fold(weights, surrogate, widths.fold)
    biased = any(bias is not None for _, _, bias in _projections(weights))
    costs = widths.costs(d, weights.down.shape[0], weights.up.element_size(), bias=biased, gated=gated)
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


def _projections(weights: SiteWeights) -> list[tuple[str, Tensor, Tensor | None]]:
    """What lies in front of the activation: names of their rows in a plan, matrices [h, d], biases [h]."""
    if weights.gate is None:
        return [("up", weights.up, weights.up_bias)]
    return [("gate", weights.gate, weights.gate_bias), ("up", weights.up, weights.up_bias)]


def _rows(hidden: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, hidden)) for start in range(0, hidden, _CHUNK)]


def _part(
    weights: SiteWeights, rows: slice, x: Tensor, widths: Widths, rate: float, activation: str
) -> dict[str, Tensor]:
    """Predictors, guard, surrogates and, where they are codes, rows of some neurons."""
    bits = widths.predictor
    own = {name: matrix[rows].float().contiguous() for name, matrix, _ in _projections(weights)}
    biases = [0 if bias is None else bias[rows].float() for _, _, bias in _projections(weights)]
    rounded = {name: quantise(matrix, None, bits, GROUP_SIZE) for name, matrix in own.items()}
    z = [x @ matrix.T + bias for matrix, bias in zip(own.values(), biases, strict=True)]
    found = {}
    if widths.rows != 16:
        low = low_bits(bits, widths.rows)
        found = {name: quantise(own[name] - rounded[name].weight, None, low, GROUP_SIZE).rows for name in own}
        found["w2t"] = quantise(weights.down[:, rows].float().T, None, widths.rows, GROUP_SIZE).rows
    predictors = {name: [getattr(q, name) for q in rounded.values()] for name in ("codes", "scale", "zero")}
    z_hat = [estimate(x, q.codes, q.scale, q.zero, bits) for q in rounded.values()]
    activated = ACTIVATIONS[activation].eager(z[0])
    if weights.gate is None:
        lower, upper = _quantile(z_hat[0], rate / 2), _quantile(z_hat[0], 1 - rate / 2)
        line = _surrogate(z, activated, (z_hat[0] >= lower) & (z_hat[0] <= upper))
        guard = {"lower": lower, "upper": upper, "slope": line[:, 0], "intercept": line[:, 1]}
        return found | {name: part for name, (part,) in predictors.items()} | guard
    plane = _surrogate(z, activated * z[1], torch.ones_like(activated, dtype=torch.bool))
    both = torch.stack([z + bias for z, bias in zip(z_hat, biases, strict=True)], -1)
    score = beyond(both, plane, activation).abs()
    threshold = _quantile(score, 1 - rate)
    surrogate = _surrogate(z, activated * z[1], score <= threshold)
    found |= {name: torch.stack(parts, 1) for name, parts in predictors.items()}
    return found | {"guard": torch.cat([plane, threshold[:, None]], 1), "surrogate": surrogate}


def _quantile(values: Tensor, share: float) -> Tensor:
    """Between two of each neuron's values, [tokens, h], with that share of them below, and one on either side: [h]."""
    below = min(max(1, round(share * len(values))), len(values) - 1)
    return values.sort(0).values[below - 1 : below + 1].mean(0)


def _surrogate(z: Sequence[Tensor], given: Tensor, kept: Tensor) -> Tensor:
    """The line or plane nearest to what neurons give at the tokens kept: factors and constant, [h, 2 or 3]."""
    terms = (torch.stack([torch.ones_like(given), *z, given], -1) * kept[..., None]).double().transpose(0, 1)
    slopes, intercepts, _ = regress(terms.mT @ terms)
    return torch.cat([slopes, intercepts[:, None]], 1).float()


def _fold(weights: SiteWeights, surrogate: Tensor, bits: int) -> dict[str, Tensor]:
    """Folded weight and bias, in the model's dtype, or the weight as codes."""
    *slopes, shift = surrogate.unbind(1)
    folded = surrogate.new_zeros(weights.down.shape[0], weights.up.shape[1])
    for (_, matrix, bias), slope in zip(_projections(weights), slopes, strict=True):
        shift = shift if bias is None else shift + slope * bias.float()
        for rows in _rows(len(matrix)):
            folded += (weights.down[:, rows].float() * slope[rows]) @ matrix[rows].float()
    bias = weights.down.float() @ shift
    if weights.down_bias is not None:
        bias += weights.down_bias.float()
    stored = folded.to(weights.up.dtype) if bits == 16 else quantise(folded, None, bits, GROUP_SIZE).rows
    return {"folded_weight": stored, "folded_bias": bias.to(weights.up.dtype)}
