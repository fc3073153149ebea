"""Partial linearity: an FFN in codes, where every neuron is as precise for a token as its contribution deserves.

1. Input, output and weights are rotated, and all matrices are coded with tables of Gaussian levels
   (:mod:`tardis_fx.runtime.tables`): each in base codes and in refinements of them.
2. The base codes give estimates of a neuron's pre-activations. They say whether its column is worth reading for this
   token, whether its refinements are, and in a gated FFN whether anything is after the gate
   (:mod:`tardis_fx.partial_linear.precision`).
3. A plain FFN also has a fold (TARDIS, arXiv 2501.10054, section 4): while a neuron gives nothing else, the fold holds
   its affine surrogate.
4. One price per byte meets the budget for all sites; at each site the widths with the least error are chosen.
5. Columns, fold and bias are fitted together to what the neurons then add (:mod:`tardis_fx.partial_linear.refit`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.partial_linear.calls import planned_call
from tardis_fx.partial_linear.candidates import Candidate
from tardis_fx.partial_linear.choice import choose, widths_of
from tardis_fx.partial_linear.coding import Coding, CodingObserver
from tardis_fx.partial_linear.influence import CodedSite, influence, weighed
from tardis_fx.partial_linear.precision import Sizes, Widths
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.passes.layout import Expected, Layout, Tensors, indices, setting, table_rows
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.cpu.coded_layout import prepare
from tardis_fx.statistics.target import fit_to_target


class PartialLinear(Rewrite):
    """The main rewrite: an FFN in codes with dynamic precision, and an affine fold where it is worth its bytes."""

    name: ClassVar[str] = "partial_linear"
    decode_tokens = 32

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
                "influence on the output",
                lambda site: CodedSite(codings[site.fingerprint]),
                sites,
                key=CodedSite,
                moved=influence,
            )
        weights = weighed([influences.get(site.fingerprint, math.nan) for site in sites])
        if config.target_error is None:
            return self._fit_within(chosen, weights, config)
        floor = sum(min(Sizes.from_coding(c, widths).least for widths in widths_of(c)) for c in chosen)
        dense = sum(site.weights.bytes for site in sites)

        def fit(budget: float) -> Fit[list[Planned]]:
            return steps(self._fit_within(chosen, weights, replace(config, budget=budget, target_error=None)))

        return (yield from fit_to_target(fit, floor / dense, config.target_error))

    def _fit_within(self, codings: Sequence[Coding], influences: Sequence[float], config: Config) -> list[Planned]:
        dense = [coding.site.weights.bytes for coding in codings]
        if config.allocation == "joint":
            best = choose(codings, influences, config.budget * sum(dense))
        else:
            pairs = zip(codings, dense, strict=True)
            best = [choose([coding], [1.0], config.budget * size)[0] for coding, size in pairs]
        return [self._planned(candidate.refitted()) for candidate in best]

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
        """Rows of codes of the listed neurons, their norms and surrogates, the fold and the rotations."""
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
        expected["norms"], expected["noise"] = Expected(torch.bfloat16, (listed, k)), Expected(torch.float32, (k,))
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
        """The plan's tensors as one, in the layout of the kernel.

        Raises:
            ConfigError: the weights are not on the CPU.
        """
        self._check_device(weights)
        nothing = torch.zeros(0, weights.up.shape[1], dtype=weights.up.dtype, device=weights.up.device)
        return {"site": prepare(planned_call(nothing, plan, weights))}

    def _check_device(self, weights: SiteWeights) -> None:
        if weights.up.device.type != "cpu":
            raise ConfigError(f"{self.name} has kernels for the CPU alone; on {weights.up.device}, use guarded_fold")

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Computes the FFN in one op."""
        output: Tensor = torch.ops.tardis.coded_ffn(x, constants["site"], len(plan.tensors["bias"]))
        return output
