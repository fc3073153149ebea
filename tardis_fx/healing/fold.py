"""Planned sites of a guarded fold whose small tensors can be trained: the eager specification, with gradients."""

from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.site import SiteWeights
from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.healing.guard import TrainableGuard
from tardis_fx.healing.site import STEPS, WIDEST, TrainableSite
from tardis_fx.passes.base import Rewrite
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import join, low_bits, pack, split, spread, unpack

#: Width of a bound's gradient, as a share of the hot range's width.
TEMPERATURE = 0.05
#: Unit of a bound's change, as a share of its hot range's width, so that one learning rate fits all.
BOUND_UNIT = 0.1


class TrainableFold(TrainableSite):
    """A site of a guarded fold.

    The parameters are changes of the folded weight and bias in units of the tensor's root mean square, of slopes and
    intercepts in units of their root mean square over the neurons, and of the guard's bounds in tenths of the neuron's
    hot range, outwards. Backward, codes are not rounded and the guard is a sigmoid that passes gradients only to its
    bounds.

    Memory: the matrices of the listed neurons and the predictors, in float32; a training step needs about six float32
    values for every token and neuron, or ten in a gated site.
    """

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: Rewrite) -> None:
        super().__init__(entry, weights, rewrite)
        self._fold_bits: int = entry.settings["fold_bits"]
        self._activation: str = entry.settings["activation"]
        constants, d, dtype = rewrite.constants(entry, weights), weights.up.shape[1], self._dtype
        self._listed, self._guarded = constants["counts"].tolist()
        self._biases = constants.get("biases")
        bits, row_bits, neurons = (
            entry.settings["bits"],
            entry.settings["row_bits"],
            constants["neurons"][: self._listed],
        )
        codes = (constants[name][: self._guarded].unbind(1) for name in ("codes", "scale", "zero"))
        self._predictors = [reference.dequantise(c, s, z, bits, d, dtype) for c, s, z in zip(*codes, strict=True)]
        self._columns = reference.rows_of(constants["columns"][neurons.long()], row_bits, len(weights.down), dtype)
        stored_bits = 16 if row_bits == 16 else low_bits(bits, row_bits)
        self._projections = [
            reference.rows_of(constants[name][neurons.long()], stored_bits, d, dtype) for name in weights.projections
        ]
        if row_bits < 16:  # nested in the predictors
            self._projections = [high + low for high, low in zip(self._predictors, self._projections, strict=True)]
        guard, k = constants["guard"][: self._guarded], len(self._projections)
        self._guard = TrainableGuard(guard, self._biases, self._activation, k)
        width = self._guard.width
        self._width = torch.where(width.isfinite() & (width > 0), width, 0)  # an empty range remains empty
        real = {name: constants[name].to(self._dtype) for name in ("surrogate", "folded_bias")}
        real["surrogate"] = real["surrogate"][: self._listed]
        real["folded_weight"] = self._folded_weight(constants["folded_weight"])
        self._base = {**real, "bounds": self._guard.bounds}
        self._unit = {name: tensor.square().mean().sqrt() if tensor.numel() else 0 for name, tensor in real.items()}
        if self._listed:
            self._unit["surrogate"] = real["surrogate"].square().mean(0).sqrt()
        self._unit["bounds"] = self._guard.outwards * BOUND_UNIT * self._width[:, None]
        for name, tensor in self._base.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor)))
        settings = (entry.settings[name] for name in ("row_bits", "group_size"))
        self._row = Costs.from_weights(weights, bits, self._fold_bits, *settings).row
        self.promised = self._row * entry.outlier_rate * len(weights.up)
        self.eval()

    @torch.no_grad()
    def widen(self, step: int) -> None:
        """See :meth:`TrainableSite.widen`; widenings are shares of the hot range's width."""
        self.bounds.add_(step * WIDEST / STEPS / BOUND_UNIT)

    @torch.no_grad()
    def planned(self) -> SitePlan:
        """See :meth:`TrainableSite.planned`."""
        tensors = {name: self._now(name) for name in ("surrogate", "folded_bias", "folded_weight")}
        tensors["guard"] = self._guard.tensor(self._now("bounds"))
        if self._fold_bits < 16:
            codes = pack(self._codes(tensors["folded_weight"]).to(torch.uint8), self._fold_bits)
            tensors["folded_weight"] = join(codes, self._scale, self._zero)
        old = self.entry.tensors
        stored = {name: t.to(dtype=old[name].dtype, device=old[name].device) for name, t in tensors.items()}
        return replace(self.entry, tensors={**old, **stored})

    def read(self) -> Float64[Tensor, " widenings"]:
        """See :meth:`TrainableSite.read`."""
        always: int = self._listed - self._guarded
        return self._row * always + super().read()

    def _differentiable(self, tokens: Float[Tensor, "tokens d"], dtype: torch.dtype) -> Float[Tensor, "tokens d_out"]:
        outlier = self._outliers(tokens)
        self.reading = self.reading + self._row * outlier.sum()
        z = reference.biased([tokens @ rows.T for rows in self._projections], self._biases, self._listed)
        residual = reference.surrogate_error(z, self._now("surrogate"), reference.response(z, self._activation))
        added = (outlier * residual) @ self._columns
        weight, bias = self._rounded(self._now("folded_weight")), self._now("folded_bias").to(dtype)
        if self._fold_bits == 16:
            folded = F.linear(tokens.to(dtype), weight.to(dtype), bias)
        else:
            folded, added = bias, added + tokens @ weight.T
        output: Tensor = (folded.to(self._dtype) + added).to(dtype)
        return output

    def _count(self, tokens: Float[Tensor, "tokens d"]) -> None:
        excess = torch.stack(self._excess(tokens)).amax(0)
        self._corrected += len(tokens) * (self._listed - self._guarded) + int((excess > 0).sum())
        self._add_read(excess > 0, excess / self._width, self._row)

    def _folded_weight(self, stored: Shaped[Tensor, "d_out stored"]) -> Float[Tensor, "d_out d"]:
        if self._fold_bits == 16:
            return stored.to(self._dtype)
        columns = self.weights.up.shape[1]
        codes, self._scale, self._zero = split(stored, self._fold_bits, columns)
        scale, zero = (spread(t.to(self._dtype), columns) for t in (self._scale, self._zero))
        self._grid = scale, zero
        return (unpack(codes, self._fold_bits, columns).to(self._dtype) - zero) * scale

    def _now(self, name: str) -> Tensor:
        return self._base[name] + self._unit[name] * self.get_parameter(name)

    def _codes(self, weight: Float[Tensor, "d_out d"]) -> Float[Tensor, "d_out d"]:
        scale, zero = self._grid
        code = (weight / scale + zero).round().clamp(0, 2**self._fold_bits - 1)
        return torch.where(scale > 0, code, zero)

    def _rounded(self, weight: Float[Tensor, "d_out d"]) -> Float[Tensor, "d_out d"]:
        """The weight rounded as when stored, straight-through."""
        if self._fold_bits == 16:
            return weight
        scale, zero = self._grid
        return (self._codes(weight) - zero) * scale + (weight - weight.detach())

    def _excess(self, tokens: Float[Tensor, "tokens d"]) -> list[Float[Tensor, "tokens guarded"]]:
        """Distance of the estimates past each bound, with gradients to the bounds."""
        z_hat = [tokens.detach() @ predictor.T for predictor in self._predictors]
        return self._guard.excess(z_hat, self._now("bounds"))

    def _outliers(self, tokens: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens listed"]:
        """Mask of corrected listed neurons as straight-through numbers."""
        spread = torch.where(self._width > 0, TEMPERATURE * self._width, 1)
        excesses = self._excess(tokens)
        hard = torch.stack(excesses).amax(0) > 0
        soft = torch.stack([torch.sigmoid(excess / spread) for excess in excesses]).sum(0)
        return F.pad(hard + (soft - soft.detach()), (0, self._listed - self._guarded), value=1.0)
