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
4. Gated sites take the same path, at the same price of a byte: the surrogate of ``act(g) u`` is a plane in ``g`` and
   ``u``, and a neuron is corrected where product and plane of the estimates are farther apart than its threshold. That
   score is measured from the plane that fits all tokens, known before the thresholds are; the fold has the plane that
   fits those tokens which stay uncorrected.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

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
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, coded_rows, codes, indices, setting
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.correction import Correction, guard_width
from tardis_fx.runtime.cpu import layout as cpu
from tardis_fx.runtime.cuda import layout as cuda
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.target import fit_to_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.partial_linear.histogram import Histogram
    from tardis_fx.passes.layout import Layout

    Histograms = Mapping[str, Histogram | ScoreHistogram]


class PartialLinear(Rewrite):
    """The main rewrite; see the module's docstring for its rules."""

    name: ClassVar[str] = "partial_linear"
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
        return sorted({(config.fold_bits or fold, config.row_bits or rows) for fold, rows in self.widths})

    def _drafts(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Draft]]:
        quantisation = config.predictor_bits, config.group_size, config.rounding
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
        quantisation = config.predictor_bits, config.group_size, config.rounding
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
        (hidden, d), d_out, k = weights.up.shape, len(weights.down), len(weights.projections)
        bits, group_size = setting(plan, "bits", range(1, 9)), setting(plan, "group_size", GROUP_SIZES)
        fold_bits, row_bits = (setting(plan, name, (3, 4, 8, 16)) for name in ("fold_bits", "row_bits"))
        setting(plan, "activation", (plan.activation,))
        listed, guarded = len(plan.tensors["neurons"]), len(plan.tensors["codes"])
        if guarded > listed or (row_bits < 16 and guarded < listed):
            raise ValueError(f"it guards {guarded} neurons of {listed} that it lists")
        expected = codes("", (guarded, k), d, bits, group_size)
        expected["neurons"] = indices(listed, hidden)
        expected["guard"] = Expected(torch.float32, (guarded, guard_width(k)), unbounded=True)
        expected["surrogate"] = Expected(torch.float32, (listed, k + 1))
        expected["folded_bias"] = Expected(weights.up.dtype, (d_out,))
        expected["folded_weight"] = (
            Expected(weights.up.dtype, (d_out, d)) if fold_bits == 16 else coded_rows(d_out, d, fold_bits, group_size)
        )
        if row_bits < 16:
            low = coded_rows(listed, d, low_bits(bits, row_bits), group_size)
            expected |= dict.fromkeys(weights.projections, low)
            expected["columns"] = coded_rows(listed, d_out, row_bits, group_size)
        return expected

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The fold, and what corrections read, as the device's kernels take it."""
        device = weights.up.device
        prepare = cuda.prepare if device.type == "cuda" else cpu.prepare
        prepared = prepare(plan.tensors, weights.projections, weights.down.T, plan.settings["row_bits"])
        return prepared | {name: plan.tensors[name].to(device) for name in ("folded_weight", "folded_bias")}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The folded map by whatever Inductor makes of a linear layer, then the corrections in one op.

        A quantised fold is part of the op.
        """
        settings, weight, bias = plan.settings, constants["folded_weight"], constants["folded_bias"]
        quantised = settings["fold_bits"] != 16
        folded, fold = (bias, weight) if quantised else (F.linear(x, weight, bias), None)
        projections = [constants[name] for name in ("gate", "up") if name in constants]
        named: dict[str, Any] = {name: constants[name] for name in _CONSTANTS}
        named |= {name: settings[name] for name in ("bits", "activation", "fold_bits", "row_bits")}
        call = Correction(folded, x, projections, biases=constants.get("biases"), fold=fold, **named)
        corrected: Tensor = torch.ops.tardis.correct(*call)
        return corrected


#: Constants that every site has.
_CONSTANTS = ("columns", "counts", "neurons", "codes", "scale", "zero", "guard", "surrogate")


def _missed(drafts: Mapping[str, Sequence[Draft]], title: str) -> Run:
    """What drafts of some sites miss, in one run over the batches."""
    return Run(title, lambda s: Several(drafts[s.fingerprint]), [of_site[0].site for of_site in drafts.values()])
