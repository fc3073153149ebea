"""Planned sites in codes whose small tensors can be trained: the eager specification, with gradients."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing.site import STEPS, WIDEST, TrainableSite
from tardis_fx.partial_linear.calls import planned_call
from tardis_fx.passes.base import Rewrite
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.reference import biased
from tardis_fx.runtime.rotation import rotate, rotate_back

#: Unit of a change of the scales, as a share of each, and of other tensors, of their root mean square.
UNIT = 0.1
#: Unit of a change of the logarithm of a threshold, and width of its gradient, in logarithms.
BOUND_UNIT, TEMPERATURE = 0.3, 0.1


class TrainableCodes(TrainableSite):
    """A site in codes.

    The parameters are changes of the rows' scales, of the bias, of slopes and intercepts, and of the logarithms of the
    thresholds. Backward, the decision about what to read is a sigmoid that passes gradients only to the thresholds.

    Memory: base codes, refinements and the fold as float32 matrices; a training step needs about 13 float32 values for
    every token and neuron, or 20 in a gated site.
    """

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: Rewrite) -> None:
        super().__init__(entry, weights, rewrite)
        (d, d_out), device = (weights.up.shape[1], len(weights.down)), weights.up.device
        nothing = torch.zeros(0, d, dtype=weights.up.dtype, device=device)
        self._call = call = planned_call(nothing, entry, weights)
        settings, size, k = entry.settings, call.neuron, len(call.projections)
        self._names = [name for name in ("gate", "up") if name in entry.tensors]
        bits = dict.fromkeys(self._names, settings["bits"])
        bits |= {f"{name}_refinement": settings["low_bits"] for name in self._names}
        bits |= {"columns": settings["column_bits"], "columns_refinement": settings["column_low_bits"]}
        bits |= {"fold": settings["fold_bits"]} if call.fold is not None else {}
        self._matrices: dict[str, Tensor] = {}
        for name, width in bits.items():
            rows, columns = entry.tensors[name].to(device), d_out if name.startswith("columns") else d
            self._matrices[name] = tables.weights(rows, width, columns, self._dtype)
            self.register_parameter(f"{name}_scale", nn.Parameter(self._zeros(len(rows))))
        self._listed = int(call.listed)
        self._base = {"bias": call.bias.to(self._dtype)}
        self._unit = {"bias": UNIT * self._base["bias"].square().mean().sqrt()}
        if call.surrogate is not None:
            self._base["surrogate"] = call.surrogate[: self._listed].to(self._dtype)
            self._unit["surrogate"] = UNIT * self._base["surrogate"].square().mean(0).sqrt()
        for name, tensor in self._base.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor)))
        self._norms = call.norms[: self._listed].to(self._dtype)
        self._thresholds = call.thresholds.double()
        self.bounds = nn.Parameter(self._zeros(len(self._thresholds)))
        self._sizes = [size.projection] * (k - 1) + [size.column, k * size.refinement, size.column_refinement]
        self.promised = entry.touched_bytes - call.fixed_bytes
        self.eval()

    @torch.no_grad()
    def widen(self, step: int) -> None:
        """See :meth:`TrainableSite.widen`; widenings are shares of the thresholds."""
        self.bounds.add_(math.log1p(step * WIDEST / STEPS) / BOUND_UNIT)

    @torch.no_grad()
    def planned(self) -> SitePlan:
        """See :meth:`TrainableSite.planned`."""
        tensors = dict(self.entry.tensors)
        for name in self._matrices:
            rows = tensors[name].clone()
            scales = self._scales(name).half().to(rows.device)
            rows[:, -2:] = scales[:, None].contiguous().view(torch.uint8)
            tensors[name] = rows
        for name in self._base:
            old = tensors[name]
            tensors[name] = self._now(name).to(device=old.device, dtype=old.dtype)
        thresholds = tensors["thresholds"]
        tensors["thresholds"] = self._bounds().to(thresholds)
        return replace(self.entry, tensors=tensors)

    def _differentiable(self, tokens: Float[Tensor, "tokens d"], dtype: torch.dtype) -> Float[Tensor, "tokens d_out"]:
        call, x = self._call, self._rotated(tokens)
        base, surrogate, value = self._estimated(x)
        read, row, column = self._reads(base, surrogate, value)
        refined = [z + x @ self._weight(f"{name}_refinement").T for z, name in zip(base, self._names, strict=True)]
        change = coded_reference.values(refined, surrogate, call.activation) - value
        value = read * (value + row * change)
        output = value @ self._weight("columns") + (column * value) @ self._weight("columns_refinement")
        if call.fold is not None:
            output = output + x @ self._weight("fold").T
        output = rotate_back(output, call.out_signs) + self._rounded("bias", self.weights.up.dtype)
        return output.to(dtype)

    def _rotated(self, tokens: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """The rotated tokens, rounded straight-through."""
        exact = rotate(tokens, self._call.signs)
        with torch.no_grad():
            rounding = (
                coded_reference.rounded(tokens.float(), self._call.signs, wide=self._call.wide).to(exact.dtype) - exact
            )
        return exact + rounding

    def _estimated(
        self, x: Float[Tensor, "tokens d"]
    ) -> tuple[
        Sequence[Float[Tensor, "tokens listed"]],
        Float[Tensor, "listed coefficients"] | None,
        Float[Tensor, "tokens listed"],
    ]:
        """Estimates of the pre-activations, surrogates, and values, for rotated tokens."""
        call = self._call
        base = biased([x @ self._weight(name).T for name in self._names], call.biases, self._listed)
        surrogate = self._rounded("surrogate", torch.bfloat16) if "surrogate" in self._base else None
        return base, surrogate, coded_reference.values(base, surrogate, call.activation)

    def _reads(
        self,
        base: Sequence[Float[Tensor, "tokens listed"]],
        surrogate: Float[Tensor, "listed coefficients"] | None,
        value: Float[Tensor, "tokens listed"],
    ) -> list[Float[Tensor, "tokens listed"]]:
        """Which columns and refinements are read, as straight-through numbers; adds to ``reading``."""
        with torch.no_grad():
            parts, scale = self._contributions(base, surrogate, value)
            thresholds = self._bounds()
        masks = []
        for part, threshold, moved in zip(parts, thresholds, self.bounds - self.bounds.detach(), strict=True):
            with torch.no_grad():
                limit = threshold * scale
                hard = ~((part <= limit) & (part < torch.inf))
                distance = (part.log() - limit.log()).nan_to_num(0.0).to(part.dtype)  # log 0 - log 0 is NaN
            soft = torch.sigmoid((distance - BOUND_UNIT * moved) / TEMPERATURE)
            masks.append(hard + (soft - soft.detach()))
        *up, read, row, column = masks
        read = read * up[0] if up else read
        masks = [*up, read, read * row, read * column]
        self.reading = self.reading + sum(size * mask.sum() for size, mask in zip(self._sizes, masks, strict=True))
        return [read, row, column]

    def _count(self, tokens: Float[Tensor, "tokens d"]) -> None:
        parts, scale = self._contributions(*self._estimated(self._rotated(tokens)))
        *up, read, row, column = (
            torch.where(part.isfinite(), part / (threshold * scale) - 1, torch.inf)
            for part, threshold in zip(parts, self._bounds(), strict=True)
        )
        read = torch.minimum(read, up[0]) if up else read
        self._corrected += int((read > 0).sum())
        excesses = [*up, read, torch.minimum(read, row), torch.minimum(read, column)]
        for excess, size in zip(excesses, self._sizes, strict=True):
            self._add_read(excess > 0, excess, size)

    def _contributions(
        self,
        base: Sequence[Float[Tensor, "tokens listed"]],
        surrogate: Float[Tensor, "listed coefficients"] | None,
        value: Float[Tensor, "tokens listed"],
    ) -> tuple[list[Tensor], Tensor]:
        call = self._call
        scales = [self._scales(name).detach().half().to(self._dtype) for name in self._names]
        noise = [scale * noise for scale, noise in zip(scales, call.noise.to(self._dtype), strict=True)]
        return coded_reference.contributions(
            base, value, noise, self._norms, surrogate, call.activation, relative=call.relative
        )

    def _bounds(self) -> Float64[Tensor, " thresholds"]:
        """The current thresholds, rounded as when stored."""
        return (self._thresholds * (BOUND_UNIT * self.bounds.double()).exp()).float().double()

    def _scales(self, name: str) -> Float[Tensor, " rows"]:
        rows = self.entry.tensors[name].to(self.weights.up.device)
        return tables.scales(rows).to(self._dtype) * (1 + UNIT * self.get_parameter(f"{name}_scale"))

    def _weight(self, name: str) -> Float[Tensor, "rows columns"]:
        """A matrix with its current scales, rounded as when stored, straight-through."""
        share = 1 + UNIT * self.get_parameter(f"{name}_scale")
        with torch.no_grad():
            scales = self._scales(name)
            rounding = torch.where(scales == 0, 0, scales.half().to(self._dtype) / scales - 1)
        return self._matrices[name] * (share + rounding * share.detach())[:, None]

    def _now(self, name: str) -> Tensor:
        return self._base[name] + self._unit[name] * self.get_parameter(name)

    def _rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor rounded as when stored, straight-through."""
        exact = self._now(name)
        return exact + (exact.to(dtype).to(exact.dtype) - exact).detach()

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=self._dtype, device=self.weights.up.device)
