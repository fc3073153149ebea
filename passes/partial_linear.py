"""Partial linearity: an FFN in codes, where every neuron is as precise for a token as its contribution deserves.

1. Input, output and weights are rotated, and all matrices are coded with tables of Gaussian levels
   (:mod:`tardis_fx.runtime.tables`): each in base codes and in refinements of them.
2. The base codes give estimates of a neuron's pre-activations. They say whether its column is worth reading for this
   token, whether its refinements are, and in a gated FFN whether anything is after the gate
   (:mod:`tardis_fx.partial_linear.precision`).
3. A plain FFN also has a fold (TARDIS, arXiv 2501.10054, section 4): while a neuron gives nothing else, the fold holds
   its affine surrogate; the fold is regressed on what the neurons leave of the output, for the tokens that are kept.
4. One price per byte meets the budget for all sites; at each site the widths with the least error are chosen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.partial_linear.coding import Coding, CodingObserver, token_weights
from tardis_fx.partial_linear.influence import CodedSite, influence, weighed
from tardis_fx.partial_linear.precision import Pricing, Sizes, Widths, allocate, check_floor
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, Layout, Tensors, indices, setting, table_rows
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.quantisation import Rows
from tardis_fx.runtime import (
    coded_reference,
    ops,  # noqa: F401 - registers torch.ops.tardis
    tables,
)
from tardis_fx.runtime.coded import CodedFFN, precision_width
from tardis_fx.runtime.reference import compute_dtype
from tardis_fx.runtime.rotation import rotate_back
from tardis_fx.runtime.touched import Touched
from tardis_fx.statistics.regression import RIDGE, minimum_ridge, relative_error
from tardis_fx.statistics.target import fit_to_target

#: Widths that are tried, for plain and for gated FFNs.
WIDTHS = {
    1: (
        Widths(2, 3, 3, 2, 3),
        Widths(2, 3, 4, 2, 4),
        Widths(2, 4, 4, 3, 0),
        Widths(3, 3, 4, 2, 4),
        Widths(3, 4, 5, 3, 0),
    ),
    2: (
        Widths(2, 3, 4, 2, 0),
        Widths(3, 2, 3, 2, 0),
        Widths(3, 3, 4, 2, 0),
        Widths(4, 2, 4, 2, 0),
        Widths(4, 4, 4, 4, 0),
    ),
}
#: Share by which the bytes of held-back tokens may differ from the budget, which is met on the sample.
TOLERANCE = 0.003
#: Number of times that the target for the sample is corrected.
FILLS = 2
#: Tokens whose outputs are computed together.
TOGETHER = 2048


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site at some widths and at the price that meets the budget, with what it does to held-back tokens.

    Attributes:
        tensors: of the plan, but for the bias.
        bias: of the output.
        touched: bytes per token.
        read: share of the neurons whose columns are read.
        error: mean squared error, relative to the output of each token, times the influence of the site.
        missed: root of the mean squared error, relative to that of the output.
    """

    coding: Coding
    widths: Widths
    tensors: dict[str, Tensor]
    bias: Float32[Tensor, " d_out"]
    touched: float
    read: float
    error: float
    missed: float

    @classmethod
    def from_pricing(cls, pricing: Pricing, price: float) -> "Candidate":
        """Measures a settled site on held-back tokens."""
        coding, widths = pricing.coding, pricing.widths
        neurons, listed = coding.neurons, pricing.listed.nonzero()[:, 0]

        def kept(rows: Rows) -> Tensor:
            return rows.rows if len(listed) == len(neurons) else rows.rows[listed]  # no copy of what many share

        tensors = {
            "neurons": listed.int(), "precision": pricing.precision, "thresholds": pricing.thresholds(price),
            "signs": coding.signs, "out_signs": coding.out_signs,
            "columns": kept(coding.columns(widths.column_bits)),
            "columns_refinement": kept(coding.column_refinement(widths.column_bits, widths.column_low_bits)),
        }  # fmt: skip
        for i, name in enumerate(coding.site.weights.projections):
            tensors[name] = kept(coding.projection(i, widths.bits))
            tensors[f"{name}_refinement"] = kept(coding.refinement(i, widths.bits, widths.low_bits))
        if widths.fold_bits:
            tensors["surrogate"] = pricing.surrogate[listed].bfloat16()
        bias = torch.zeros(len(neurons.down), dtype=torch.float32, device="cpu")
        made = cls(coding, widths, tensors, bias if neurons.down_bias is None else neurons.down_bias, *[math.nan] * 4)
        touched = Touched()
        touched.add(made.call(coding.held))
        made = replace(made, touched=touched.per_token, read=touched.outlier_rate)
        return made.fitted(coding.sample, pricing.influence)

    def fitted(self, tokens: Float32[Tensor, "tokens d"], influence: float = 1.0) -> "Candidate":
        """With the fold and the bias that leave the least error of tokens, and with the error of held-back ones."""
        coding, tensors, bias = self.coding, self.tensors, self.bias
        rest, weight, size = self._left(coding.held)
        if self.widths.fold_bits or not coding.site.site.normalised:
            left, known, _ = self._left(tokens)
            if self.widths.fold_bits:
                fold = coding.fold(_regressed(tokens, left, known), self.widths.fold_bits)
                matrix = _unrotated(fold.weight, coding).T
                left, rest, tensors = left - tokens @ matrix, rest - coding.held @ matrix, tensors | {"fold": fold.rows}
            bias = (known * left).sum(0) / known.sum()
        squares = (rest - bias).double().square().sum(1, keepdim=True)
        return replace(
            self,
            tensors=tensors,
            bias=bias,
            error=influence * float((weight * squares).mean()),
            missed=relative_error(float(squares.sum()), size),
        )

    def _left(
        self, tokens: Float32[Tensor, "tokens d"]
    ) -> tuple[Float32[Tensor, "tokens d_out"], Float32[Tensor, "tokens 1"], float]:
        """What the neurons leave of the outputs of tokens, the weights of the tokens, and the outputs' squared norm."""
        neurons, parts = self.coding.neurons, tokens.split(TOGETHER)
        exact = torch.cat([neurons(part) for part in parts])
        left = exact - torch.cat([self(part) for part in parts])
        return left, token_weights(exact), float(exact.double().square().sum())

    @property
    def settings(self) -> dict[str, str | int]:
        """The settings of the plan."""
        site = self.coding.site.site
        return {**self.widths._asdict(), "activation": str(site.activation), "relative": int(site.normalised)}

    def call(self, x: Float32[Tensor, "tokens d"]) -> CodedFFN:
        """The call of the op for tokens, with a fold and a bias of zeros."""
        weights, d = self.coding.site.weights, x.shape[1]
        d_out = len(weights.down)
        tensors = self.tensors | {"bias": torch.zeros(d_out, dtype=x.dtype, device=x.device)}
        if self.widths.fold_bits:
            size = tables.row_bytes(d, self.widths.fold_bits)
            tensors["fold"] = torch.zeros(d_out, size, dtype=torch.uint8, device=x.device)
        neurons = tensors["neurons"].long()
        tensors["listed"] = torch.tensor([len(neurons)], dtype=torch.int64, device=x.device)
        biases = [None if bias is None else bias.cpu()[neurons] for _, bias in weights.projections.values()]
        tensors |= _biases(biases, len(neurons), x)
        return _call(x, tensors, self.settings)

    def __call__(self, x: Float32[Tensor, "tokens d"]) -> Float32[Tensor, "tokens d_out"]:
        """What the neurons give."""
        return coded_reference.coded_ffn(self.call(x))


class PartialLinear(Rewrite):
    """The main rewrite: an FFN in codes with dynamic precision, and an affine fold where it is worth its bytes."""

    name: ClassVar[str] = "partial_linear"

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without an activation."""
        return "no activation between its projections" if site.affine is not None else None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Fits in one run, for Gram matrices and samples of tokens, and a trial of each site's influence.

        Raises:
            CalibrationError: the budget is below the base codes, or the target is out of reach.
            ConfigError: the fit is sequential, or the weights are not on the CPU.
        """
        if config.sequential:
            raise ConfigError(f"{self.name} compares all sites: fit it without sequential, or guarded_fold with it")
        for site in sites:
            self._check_device(site.weights)
        codings = yield Run("codes", CodingObserver, sites, finish=Coding.from_observer, key=Coding)
        chosen = [codings[site.fingerprint] for site in sites]
        influences: Mapping[str, float] = {}
        if len(sites) > 1 and config.allocation == "joint":
            influences = yield Run(
                "influence on the logits",
                lambda site: CodedSite(codings[site.fingerprint]),
                sites,
                key=CodedSite,
                moved=influence,
            )
        weights = weighed([influences.get(site.fingerprint, math.nan) for site in sites])
        if config.target_error is None:
            return self._fit_within(chosen, weights, config)
        floor = sum(min(Sizes.from_coding(c, widths).least for widths in _widths(c)) for c in chosen)
        dense = sum(site.weights.bytes for site in sites)

        def fit(budget: float) -> Fit[list[Planned]]:
            return steps(self._fit_within(chosen, weights, replace(config, budget=budget, target_error=None)))

        return (yield from fit_to_target(fit, floor / dense, config.target_error))

    def _fit_within(self, codings: Sequence[Coding], influences: Sequence[float], config: Config) -> list[Planned]:
        dense = [coding.site.weights.bytes for coding in codings]
        if config.allocation == "joint":
            best = _candidates(codings, influences, config.budget * sum(dense))
        else:
            pairs = zip(codings, dense, strict=True)
            best = [_candidates([coding], [1.0], config.budget * size)[0] for coding, size in pairs]
        return [self._planned(c.fitted(c.coding.tokens) if c.widths.fold_bits else c) for c in best]

    def _planned(self, candidate: Candidate) -> SitePlan:
        site = candidate.coding.site
        plan = SitePlan.from_site(
            site.site,
            site.parameters,
            method=self.name,
            touched_bytes=candidate.touched,
            outlier_rate=candidate.read,
            error=candidate.missed,
            settings=candidate.settings,
            tensors=candidate.tensors | {"bias": candidate.bias.to(site.weights.up.dtype)},
        )
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Rows of codes of the listed neurons, their precision and surrogates, the fold and the rotations."""
        (hidden, d), d_out, k = weights.up.shape, len(weights.down), len(weights.projections)
        widths = Widths(*(setting(plan, name, range(0 if name == "fold_bits" else 1, 9)) for name in Widths._fields))
        setting(plan, "activation", (plan.activation,))
        setting(plan, "relative", range(2))
        listed = len(plan.tensors["neurons"])
        expected: Layout = {"neurons": indices(listed, hidden)}
        for name in weights.projections:
            expected[name] = table_rows(listed, d, widths.bits)
            expected[f"{name}_refinement"] = table_rows(listed, d, widths.low_bits)
        expected["columns"] = table_rows(listed, d_out, widths.column_bits)
        expected["columns_refinement"] = table_rows(listed, d_out, widths.column_low_bits)
        expected["precision"] = Expected(torch.bfloat16, (listed, precision_width(k)))
        expected["thresholds"] = Expected(torch.float32, (k + 2,))
        expected["signs"], expected["out_signs"] = Expected(torch.int8, (d,)), Expected(torch.int8, (d_out,))
        expected["bias"] = Expected(weights.up.dtype, (d_out,))
        if widths.fold_bits:
            expected["fold"] = table_rows(d_out, d, widths.fold_bits)
            expected["surrogate"] = Expected(torch.bfloat16, (listed, k + 1))
        return expected

    def parts(self, plan: SitePlan) -> str:
        """Bits of base codes and refinements, of projections and columns, and of the fold."""
        widths = Widths(*(plan.settings[name] for name in Widths._fields))
        parts = [
            f"projections {widths.bits}+{widths.low_bits}",
            f"columns {widths.column_bits}+{widths.column_low_bits}",
        ]
        return ", ".join([*parts, f"fold {widths.fold_bits}"] if widths.fold_bits else parts) + " bits"

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors, padded to the hidden size so that no shape depends on the plan's choices.

        Raises:
            ConfigError: the weights are not on the CPU.
        """
        self._check_device(weights)
        device, hidden = weights.up.device, len(weights.up)
        tensors = {name: tensor.to(device) for name, tensor in plan.tensors.items()}
        neurons = tensors.pop("neurons").long()
        for name in tensors.keys() - {"fold", "thresholds", "signs", "out_signs", "bias"}:
            rows = tensors[name]
            if missing := hidden - len(rows):
                tensors[name] = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        biases = [None if bias is None else bias[neurons] for _, bias in weights.projections.values()]
        tensors |= _biases(biases, hidden, weights.up)
        return tensors | {"listed": torch.tensor([len(neurons)], dtype=torch.int64, device=device)}

    def _check_device(self, weights: SiteWeights) -> None:
        if weights.up.device.type != "cpu":
            raise ConfigError(f"{self.name} has kernels for the CPU alone; on {weights.up.device}, use guarded_fold")

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Computes the FFN in one op."""
        output: Tensor = torch.ops.tardis.coded_ffn(*_call(x, constants, plan.settings))
        return output


def _call(x: Float[Tensor, "... d"], constants: Tensors, settings: Mapping[str, Any]) -> CodedFFN:
    """The call of the op."""
    names = [name for name in ("gate", "up") if name in constants]
    arguments: dict[str, Any] = {
        name: constants[name] for name in ("bias", "signs", "out_signs", "listed", "precision", "thresholds")
    }
    arguments |= {**settings, "fold_bits": settings["fold_bits"] or 8, "relative": bool(settings["relative"])}
    return CodedFFN(
        x,
        projections=[constants[name] for name in names],
        refinements=[constants[f"{name}_refinement"] for name in names],
        columns=constants["columns"],
        column_refinements=constants["columns_refinement"],
        biases=constants.get("biases"),
        surrogate=constants.get("surrogate"),
        fold=constants.get("fold"),
        **arguments,
    )


def _biases(
    biases: Sequence[Float[Tensor, " listed"] | None], capacity: int, like: Float[Tensor, "_ _"]
) -> dict[str, Float[Tensor, "capacity k"]]:
    """The biases of listed neurons as the op takes them, for operands like a tensor; none if all are missing."""
    if all(bias is None for bias in biases):
        return {}
    table = torch.zeros(capacity, len(biases), dtype=compute_dtype(like.dtype), device=like.device)
    for i, bias in enumerate(biases):
        if bias is not None:
            table[: len(bias), i] = bias.to(table.dtype)
    return {"biases": table}


def _candidates(codings: Sequence[Coding], influences: Sequence[float], allowed: float) -> list[Candidate]:
    """The best candidates of sites that together read ``allowed`` bytes per token.

    Raises:
        CalibrationError: the budget is too small at all widths.
    """
    tried: list[list[Candidate]] = []
    refusals: list[CalibrationError] = []
    for number in range(len(WIDTHS[1])):
        widths = [_widths(coding)[number] for coding in codings]
        most = sum(Sizes.from_coding(coding, w).most for coding, w in zip(codings, widths, strict=True))
        if most < allowed and number + 1 < len(WIDTHS[1]):
            continue
        try:
            tried.append(_at(codings, widths, influences, allowed))
        except CalibrationError as error:
            refusals.append(error)
    if not tried:
        raise refusals[0]
    chosen = _choose(list(zip(*tried, strict=True)), allowed)
    widths, found = [candidate.widths for candidate in chosen], [chosen]
    latest = chosen if chosen in tried else tried[-1]  # fitted at one price for all sites
    target = allowed
    for _ in range(FILLS):
        missing = allowed / _touched(latest)
        if latest is found[-1] and abs(missing - 1) <= TOLERANCE:
            break
        target *= missing
        try:
            latest = _at(codings, widths, influences, target)
        except CalibrationError:  # at these widths, the base codes alone read more than the target
            break
        found.append(latest)
    return _least(found, allowed)


def _at(
    codings: Sequence[Coding], widths: Sequence[Widths], influences: Sequence[float], target: float
) -> list[Candidate]:
    """Candidates at given widths that read about ``target`` bytes per token, at one price for all sites.

    Raises:
        CalibrationError: the budget is too small.
    """
    check_floor([Sizes.from_coding(*of_site) for of_site in zip(codings, widths, strict=True)], target)
    pricings = [Pricing.from_coding(*of_site) for of_site in zip(codings, widths, influences, strict=True)]
    pricings, price = allocate(pricings, target)
    return [Candidate.from_pricing(pricing, price) for pricing in pricings]


def _choose(candidates: Sequence[Sequence[Candidate]], allowed: float) -> list[Candidate]:
    """One candidate for every site, with the least total error that the bytes allow."""
    prices = [0.0]
    for options in candidates:
        for a in options:
            for b in options:
                if a.touched > b.touched and b.error > a.error:
                    prices.append((b.error - a.error) / (a.touched - b.touched))
    mixed = [[min(o, key=lambda c: c.error + p * (1 + 1e-9) * c.touched) for o in candidates] for p in prices]
    return _least(mixed, allowed)


def _least(choices: Sequence[list[Candidate]], allowed: float) -> list[Candidate]:
    """The choice with the least total error among those within the bytes, or else the one with the fewest bytes."""
    within = [chosen for chosen in choices if _touched(chosen) <= (1 + TOLERANCE) * allowed]
    return min(within, key=_error) if within else min(choices, key=_touched)


def _touched(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.touched for candidate in candidates)


def _error(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.error for candidate in candidates)


def _regressed(
    x: Float32[Tensor, "tokens d"], rest: Float32[Tensor, "tokens d_out"], weight: Float32[Tensor, "tokens 1"]
) -> Float64[Tensor, "d_out d"]:
    """The affine map of tokens that leaves the least of a remainder; its weight."""
    total = weight.sum()
    x = x - (weight * x).sum(0) / total
    rest = rest - (weight * rest).sum(0) / total
    covariance, crossed = ((weight * x).T @ x).double(), ((weight * x).T @ rest).double()
    covariance.diagonal().add_(minimum_ridge(RIDGE * covariance.diagonal(), torch.zeros_like(covariance[0])))
    fitted: Tensor = torch.linalg.solve(covariance, crossed).T
    return fitted


def _widths(coding: Coding) -> Sequence[Widths]:
    return WIDTHS[len(coding.site.weights.projections)]


def _unrotated(weight: Float32[Tensor, "d_out d"], coding: Coding) -> Float32[Tensor, "d_out d"]:
    """A fold as it multiplies inputs that are not rotated."""
    return rotate_back(rotate_back(weight, coding.signs).T, coding.out_signs).T
