"""Weight-only integer quantisation of the dense matrices of an FFN, or of those that another rewrite leaves.

1. 8 bits: symmetric codes with a scale for every row, rounded to nearest, as in torchao's ``Int8WeightOnlyConfig``.
   A linear layer becomes ``F.linear(x, codes) * scale``, which Inductor compiles, in bfloat16 and for x of
   [batch, length, d], to one product with codes (``aten._weight_int8pack_mm``) without a dense copy. In
   float16, where products with codes overflow, the matrix is scaled instead.
2. 4 bits: asymmetric codes in groups of 64 columns, as in :mod:`tardis_fx.passes.rtn`. They are expanded to a dense
   matrix at every call: no speed-up.
3. After another rewrite, its matrices (:meth:`tardis_fx.passes.base.Rewrite.matrices`) are quantised if that saves
   bytes, and so are the sites that it keeps. Zeros stay zeros. The budget is that of the other rewrite; the bytes that
   the integers save are not spent again.
4. The codes are computed from the other rewrite's constants, so the plan needs no further tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, stored_bytes, with_errors
from tardis_fx.passes.layout import Tensors, check_settings
from tardis_fx.passes.matrix_forms import Coded, Int8
from tardis_fx.passes.wrapper import Original, Wrapper
from tardis_fx.plan import KeptSite, Planned, SitePlan
from tardis_fx.runtime.packing import BLOCK


class Int8Ffn(Wrapper):
    """Quantises the matrices of an FFN or of another rewrite to 8 bits."""

    name: ClassVar[str] = "int8_ffn"

    def applied_after(self, previous: Rewrite) -> Rewrite:
        """Wraps the previous rewrite.

        Raises:
            ConfigError: the previous rewrite leaves no dense matrices.
        """
        if not previous.leaves_matrices:
            raise ConfigError(f"{previous.method} leaves no dense matrix that {self.name} could quantise")
        return super().applied_after(previous)

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Fits the other rewrite, then measures the error of both together.

        Raises:
            CalibrationError: an output is not finite; without another rewrite, the integers exceed the budget, or their
                error exceeds the target.
            ConfigError: the other rewrite has already quantised all its matrices.
        """
        alone = type(self)()
        if self._alone:
            inner: list[Planned] = [_whole(site) for site in sites]
        else:
            inner = yield from steps(self.inner.fit(sites, self.inner.for_matrices(config)))
        if not any(isinstance(plan, KeptSite) or self.inner.matrices(plan) for plan in inner):
            raise ConfigError(
                f"{self.inner.method} leaves no dense matrix to {self.name}: its fold is in few bits already"
            )
        plans: list[Planned] = [
            self._around(site, plan) if isinstance(plan, SitePlan) else alone._around(site, _whole(site))
            for site, plan in zip(sites, inner, strict=True)
        ]
        for rewrite in {self.method: self, alone.method: alone}.values():
            plans = yield from with_errors(rewrite, sites, plans, config)
        _check_finite(plans)
        if self._alone:
            self._check(plans, config)
        return plans

    def _check(self, plans: Sequence[Planned], config: Config) -> None:
        if config.target_error is not None:
            error = math.sqrt(sum(plan.error**2 for plan in plans) / len(plans))
            if error > config.target_error:
                raise CalibrationError(
                    f"target_error {config.target_error}: out of reach of {self.name}, whose error is {error:.3g}"
                )
            return
        for plan in plans:
            share, name = plan.touched_bytes / plan.dense_bytes, plan.name or "an FFN"
            if share > config.budget:
                raise CalibrationError(
                    f"a budget of {config.budget:.2%} is too small for {self.name}: {name} always reads {share:.2%}"
                )

    def _around(self, site: ObservedSite, inner: SitePlan) -> SitePlan:
        """The entry that quantises the matrices of another entry."""
        constants, touched, chosen = self.inner.constants(inner, site.weights), inner.touched_bytes, {}
        for name, share in self.inner.matrices(inner).items():
            matrix, form = constants[name], self.quantise(constants[name])
            scales = sum(tensor.nbytes for tensor in form.tensors(name).values()) - form.codes.nbytes
            saved = share * (matrix.nbytes - form.codes.nbytes) - scales
            if saved > 0:
                chosen[name] = matrix.shape[1]
                touched -= saved
        plan = replace(
            inner, method=self.method, touched_bytes=touched, settings={"inner": inner.settings, "matrices": chosen}
        )
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))

    def quantise(self, matrix: Float[Tensor, "rows columns"]) -> Int8 | Coded:
        """Quantises a matrix to integers."""
        return Int8.from_matrix(matrix)

    def opened(self, name: str, constants: Tensors, columns: int, dtype: torch.dtype) -> Int8 | Coded:
        """Reads a matrix from :meth:`quantise` out of the constants."""
        return Int8.from_tensors(constants, name, dtype)

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Lets the other rewrite check its part, then checks the names and columns of the matrices."""
        check_settings(plan, "inner", "matrices")
        inner, chosen = self.inner_entry(plan), plan.settings["matrices"]
        self.inner.validate(inner, weights)
        names, constants = self.inner.matrices(inner), self.inner.constants(inner, weights)
        for name, columns in chosen.items():
            if name not in names or type(columns) is not int or constants[name].shape[1:] != (columns,):
                raise ValueError(f"it has no matrix {name[:80]} of {columns!r:.80} columns")

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Constants of the other rewrite, with each matrix replaced by ``<name>_codes`` and ``<name>_scale``."""
        constants = self.inner.constants(self.inner_entry(plan), weights)
        for name in plan.settings["matrices"]:
            constants |= self.quantise(constants.pop(name)).tensors(name)
        return constants

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Runs the other rewrite with quantised matrices."""
        decoded: dict[str, Any] = dict(constants)
        dtype = getattr(torch, plan.dtype.removeprefix("torch."))
        for name, columns in plan.settings["matrices"].items():
            decoded[name] = self.opened(name, constants, columns, dtype)
        return self.inner.forward(x, decoded, self.inner_entry(plan))


class Int4Ffn(Int8Ffn):
    """Quantises the matrices of an FFN or of another rewrite to 4 bits."""

    name: ClassVar[str] = "int4_ffn"

    def quantise(self, matrix: Float[Tensor, "rows columns"]) -> Coded:
        """Quantises a matrix to 4-bit codes, rounded to nearest."""
        return Coded.from_matrix(matrix, None, 4, BLOCK)

    def opened(self, name: str, constants: Tensors, columns: int, dtype: torch.dtype) -> Coded:
        """Reads a matrix from :meth:`quantise` out of the constants."""
        return Coded.from_tensors(constants, name, 4, columns, dtype)


def _whole(site: ObservedSite) -> SitePlan:
    return SitePlan.from_site(site.site, site.parameters, method=Original.name, touched_bytes=float(site.weights.bytes))


def _check_finite(plans: Sequence[Planned]) -> None:
    for plan in plans:
        if isinstance(plan, SitePlan) and not math.isfinite(plan.error):
            raise CalibrationError(
                f"{plan.name or 'an FFN'} gives NaN or infinity, as {plan.method} or as it was: "
                f"{plan.dtype} is too narrow for it, use another dtype"
            )
