"""The guarded fold: an affine map for the hot range of every neuron, exact terms for predicted outliers.

1. ``down(act(up(x)))`` becomes ``x C + B``: on its hot range a neuron's activation is ``slope z + intercept``, and two
   matrices with only an affine map between them fold into one (TARDIS, arXiv 2501.10054, section 4).
2. The predictor, W1 in a few bits, determines which guarded neurons leave their hot range for this token; their exact
   terms are added from W1 and W2 (sections 5.2 and 5.3).
3. Beyond the paper: neurons not worth a predictor row are always folded or always exact; hot ranges, classes and the
   split over layers minimise the error at a given number of bytes (:mod:`tardis_fx.guarded_fold.ranges`); C and B are
   regressed on the residual (:mod:`tardis_fx.statistics.regression`); C and the rows that corrections read may be
   quantised (:mod:`tardis_fx.guarded_fold.draft`), and then the columns of W2 are regressed together with C
   (:mod:`tardis_fx.guarded_fold.columns`).
4. Gated sites are treated alike, at the same price per byte: the surrogate of ``act(g) u`` is a plane in ``g`` and
   ``u``, and a neuron is corrected if the distance between product and plane of the estimates exceeds its threshold.
   The score uses the plane fitted to all tokens, which is known before the thresholds; the fold uses the plane refitted
   to uncorrected tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor

from tardis_fx.config import Config, Rounding, checked
from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import multiply
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.guarded_fold.budget import allocate
from tardis_fx.guarded_fold.columns import fit_columns
from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.histogram import Histogram
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.guarded_fold.residuals import ResidualObserver, WidthResiduals, within_memory
from tardis_fx.guarded_fold.settled import Settled
from tardis_fx.guarded_fold.widths import Fitted, choose_widths
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.affine import map_layout
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, Layout, Tensors, coded_rows, codes, indices, setting
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.correction import Correction, guard_width
from tardis_fx.runtime.cpu import layout as cpu
from tardis_fx.runtime.cuda import layout as cuda
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.statistics.target import fit_to_target


def _whole(value: Any) -> Any:
    """Refuses 4.0, which Literal takes for 4."""
    if isinstance(value, float):
        raise ValueError("must be a whole number")
    return value


Bits = Annotated[Literal[3, 4, 8, 16] | None, BeforeValidator(_whole)]


@checked
@dataclass(frozen=True, kw_only=True)
class GuardedFoldOptions:
    """Options of the guarded fold.

    Attributes:
        predictor_bits: 1 to 8 bits per weight in the predictor.
        fold_bits: 3, 4 or 8 bits per weight in the folded matrix, 16 for the model's own dtype; None chooses for each
            site to minimise the total error (``paper``: 16).
        row_bits: 3, 4 or 8 bits per weight in the rows that corrections read; 16: the original weights; None: as above.
        group_size: 32, 64 or 128 columns share a scale and a zero point in predictor, folded matrix and rows.
        rounding: of these matrices: ``"gptq"``, by the calibration inputs, or ``"nearest"``, for comparison (rows of
            ``down`` are always rounded to nearest).

    Raises:
        ConfigError: a value is out of range.
    """

    predictor_bits: Annotated[int, Field(ge=1, le=8)] = 2
    fold_bits: Bits = None
    row_bits: Bits = None
    group_size: Annotated[Literal[32, 64, 128], BeforeValidator(_whole)] = 128
    rounding: Rounding = "gptq"


class GuardedFold(Rewrite):
    """An affine fold with corrections of predicted outliers."""

    name: ClassVar[str] = "guarded_fold"
    Options = GuardedFoldOptions
    leaves_matrices = True
    #: Whether the folded map is regressed on the residual of fold and correction.
    regressed: ClassVar[bool] = True
    #: Bits of fold and rows that are tried by default.
    widths: ClassVar[tuple[tuple[int, int], ...]] = ((3, 3), (4, 4), (8, 8), (16, 16))

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without an activation."""
        return "no activation between its projections" if site.affine is not None else None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Fits in three runs: input moments, histograms of the guards' levels, residuals at every width.

        The first two runs do not depend on the budget, and are made once for each observation.
        """
        options = self.options(config)
        quantisation = Quantisation(options.predictor_bits, options.group_size, options.rounding)
        drafts = yield Run(
            "input moments",
            DraftObserver,
            sites,
            finish=lambda site, seen: Draft.from_observer(site, seen, quantisation),
            key=(Draft, quantisation),
        )
        histograms = yield Run(
            "hot ranges", lambda site: Histogram(drafts[site.fingerprint]), sites, key=(Histogram, quantisation)
        )
        pairs = [(drafts[site.fingerprint], histograms[site.fingerprint]) for site in sites]
        if config.target_error is None:
            return (yield from self._fit_within(pairs, config))
        floor = sum(min(self.floor(draft, widths) for widths in self._widths(config)) for draft, _ in pairs)
        return (
            yield from fit_to_target(
                lambda budget: self._fit_within(pairs, replace(config, budget=budget, target_error=None)),
                floor / sum(site.weights.bytes for site in sites),
                config.target_error,
            )
        )

    def _fit_within(self, pairs: Sequence[tuple[Draft, Histogram]], config: Config) -> Fit[list[Planned]]:
        """Fits all sites within the budget at every width, and chooses a fit for each site."""
        settled: list[list[Settled]] = []
        refusals: list[CalibrationError] = []
        for widths in self._widths(config):
            try:
                settled.append(self._settled(pairs, widths, config))
            except CalibrationError as error:  # the budget is too small for these widths
                refusals.append(error)
        if not settled:
            raise refusals[0]
        chosen = [by_width[0] for by_width in zip(*settled, strict=True)]
        if not config.sequential or len(settled) > 1:
            fitted: dict[str, list[Fitted]] = {draft.site.fingerprint: [] for draft, _ in pairs}
            for number, part in enumerate(within_memory(chain.from_iterable(zip(*settled, strict=True))), 1):
                title = f"residuals at a budget of {config.budget}, part {number}"
                run = _residual_run(title, part, self._fitted)
                for key, fits in (yield run).items():
                    fitted[key] += fits
            candidates = list(fitted.values())
            best = (
                choose_widths(candidates)
                if config.allocation == "joint"
                else [min(fits, key=lambda fit: fit.error) for fits in candidates]
            )
            if not config.sequential:
                return [fit.plan for fit in best]
            chosen = [fit.settled for fit in best]
        return (yield from self._fit_in_order(chosen))

    def _fit_in_order(self, chosen: Sequence[Settled]) -> Fit[list[Planned]]:
        """Fits the sites in order, each to the outputs of the rewritten sites before it."""
        plans: list[Planned] = []
        replaced: dict[str, Callable[[Tensor], Tensor]] = {}
        for settled in chosen:
            site = settled.draft.site
            run = _residual_run(f"residual of {site.site.name}", {site.fingerprint: [settled]}, self._fitted)
            ((fitted,),) = (yield replace(run, replaced=dict(replaced))).values()
            replaced[site.fingerprint] = self.replacement(fitted.plan, site.weights)
            plans.append(fitted.plan)
        return plans

    def _settled(
        self, pairs: Sequence[tuple[Draft, Histogram]], widths: tuple[int, int], config: Config
    ) -> list[Settled]:
        """Chooses ranges, classes and surrogates at the given widths."""
        priced = [self.priced(draft, histogram, widths) for draft, histogram in pairs]
        allowed = [config.budget * draft.site.weights.bytes for draft, _ in pairs]
        if config.allocation == "joint":
            chosen = self.choose(priced, sum(allowed))
        else:
            chosen = [self.choose([site], bytes_)[0] for site, bytes_ in zip(priced, allowed, strict=True)]
        return [
            Settled.from_choice(draft, widths, site, ranges, histogram.edges)
            for (draft, histogram), (site, ranges) in zip(pairs, chosen, strict=True)
        ]

    def _widths(self, config: Config) -> list[tuple[int, int]]:
        """Bits of fold and rows to try."""
        options = self.options(config)
        return sorted({(options.fold_bits or fold, options.row_bits or rows) for fold, rows in self.widths})

    def for_matrices(self, config: Config) -> Config:
        """The config with a dense fold, unless its bits are given."""
        return config if self.options(config).fold_bits else config.with_options(self.name, fold_bits=16)

    def floor(self, draft: Draft, widths: tuple[int, int]) -> int:
        """Minimum bytes that a site reads per token."""
        return draft.costs(*widths).fold

    def priced(self, draft: Draft, histogram: Histogram, widths: tuple[int, int]) -> PricedSite:
        """The priced site for choosing hot ranges; errors are weighted by the squared norms of the columns of down."""
        importance = draft.neurons.down.norm(dim=0).double() ** 2
        return PricedSite.from_sums(histogram.sums, draft.guard, importance, draft.costs(*widths))

    def choose(self, sites: Sequence[PricedSite], allowed: float) -> list[tuple[PricedSite, Ranges]]:
        """Chooses ranges of all sites within ``allowed`` bytes per token, and refits the surrogates to them."""
        return allocate(sites, allowed)

    def _fitted(self, observer: ResidualObserver) -> Fitted:
        """Fits with fitted or with original columns of down, whichever has less error on the held-back tokens."""
        settled = observer.settled
        fits = [self._folded(settled, observer)]
        if self.regressed and settled.row_bits < 16:
            fits.append(self._folded(replace(settled, columns=fit_columns(settled, observer.residual)), observer))
        return min(fits, key=lambda fit: fit.error)

    def _folded(self, settled: Settled, observer: ResidualObserver) -> Fitted:
        """Makes the plan of a settled site, with the fold regressed on the residual."""
        site, residual, costs = settled.draft.site, observer.residual, settled.costs
        weight, bias = settled.uncorrected.fold(settled.draft.neurons)
        column_change = settled.column_change
        regressed_weight, regressed_bias = weight, bias
        if self.regressed:
            regression = residual.solve(fixed=column_change)
            regressed_weight = weight + regression.weight[: weight.shape[1]].T
            regressed_bias = bias + regression.bias
        folded_weight, folded_bias = settled.store_fold(regressed_weight, regressed_bias)
        tensors = settled.tensors | {"folded_weight": folded_weight, "folded_bias": folded_bias}
        change = torch.cat([(settled.load_fold(folded_weight) - weight).T, column_change])
        error = residual.error(change, folded_bias.double() - bias)
        corrected = observer.outliers / max(1, observer.tokens)  # neurons per token, always exact ones included
        plan = SitePlan.from_site(
            site.site,
            site.parameters,
            method=self.name,
            touched_bytes=costs.fold + costs.predictor * len(tensors["codes"]) + costs.row * corrected,
            outlier_rate=corrected / len(settled.draft.neurons),
            error=error,
            settings=settled.settings,
            tensors=tensors,
        )
        plan = replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))
        return Fitted(settled, plan, error**2 * residual.energy)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The fold, if it is dense; only the correction reads rows."""
        return {"folded_weight": 1.0} if plan.settings["fold_bits"] == 16 else {}

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Tensors of the listed neurons, the coded rows that corrections read, and the fold."""
        (hidden, d), d_out, k = weights.up.shape, len(weights.down), len(weights.projections)
        bits, group_size = setting(plan, "bits", range(1, 9)), setting(plan, "group_size", GROUP_SIZES)
        fold_bits, row_bits = (setting(plan, name, (3, 4, 8, 16)) for name in ("fold_bits", "row_bits"))
        setting(plan, "activation", (plan.activation,))
        listed, guarded = len(plan.tensors["neurons"]), len(plan.tensors["codes"])
        if guarded > listed or (row_bits < 16 and guarded < listed):
            raise ValueError(f"it guards {guarded} neurons and lists {listed}")
        expected = codes("", (guarded, k), d, bits, group_size) | map_layout(weights)
        expected["neurons"] = indices(listed, hidden)
        expected["guard"] = Expected(torch.float32, (guarded, guard_width(k)), unbounded=True)
        expected["surrogate"] = Expected(torch.float32, (listed, k + 1))
        if fold_bits < 16:
            expected["folded_weight"] = coded_rows(d_out, d, fold_bits, group_size)
        if row_bits < 16:
            low = coded_rows(listed, d, low_bits(bits, row_bits), group_size)
            expected |= dict.fromkeys(weights.projections, low)
            expected["columns"] = coded_rows(listed, d_out, row_bits, group_size)
        return expected

    def parts(self, plan: SitePlan) -> str:
        """Bits of predictor, fold and rows."""
        settings = plan.settings
        return f"predictor {settings['bits']}, fold {settings['fold_bits']}, rows {settings['row_bits']} bits"

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The fold and the operands of corrections."""
        device = weights.up.device
        prepare = cuda.prepare if device.type == "cuda" else cpu.prepare
        prepared = prepare(plan.tensors, weights.projections, weights.down.T, plan.settings["row_bits"])
        return prepared | {name: plan.tensors[name].to(device) for name in ("folded_weight", "folded_bias")}

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the folded map as a linear layer for Inductor, then the corrections in one op.

        A quantised fold is part of the op.
        """
        settings, weight, bias = plan.settings, constants["folded_weight"], constants["folded_bias"]
        quantised = settings["fold_bits"] != 16
        folded, fold = (bias, weight) if quantised else (multiply(x, weight, bias), None)
        projections = [constants[name] for name in ("gate", "up") if name in constants]
        arguments: dict[str, Any] = {name: constants[name] for name in _CONSTANTS}
        arguments |= {name: settings[name] for name in ("bits", "activation", "fold_bits", "row_bits")}
        call = Correction(folded, x, projections, biases=constants.get("biases"), fold=fold, **arguments)
        corrected: Tensor = torch.ops.tardis.correct(*call)
        return corrected


#: Constants that every site has.
_CONSTANTS = ("columns", "counts", "neurons", "codes", "scale", "zero", "guard", "surrogate")


def _residual_run(
    title: str, settled: Mapping[str, Sequence[Settled]], fit: Callable[[ResidualObserver], Fitted]
) -> Run:
    """A run that observes the residuals of sites settled at several widths, by fingerprint, and fits each."""

    def finish(site: ObservedSite, seen: WidthResiduals) -> list[Fitted]:
        fits = []
        while seen.observers:  # the sums are large
            fits.append(fit(seen.observers.pop(0)))
        return fits

    sites = [by_width[0].draft.site for by_width in settled.values()]
    return Run(title, lambda site: WidthResiduals(settled[site.fingerprint]), sites, finish)
