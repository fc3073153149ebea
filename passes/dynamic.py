"""Dynamic precision: an FFN in codes, where every neuron is as precise for a token as its contribution deserves.

1. Input, output and weights are rotated, and all matrices are coded with tables of Gaussian levels
   (:mod:`tardis_fx.runtime.tables`): each in base codes and in refinements of them.
2. The base codes give estimates of a neuron's pre-activations. They say whether its column is worth reading for this
   token, whether its refinements are, and in a gated FFN whether anything is after the gate
   (:mod:`tardis_fx.partial_linear.precision`).
3. A plain FFN also has a fold (TARDIS, arXiv 2501.10054, section 4): while a neuron gives nothing else, the fold holds
   its affine surrogate; the fold is regressed on what the neurons leave.
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
from tardis_fx.errors import CalibrationError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import Merge, ObservedSite
from tardis_fx.partial_linear.coding import Coding, CodingObserver, token_weights
from tardis_fx.partial_linear.precision import Pricing, Widths, allocate, compute
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, Layout, Tensors, indices, setting, table_rows
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.runtime import (
    ops,  # noqa: F401 - registers torch.ops.tardis
)
from tardis_fx.runtime.coded import CodedFFN, precision_width
from tardis_fx.runtime.reference import compute_dtype
from tardis_fx.runtime.rotation import rotate_back
from tardis_fx.statistics.regression import RIDGE, Residual, minimum_ridge
from tardis_fx.statistics.target import fit_to_target

#: Widths that are tried, for plain and for gated FFNs.
PLAIN = (
    Widths(2, 2, 3, 2, 3),
    Widths(2, 2, 4, 2, 4),
    Widths(3, 2, 3, 2, 4),
    Widths(3, 2, 4, 2, 4),
    Widths(4, 4, 4, 4, 0),
)
GATED = (
    Widths(2, 2, 3, 2, 0),
    Widths(3, 2, 3, 2, 0),
    Widths(3, 2, 4, 2, 0),
    Widths(4, 2, 4, 2, 0),
    Widths(4, 4, 4, 4, 0),
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site at some widths and at the price that meets the budget.

    Attributes:
        touched: bytes per token.
        error: mean squared error, relative to the output.
    """

    pricing: Pricing
    price: float
    touched: float
    error: float


class Remainder:
    """Observer of what the coded neurons leave of the output.

    Attributes:
        residual: the exact output minus that of the neurons.
        touched: sum of the bytes that the tokens take.
        refined: sum of the shares of neurons that the tokens refine.
        tokens: number of tokens.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts", "touched": "sum", "refined": "sum", "tokens": "sum"}

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, neurons = candidate, candidate.pricing.coding.neurons
        self.residual = Residual(neurons.projections[0].shape[1], len(neurons.down))
        self.touched, self.refined, self.tokens = 0.0, 0.0, 0

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        exact = self.candidate.pricing.coding.neurons(x)
        computed = compute(self.candidate.pricing, self.candidate.price, x)
        self.residual.update(x, exact - computed.output, exact, token_weights(exact))
        self.touched += computed.touched * len(x)
        self.refined += computed.refined * len(x)
        self.tokens += len(x)


class Dynamic(Rewrite):
    """An FFN in codes with dynamic precision."""

    name: ClassVar[str] = "dynamic"
    compares_sites = True

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without an activation."""
        return "no activation between its projections" if site.affine is not None else None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Fits in two runs: Gram matrices and a sample of tokens; what the coded neurons leave of the output.

        Raises:
            CalibrationError: the budget is below the base codes, the target is out of reach, or the fit is sequential.
        """
        if config.sequential:
            raise CalibrationError(f"{self.name} chooses the widths of all sites at once: fit without sequential")
        codings = yield Run("codes", CodingObserver, sites, finish=Coding.from_observer, key=Coding)
        chosen = [codings[site.fingerprint] for site in sites]
        if config.target_error is None:
            return (yield from self._fit_within(chosen, config))
        floor = sum(min(Pricing.from_coding(c, w).at(math.inf).touched for w in _widths(c)) for c in chosen)
        return (
            yield from fit_to_target(
                lambda budget: self._fit_within(chosen, replace(config, budget=budget, target_error=None)),
                floor / sum(site.weights.bytes for site in sites),
                config.target_error,
            )
        )

    def _fit_within(self, codings: Sequence[Coding], config: Config) -> Fit[list[Planned]]:
        dense = [coding.site.weights.bytes for coding in codings]
        if config.allocation == "joint":
            best = _candidates(codings, config.budget * sum(dense))
        else:
            pairs = zip(codings, dense, strict=True)
            best = [_candidates([coding], config.budget * size)[0] for coding, size in pairs]
        by_site = {candidate.pricing.coding.site.fingerprint: candidate for candidate in best}
        plans = yield Run(
            f"remainders at a budget of {config.budget}",
            lambda site: Remainder(by_site[site.fingerprint]),
            [coding.site for coding in codings],
            finish=self._planned,
        )
        return [plans[coding.site.fingerprint] for coding in codings]

    def _planned(self, site: ObservedSite, seen: Remainder) -> SitePlan:
        """The plan of a site whose remainder is known."""
        candidate, residual = seen.candidate, seen.residual
        pricing, coding, widths = candidate.pricing, candidate.pricing.coding, candidate.pricing.widths
        neurons, dtype, listed = coding.neurons, site.weights.up.dtype, pricing.listed.nonzero()[:, 0]
        weight = torch.zeros(neurons.projections[0].shape[1], len(neurons.down), dtype=torch.float64, device="cpu")
        bias, tensors = residual.mean, {}
        if widths.fold_bits:
            fold = coding.fold(residual.solve().weight.T, widths.fold_bits)
            tensors = {"fold": fold.rows, "surrogate": pricing.surrogate[pricing.listed].bfloat16()}
            weight = _unrotated(fold.weight, coding).T.double()
            bias = residual.mean - residual.inputs.mean @ weight
        names = site.weights.projections
        for i, name in enumerate(names):
            tensors[name] = coding.projection(i, widths.bits).rows[listed]
            tensors[f"{name}_refinement"] = coding.refinement(i, widths.bits, widths.low_bits).rows[listed]
        tensors["columns"] = coding.columns(widths.column_bits).rows[listed]
        low = coding.column_refinement(widths.column_bits, widths.column_low_bits)
        tensors |= {
            "columns_refinement": low.rows[listed],
            "neurons": listed.int(),
            "precision": pricing.precision(candidate.price),
            "signs": coding.signs,
            "out_signs": coding.out_signs,
            "bias": bias.to(dtype),
        }
        plan = SitePlan.from_site(
            site.site,
            site.parameters,
            method=self.name,
            touched_bytes=seen.touched / max(1, seen.tokens),
            outlier_rate=seen.refined / max(1, seen.tokens),
            error=residual.error(weight, bias),
            settings={**widths._asdict(), "activation": site.site.activation},
            tensors=tensors,
        )
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Rows of codes of the listed neurons, their precision and surrogates, the fold and the rotations."""
        (hidden, d), d_out, k = weights.up.shape, len(weights.down), len(weights.projections)
        widths = Widths(*(setting(plan, name, range(0 if name == "fold_bits" else 1, 9)) for name in Widths._fields))
        setting(plan, "activation", (plan.activation,))
        listed = len(plan.tensors["neurons"])
        expected: Layout = {"neurons": indices(listed, hidden)}
        for name in weights.projections:
            expected[name] = table_rows(listed, d, widths.bits)
            expected[f"{name}_refinement"] = table_rows(listed, d, widths.low_bits)
        expected["columns"] = table_rows(listed, d_out, widths.column_bits)
        expected["columns_refinement"] = table_rows(listed, d_out, widths.column_low_bits)
        expected["precision"] = Expected(torch.bfloat16, (listed, precision_width(k)))
        expected["signs"], expected["out_signs"] = Expected(torch.int8, (d,)), Expected(torch.int8, (d_out,))
        expected["bias"] = Expected(weights.up.dtype, (d_out,))
        if widths.fold_bits:
            expected["fold"] = table_rows(d_out, d, widths.fold_bits)
            expected["surrogate"] = Expected(torch.bfloat16, (listed, k + 1))
        return expected

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors, padded to the hidden size so that no shape depends on the plan's choices."""
        device, hidden = weights.up.device, len(weights.up)
        tensors = {name: tensor.to(device) for name, tensor in plan.tensors.items()}
        neurons = tensors.pop("neurons").long()
        for name in tensors.keys() - {"fold", "signs", "out_signs", "bias"}:
            rows = tensors[name]
            if missing := hidden - len(rows):
                tensors[name] = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        biases = [bias for _, bias in weights.projections.values()]
        if any(bias is not None for bias in biases):
            dtype = compute_dtype(weights.up.dtype)
            tensors["biases"] = torch.zeros(hidden, len(biases), dtype=dtype, device=device)
            for i, bias in enumerate(biases):
                if bias is not None:
                    tensors["biases"][: len(neurons), i] = bias[neurons].to(dtype)
        return tensors | {"listed": torch.tensor([len(neurons)], dtype=torch.int64, device=device)}

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Computes the FFN in one op."""
        names = [name for name in ("gate", "up") if name in constants]
        arguments: dict[str, Any] = {
            name: constants[name] for name in ("bias", "signs", "out_signs", "listed", "precision")
        }
        arguments |= plan.settings | {"fold_bits": plan.settings["fold_bits"] or 8}
        call = CodedFFN(
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
        output: Tensor = torch.ops.tardis.coded_ffn(*call)
        return output


def _candidates(codings: Sequence[Coding], allowed: float) -> list[Candidate]:
    """The best candidates of sites that together read ``allowed`` bytes per token.

    Raises:
        CalibrationError: the budget is too small at all widths.
    """
    tried: list[list[Candidate]] = []
    refusals: list[CalibrationError] = []
    for number in range(len(PLAIN)):
        pricings = [Pricing.from_coding(coding, _widths(coding)[number]) for coding in codings]
        if sum(pricing.at(1e-20).touched for pricing in pricings) < 0.8 * allowed and number + 1 < len(PLAIN):
            continue  # cannot use the budget
        settled: list[Pricing] = []
        try:
            settled, price = allocate(pricings, allowed)
            measured = [_measured(pricing, price) for pricing in settled]
            if (total := sum(candidate.touched for candidate in measured)) > allowed:
                settled, price = allocate(pricings, allowed * allowed / total)
                measured = [_measured(pricing, price) for pricing in settled]
        except CalibrationError as error:
            refusals.append(error)
            continue
        finally:
            for pricing in (*pricings, *settled):
                pricing.forget()
        tried.append(measured)
    if not tried:
        raise refusals[0]
    return _choose(list(zip(*tried, strict=True)))


def _measured(pricing: Pricing, price: float) -> Candidate:
    """Measures a settled site on tokens of the sample that its fold is not fitted to."""
    coding = pricing.coding
    computed, exact = compute(pricing, price, coding.sample), coding.neurons(coding.sample)
    rest, weight = exact - computed.output, token_weights(exact)
    held = torch.arange(len(exact), dtype=torch.int64, device="cpu") % 4 == 3
    if pricing.widths.fold_bits:
        fold = coding.fold(_regressed(coding.sample[~held], rest[~held], weight[~held]), pricing.widths.fold_bits)
        rest = rest - coding.sample @ _unrotated(fold.weight, coding).T
    shift = (weight * rest)[~held].sum(0) / weight[~held].sum()
    error = float((weight * (rest - shift).square())[held].double().sum(1).mean())
    return Candidate(pricing, price, computed.touched, error)


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


def _choose(candidates: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """One candidate for every site with the least total error, and no more bytes than at one width everywhere."""
    uniform = list(zip(*candidates, strict=True))
    allowed = max(sum(c.touched for c in chosen) for chosen in uniform)
    prices = [0.0]
    for options in candidates:
        for a in options:
            for b in options:
                if a.touched > b.touched and b.error > a.error:
                    prices.append((b.error - a.error) / (a.touched - b.touched))
    mixed = [tuple(min(o, key=lambda c: c.error + p * (1 + 1e-9) * c.touched) for o in candidates) for p in prices]
    within = [chosen for chosen in (*uniform, *mixed) if sum(c.touched for c in chosen) <= allowed]
    return list(min(within, key=lambda chosen: sum(c.error for c in chosen)))


def _widths(coding: Coding) -> Sequence[Widths]:
    return PLAIN if len(coding.neurons.projections) == 1 else GATED


def _unrotated(weight: Float32[Tensor, "d_out d"], coding: Coding) -> Float32[Tensor, "d_out d"]:
    """A fold as it multiplies inputs that are not rotated."""
    return rotate_back(rotate_back(weight, coding.signs).T, coding.out_signs).T
