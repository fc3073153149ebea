"""A planned site whose small tensors can be trained: the specification, with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.healing.guard import Guard, Interval, Score
from tardis_fx.partial_linear.costs import Costs
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import join, low_bits, pack, split, spread, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.passes.base import Rewrite
    from tardis_fx.plan import SitePlan

#: Over which share of a hot range's width a bound's gradient spreads.
TEMPERATURE = 0.05
#: In which a bound's change is measured, as a share of its hot range's width: the learning rate is the same for all.
BOUND_UNIT = 0.1
#: Of how many widenings a count is kept, and the widest, as a share of a hot range's width.
_STEPS, _WIDEST = 1024, 1.0


class TrainableSite(nn.Module):
    """What a plan puts in a site's place, with the small tensors as parameters and all else fixed.

    The parameters are changes, zero at first: of the folded weight and bias in units of the tensor's root mean square,
    of slopes and intercepts in units of theirs over the neurons, of the guard's bounds in tenths of the neuron's hot
    range, outwards. With ``training`` set, ``forward`` is differentiable; its value is the specification's all the
    same, for rounding (of codes, and to the model's dtype) and guard are straight-through: exact forward, and backward
    as if a code were not rounded and the guard were a sigmoid. The guard passes gradients to its bounds alone.
    Otherwise ``forward`` is what the stored plan runs, and counts corrections.

    Memory: the matrices of the listed neurons and the predictors, in float32; of a training step, some six values of
    float32 for every token and neuron, of a gated site some ten.
    """

    #: The changes of the guard's bounds.
    bounds: nn.Parameter

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: Rewrite) -> None:
        """Opens an entry.

        Args:
            entry: of the site.
            weights: of the site.
            rewrite: that the entry names.
        """
        super().__init__()
        self.entry, self.weights, self._rewrite = entry, weights, rewrite
        self._fold_bits: int = entry.settings["fold_bits"]
        self._activation: str = entry.settings["activation"]
        self._dtype = reference.compute_dtype(weights.up.dtype)
        constants = rewrite.constants(entry, weights)
        self._listed, self._guarded = constants["counts"].tolist()
        self._columns = self._rows(constants, "columns", len(weights.down), entry.settings["row_bits"])
        self._biases = constants.get("biases")
        self._predictors = [self._predictor(constants, i) for i in range(len(weights.projections))]
        self._projections = [
            self._projection(constants, name, predictor)
            for name, predictor in zip(weights.projections, self._predictors, strict=True)
        ]
        guard = constants["guard"][: self._guarded]
        self._guard: Guard = (
            Interval(guard) if len(self._projections) == 1 else Score(guard, self._biases, self._activation)
        )
        width = self._guard.width
        self._width = torch.where(width.isfinite() & (width > 0), width, 0)  # an empty range stays empty
        real = {name: constants[name].to(self._dtype) for name in ("surrogate", "folded_bias")}
        real["surrogate"] = real["surrogate"][: self._listed]
        real["folded_weight"] = self._folded_weight(constants["folded_weight"])
        self._base = {**real, "bounds": self._guard.bounds}
        self._unit = {name: tensor.square().mean().sqrt() if tensor.numel() else 0 for name, tensor in real.items()}
        if self._listed:
            self._unit["surrogate"] = real["surrogate"].square().mean(0).sqrt()
        outwards = torch.tensor(self._guard.outwards, dtype=width.dtype, device=width.device)
        self._unit["bounds"] = outwards * BOUND_UNIT * self._width[:, None]
        for name, tensor in self._base.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor)))
        self.eval()

    @property
    def costs(self) -> Costs:
        """Bytes read."""
        settings, w = self.entry.settings, self.weights
        return Costs.of(
            w.up.shape[1],
            len(w.down),
            settings["bits"],
            w.up.element_size(),
            self._fold_bits,
            settings["row_bits"],
            group_size=settings["group_size"],
            bias=w.up_bias is not None or w.gate_bias is not None,
            k=1 if w.gate is None else 2,
        )

    def train(self, mode: bool = True) -> TrainableSite:
        """Chooses what ``forward`` does, and starts counting at zero; leaving training fixes the stored plan."""
        super().train(mode)
        self.corrected = torch.zeros((), dtype=torch.float32, device=self.weights.up.device)
        if not mode:
            self._constants = self._rewrite.constants(self.planned(), self.weights)
            self.tokens, self._counted = 0, torch.zeros(_STEPS, dtype=torch.float32, device=self.weights.up.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d_out]."""
        tokens = x.reshape(-1, x.shape[-1]).to(self._dtype)
        if not self.training:
            self._count(tokens)
            return self._rewrite.forward(x, self._constants, self.entry)
        outlier = self._outliers(tokens)
        self.corrected = self.corrected + outlier.sum()
        z = reference.biased([tokens @ rows.T for rows in self._projections], self._biases, self._listed)
        residual = reference.surrogate_error(z, self._now("surrogate"), self._activation)
        added = (outlier * residual) @ self._columns
        weight, bias = self._rounded(self._now("folded_weight")), self._now("folded_bias").to(x.dtype)
        if self._fold_bits == 16:
            folded = F.linear(x, weight.to(x.dtype), bias)
        else:
            folded, added = bias, added + tokens @ weight.T
        return (folded.to(self._dtype) + added.view(*x.shape[:-1], len(bias))).to(x.dtype)

    def corrections(self) -> Tensor:
        """Corrections a token counted since training was left, [widenings], with ranges wider by ever more."""
        always: int = self._listed - self._guarded
        return always + self._counted.flip(0).cumsum(0).flip(0) / max(1, self.tokens)

    @torch.no_grad()
    def widen(self, step: int) -> None:
        """Moves the bounds outwards, to the widening of this index in :meth:`corrections`."""
        self.bounds.add_(step * _WIDEST / _STEPS / BOUND_UNIT)

    @torch.no_grad()
    def planned(self) -> SitePlan:
        """The entry with the tensors as they are now; its figures are the old ones."""
        dtype = self.weights.up.dtype
        tensors = {name: self._now(name) for name in ("surrogate", "folded_bias")}
        tensors["guard"] = self._guard.tensor(self._now("bounds"))
        weight = self._now("folded_weight")
        if self._fold_bits == 16:
            tensors["folded_weight"] = weight.to(dtype)
        else:
            codes = pack(self._codes(weight).to(torch.uint8), self._fold_bits)
            tensors["folded_weight"] = join(codes, self._scale, self._zero)
        old = self.entry.tensors
        stored = {name: t.to(dtype=old[name].dtype, device=old[name].device) for name, t in tensors.items()}
        return replace(self.entry, tensors={**old, **stored})

    def _rows(self, constants: Mapping[str, Tensor], name: str, columns: int, bits: int) -> Tensor:
        """Rows of a matrix, of the listed neurons."""
        neurons = constants["neurons"][: self._listed].long()
        return reference.rows_of(constants[name][neurons], bits, columns, self._dtype)

    def _predictor(self, constants: Mapping[str, Tensor], projection: int) -> Tensor:
        """Rows of a predictor, [guarded, d]."""
        codes, scale, zero = (constants[name][: self._guarded, projection] for name in ("codes", "scale", "zero"))
        bits, columns = self.entry.settings["bits"], self.weights.up.shape[1]
        return reference.dequantise(codes, scale, zero, bits, columns, self._dtype)

    def _projection(self, constants: Mapping[str, Tensor], name: str, predictor: Tensor) -> Tensor:
        """Rows of a projection, [listed, d]: as they are, or nested in the predictor."""
        bits, row_bits = self.entry.settings["bits"], self.entry.settings["row_bits"]
        rows = self._rows(constants, name, predictor.shape[1], 16 if row_bits == 16 else low_bits(bits, row_bits))
        return rows if row_bits == 16 else predictor + rows

    def _folded_weight(self, stored: Tensor) -> Tensor:
        if self._fold_bits == 16:
            return stored.to(self._dtype)
        columns = self.weights.up.shape[1]
        codes, self._scale, self._zero = split(stored, self._fold_bits, columns)
        scale, zero = (spread(t.to(self._dtype), columns) for t in (self._scale, self._zero))
        self._grid = scale, zero
        return (unpack(codes, self._fold_bits, columns).to(self._dtype) - zero) * scale

    def _now(self, name: str) -> Tensor:
        return self._base[name] + self._unit[name] * self.get_parameter(name)

    def _codes(self, weight: Tensor) -> Tensor:
        scale, zero = self._grid
        code = (weight / scale + zero).round().clamp(0, 2**self._fold_bits - 1)
        return torch.where(scale > 0, code, zero)

    def _rounded(self, weight: Tensor) -> Tensor:
        """As it is stored, straight-through."""
        if self._fold_bits == 16:
            return weight
        scale, zero = self._grid
        return (self._codes(weight) - zero) * scale + (weight - weight.detach())

    def _beyond(self, tokens: Tensor) -> list[Tensor]:
        """How far beyond each bound the predictor puts the guarded neurons, [tokens, guarded]; gradients to bounds."""
        z_hat = [tokens.detach() @ predictor.T for predictor in self._predictors]
        return self._guard.beyond(z_hat, self._now("bounds"))

    def _outliers(self, tokens: Tensor) -> Tensor:
        """Ones where listed neurons are corrected, [tokens, listed], straight-through."""
        spread = torch.where(self._width > 0, TEMPERATURE * self._width, 1)
        hard, soft = (
            torch.zeros((), dtype=torch.bool, device=tokens.device),
            torch.zeros((), dtype=torch.float32, device=tokens.device),
        )
        for beyond in self._beyond(tokens):
            hard, soft = hard | (beyond > 0), soft + torch.sigmoid(beyond / spread)
        return F.pad(hard + (soft - soft.detach()), (0, self._listed - self._guarded), value=1.0)

    @torch.no_grad()
    def _count(self, tokens: Tensor) -> None:
        beyond = torch.stack(self._beyond(tokens)).amax(0)
        some = beyond > 0
        share = (beyond / self._width)[some].float().clamp(max=_WIDEST)
        self._counted += torch.histc(share, _STEPS, 0, _WIDEST)
        self.tokens += len(tokens)
