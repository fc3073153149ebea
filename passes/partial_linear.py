"""Partial linearity: an affine map for the hot range of every neuron, exact terms for predicted outliers.

1. ``down(act(up(x)))`` becomes ``x C + B``: on its hot range a neuron's activation is ``slope z + intercept``, and two
   matrices with only that between them are one (TARDIS, arXiv 2501.10054, section 4).
2. The predictor, W1 in a few bits, tells which guarded neurons leave their hot range for this token; their exact terms
   are added from W1 and W2 (sections 5.2 and 5.3).
3. Beyond the paper: neurons that earn no predictor row are always folded or always exact; hot ranges, classes and the
   split over layers minimise the error at a given number of bytes (:mod:`tardis_fx.partial_linear.ranges`); C and B are
   regressed on what is still missing (:mod:`tardis_fx.statistics.regression`); C and the rows that corrections read
   may be quantised (:mod:`tardis_fx.partial_linear.draft`), and then the columns of W2 are regressed together with C
   (:mod:`tardis_fx.partial_linear.columns`).
4. Gated sites take the same path with a plane in the line's place (:mod:`tardis_fx.passes.gated`), at the same price of
   a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.config import one_of
from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Run
from tardis_fx.partial_linear.budget import allocate
from tardis_fx.partial_linear.columns import fit_columns
from tardis_fx.partial_linear.draft import Draft
from tardis_fx.partial_linear.gated_draft import GatedDraft, GatedRanges
from tardis_fx.partial_linear.products import ScoreHistogram
from tardis_fx.partial_linear.ranges import Ranges, SiteRanges
from tardis_fx.partial_linear.residuals import ResidualObserver, Several, within_memory
from tardis_fx.partial_linear.widths import Fitted, mix
from tardis_fx.passes import gated
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, coded_rows, codes, indices, setting
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.target import fit_to_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tardis_fx.config import Config, Rounding
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.partial_linear.histogram import Histogram
    from tardis_fx.passes.layout import Layout

    Histograms = Mapping[str, Histogram | ScoreHistogram]

#: Constants that hold one entry a listed neuron, and are padded to the hidden size.
_PER_NEURON = ("neurons", "codes", "scale", "zero", "lower", "upper", "slope", "intercept")


@dataclass(frozen=True, kw_only=True)
class PartialLinearOptions:
    """The knobs of partial linearity.

    Attributes:
        predictor_bits: 1 to 8 bits a weight in the predictor.
        fold_bits: 3, 4 or 8 bits a weight in the folded matrix, 16 for the model's own dtype; None chooses site by
            site, for the least error of all sites (``paper``: 16).
        row_bits: 3, 4 or 8 bits a weight in the rows that corrections read, 16 for the original weights; None likewise.
        group_size: 32, 64 or 128 columns share a scale and a zero point in predictor, folded matrix and rows.
        rounding: of these to codes: ``"gptq"``, by the calibration inputs, or ``"nearest"``, for comparison (rows of
            ``down`` always are to nearest).

    Raises:
        ConfigError: a value is out of its range.
    """

    predictor_bits: int = 2
    fold_bits: int | None = None
    row_bits: int | None = None
    group_size: int = 128
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        """Validates every field."""
        one_of("predictor_bits", self.predictor_bits, tuple(range(1, 9)))
        one_of("fold_bits", self.fold_bits, (3, 4, 8, 16, None))
        one_of("row_bits", self.row_bits, (3, 4, 8, 16, None))
        one_of("group_size", self.group_size, GROUP_SIZES)
        one_of("rounding", self.rounding, ("gptq", "nearest"))


class PartialLinear(Rewrite):
    """The main rewrite; see the module's docstring for its rules."""

    name: ClassVar[str] = "partial_linear"
    Options = PartialLinearOptions
    leaves_matrices = True
    heals = True
    #: Whether the folded map is regressed on what fold and correction miss.
    regressed: ClassVar[bool] = True
    #: Bits of fold and rows that are tried where none are given.
    widths: ClassVar[tuple[tuple[int, int], ...]] = ((3, 3), (4, 4), (8, 8), (16, 16))

    def refuse(self, site: Site) -> str | None:
        """Sites without an activation are refused."""
        if site.affine is not None:
            return "no activation between its projections"
        return None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[SitePlan]]:
        """Three runs over the batches: moments, histograms of the predictor's estimates, residuals at every width.

        The first two do not depend on the budget, and are done once for one observation. Gated sites take one more
        between these two, for the planes that their scores are measured from.
        """
        drafts = yield from self._drafts(sites, config)
        histograms = yield from self._histograms(drafts, config)
        if config.target_error is None:
            return (yield from self._fit_within(drafts, histograms, config))
        widths = self._widths(config)
        floor = sum(min(self.floor(draft.at(*w)) for w in widths) for draft in drafts)
        return (
            yield from fit_to_target(
                lambda budget: self._fit_within(drafts, histograms, replace(config, budget=budget)),
                floor / sum(draft.site.weights.bytes for draft in drafts),
                config.target_error,
            )
        )

    def _fit_within(self, drafts: Sequence[Draft], histograms: Histograms, config: Config) -> Fit[list[SitePlan]]:
        """Fits all sites at the config's budget, at every width, and takes of each site what is best for all."""
        settled: list[list[Draft]] = []
        refusals: list[CalibrationError] = []
        for widths in self._widths(config):
            try:
                settled.append(self._settled([draft.at(*widths) for draft in drafts], histograms, config))
            except CalibrationError as error:  # out of this budget's reach
                refusals.append(error)
        if not settled:
            raise refusals[0]
        by_site = {site[0].site.fingerprint: site for site in zip(*settled, strict=True)}
        if not config.sequential or len(settled) > 1:
            what = f"residuals at a budget of {config.budget}, bits {self._widths(config)}"
            fitted: dict[str, list[Fitted]] = {key: [] for key in by_site}
            for number, part in enumerate(within_memory(chain.from_iterable(by_site.values())), 1):
                found = yield _missed(part, f"{what}, part {number}")
                for key, several in found.items():
                    fitted[key] += several.fits(self._fitted)
            every = list(fitted.values())
            chosen = mix(every) if config.allocation == "joint" else [min(f, key=lambda c: c.missed) for f in every]
            if not config.sequential:
                return [choice.plan for choice in chosen]
            by_site = {choice.draft.site.fingerprint: (choice.draft,) for choice in chosen}
        plans: list[SitePlan] = []
        replaced: dict[str, Callable[[Tensor], Tensor]] = {}
        for (draft,) in by_site.values():
            site = draft.site
            run = replace(
                _missed({site.fingerprint: [draft]}, f"residual of {site.site.name}"), replaced=dict(replaced)
            )
            (several,) = (yield run).values()
            (best,) = several.fits(self._fitted)
            plans.append(best.plan)
            replaced[site.fingerprint] = self.replacement(best.plan, site.weights)
        return plans

    def _settled(self, drafts: list[Draft], histograms: Histograms, config: Config) -> list[Draft]:
        """Chooses ranges, classes and surrogates at the widths of the drafts."""
        surrogates = [self.ranges(draft, histograms[draft.site.fingerprint]) for draft in drafts]
        allowed = [config.budget * draft.site.weights.bytes for draft in drafts]
        if config.allocation == "joint":
            chosen = self.choose(surrogates, sum(allowed))
        else:
            chosen = [self.choose([s], a)[0] for s, a in zip(surrogates, allowed, strict=True)]
        for draft, surrogate, ranges in zip(drafts, surrogates, chosen, strict=True):
            draft.settle(surrogate, ranges, histograms[draft.site.fingerprint].edges)
        return drafts

    def _widths(self, config: Config) -> list[tuple[int, int]]:
        """Bits of fold and rows to be tried."""
        options = self.options(config)
        return sorted({(options.fold_bits or fold, options.row_bits or rows) for fold, rows in self.widths})

    def for_matrices(self, config: Config) -> Config:
        """With a dense fold, unless its bits are given."""
        return config if self.options(config).fold_bits else config.with_options(self.name, fold_bits=16)

    def _drafts(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Draft]]:
        options = self.options(config)
        quantisation = options.predictor_bits, options.group_size, options.rounding
        kinds = {"plain": Draft, "gated": GatedDraft}
        drafts = yield Run(
            "input moments",
            lambda s: Moments(s.weights.up.shape[1]),
            sites,
            lambda s, moments: kinds[s.site.kind](s, moments, *quantisation),
            key=("partial_linear drafts", quantisation),
        )
        return list(drafts.values())

    def _histograms(self, drafts: Sequence[Draft], config: Config) -> Fit[Histograms]:
        options = self.options(config)
        quantisation = options.predictor_bits, options.group_size, options.rounding
        by_site = {draft.site.fingerprint: draft for draft in drafts}
        own = {key: draft for key, draft in by_site.items() if isinstance(draft, GatedDraft)}
        if own:
            yield Run(
                "products of gate and up",
                lambda s: own[s.fingerprint].products(),
                [draft.site for draft in own.values()],
                lambda s, products: own[s.fingerprint].prepare(products),
                key=("partial_linear products", quantisation),
            )
        return (
            yield Run(
                "hot ranges",
                lambda s: by_site[s.fingerprint].histogram(),
                [draft.site for draft in drafts],
                key=("partial_linear histograms", quantisation),
            )
        )

    def floor(self, draft: Draft) -> int:
        """Bytes that a site reads at the least."""
        return draft.costs.fold

    def ranges(self, draft: Draft, histogram: Histogram | ScoreHistogram) -> SiteRanges:
        """What a site's hot ranges are chosen from; an error counts as the norm of its W2 column."""
        norm = draft.down.norm(dim=0)
        if isinstance(histogram, ScoreHistogram):
            return GatedRanges(histogram.sums, norm, draft.costs)
        return SiteRanges(histogram, norm, draft.costs)

    def choose(self, sites: Sequence[SiteRanges], allowed: float) -> list[Ranges]:
        """Ranges of all sites within ``allowed`` bytes per token; fits the surrogates to them."""
        return allocate(sites, allowed)

    def _fitted(self, draft: Draft, observer: ResidualObserver) -> Fitted:
        """With fitted columns of W2, or with W2's own where these miss less of the held-back tokens."""
        fitted = self._folded(draft, observer)
        if not self.regressed or draft.row_bits == 16:
            return fitted
        other = self._folded(draft.with_columns(fit_columns(draft, observer.residual)), observer)
        return min(fitted, other, key=lambda fit: fit.missed)

    def _folded(self, draft: Draft, observer: ResidualObserver) -> Fitted:
        weights, site, residual = draft.site.weights, draft.site, observer.residual
        of_surrogates, bias = draft.fold()
        of_columns = (draft.columns - draft.down.T)[draft.copied].double()
        added_weight, added_bias = torch.zeros_like(of_surrogates.T), torch.zeros_like(bias)
        if self.regressed:
            found = residual.solve(given=of_columns)
            added_weight, added_bias = found.weight[: len(added_weight)], found.bias
        folded_weight, folded_bias = draft.stored(of_surrogates + added_weight.T, bias + added_bias)
        tensors = draft.tensors | {"folded_weight": folded_weight, "folded_bias": folded_bias}
        change = torch.cat([(draft.opened(folded_weight) - of_surrogates).T, of_columns])
        error = residual.error(change, folded_bias.double() - bias)
        corrected = observer.outliers / max(1, observer.tokens)  # neurons a token, always exact ones included
        plan = SitePlan.of(
            site.site,
            site.parameters,
            method=self.name,
            touched_bytes=draft.costs.fold
            + draft.costs.predictor * len(tensors["codes"])
            + draft.costs.row * corrected,
            outlier_rate=corrected / weights.up.shape[0],
            error=error,
            settings={
                "bits": draft.bits,
                "fold_bits": draft.fold_bits,
                "row_bits": draft.row_bits,
                "group_size": draft.group_size,
                "activation": site.site.activation,
            },
            tensors=tensors,
        )
        plan = replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, weights)))
        return Fitted(draft, plan, error**2 * residual.energy)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The fold, where it is dense; rows are read by the correction alone."""
        return {"folded_weight": 1.0} if plan.settings["fold_bits"] == 16 else {}

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The guard of the listed neurons, the rows that corrections read if these are codes, and the fold."""
        (hidden, d), d_out, gated_site = weights.up.shape, len(weights.down), weights.gate is not None
        bits, group_size = setting(plan, "bits", range(1, 9)), setting(plan, "group_size", GROUP_SIZES)
        fold_bits, row_bits = (setting(plan, name, (3, 4, 8, 16)) for name in ("fold_bits", "row_bits"))
        setting(plan, "activation", (plan.activation,))
        listed, guarded = len(plan.tensors["neurons"]), len(plan.tensors["codes"])
        if guarded > listed or (row_bits < 16 and guarded < listed):
            raise ValueError(f"it guards {guarded} neurons of {listed} that it lists")
        found = {"neurons": indices(listed, hidden), "folded_bias": Expected(weights.up.dtype, (d_out,))}
        found["folded_weight"] = (
            Expected(weights.up.dtype, (d_out, d)) if fold_bits == 16 else coded_rows(d_out, d, fold_bits, group_size)
        )
        if row_bits < 16:
            low = coded_rows(listed, d, low_bits(bits, row_bits), group_size)
            found |= {"gate": low, "up": low} if gated_site else {"up": low}
            found["w2t"] = coded_rows(listed, d_out, row_bits, group_size)
        if gated_site:
            guard = {"guard": Expected(torch.float32, (guarded, 4), unbounded=True)}
            return (
                found
                | guard
                | {"surrogate": Expected(torch.float32, (listed, 3))}
                | codes("", (guarded, 2), d, bits, group_size)
            )
        found |= dict.fromkeys(("lower", "upper"), Expected(torch.float32, (guarded,), unbounded=True))
        found |= dict.fromkeys(("slope", "intercept"), Expected(torch.float32, (listed,)))
        return found | codes("", (guarded,), d, bits, group_size)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors padded to the hidden size, and the weights by neuron; copied only where need be."""
        hidden, device = weights.up.shape[0], weights.up.device
        neurons = plan.tensors["neurons"]
        whole_list = torch.equal(neurons, torch.arange(hidden, dtype=neurons.dtype, device=neurons.device))
        listed, guarded = len(neurons), len(plan.tensors["codes"])
        whole = {"up": weights.up} if weights.gate is None else {"gate": weights.gate, "up": weights.up}
        whole["w2t"] = weights.down.T
        constants = {}
        for name, weight in whole.items():
            if plan.settings["row_bits"] == 16:
                constants[name] = weight.contiguous()
            else:
                rows = plan.tensors[name].to(device)
                if not whole_list:
                    rows = rows.new_zeros(hidden, rows.shape[1]).index_copy_(0, neurons.long().to(device), rows)
                constants[name] = rows
        if weights.gate is not None:
            constants |= gated.biases(plan, weights)
        elif weights.up_bias is not None:
            constants["up_bias"] = weights.up_bias
        constants["counts"] = torch.tensor([listed, guarded], dtype=torch.int64, device=device)
        for name in _PER_NEURON if weights.gate is None else gated.PER_NEURON:
            tensor = plan.tensors[name].to(device)
            missing = hidden - len(tensor)
            constants[name] = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
        return constants | {name: plan.tensors[name].to(device) for name in ("folded_weight", "folded_bias")}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The folded map by whatever Inductor makes of a linear layer, then the corrections in one op.

        A quantised fold is part of the op.
        """
        if plan.kind == "gated":
            return gated.forward(x, constants, plan)
        settings, weight, bias = plan.settings, constants["folded_weight"], constants["folded_bias"]
        quantised = settings["fold_bits"] != 16
        folded, fold = (bias, weight) if quantised else (F.linear(x, weight, bias), None)
        corrected: Tensor = torch.ops.tardis.correct(
            folded, x, constants["up"], constants.get("up_bias"), constants["w2t"], constants["counts"],
            *(constants[name] for name in _PER_NEURON), settings["bits"], settings["activation"],
            fold, settings["fold_bits"], settings["row_bits"],
        )  # fmt: skip
        return corrected


def _missed(drafts: Mapping[str, Sequence[Draft]], title: str) -> Run:
    """What drafts of some sites miss, in one run over the batches."""
    return Run(title, lambda s: Several(drafts[s.fingerprint]), [of_site[0].site for of_site in drafts.values()])
