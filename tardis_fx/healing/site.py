"""A planned site whose small tensors can be trained: the specification, with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.calibration.ranges import Costs
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import join, low_bits, pack, split, spread, unpack

if TYPE_CHECKING:
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.passes.partial_linear import PartialLinear
    from tardis_fx.plan import SitePlan

#: Over which share of a hot range's width a bound's gradient spreads.
TEMPERATURE = 0.05
#: In which a bound's change is measured, as a share of its hot range's width: the learning rate is the same for all.
BOUND_UNIT = 0.1
#: Of how many widenings a count is kept, and the widest, as a share of a hot range's width.
_STEPS, _WIDEST = 1024, 1.0


class TrainableSite(nn.Module):
    """What a plan puts in a site's place, with the small tensors as parameters and all else fixed.

    The parameters are changes, zero at first: of the folded weight and bias, the slopes and the intercepts in units of
    the tensor's root mean square, of the bounds in tenths of the neuron's hot range. With ``training`` set, ``forward``
    is differentiable; its value is the specification's all the same, for rounding (of codes, and to the model's dtype)
    and guard are straight-through: exact forward, and backward as if a code were not rounded and the guard were a
    sigmoid. The guard passes gradients to its bounds alone. Otherwise ``forward`` is what the stored plan runs, and
    counts corrections.

    Memory: W1 and W2 of the listed neurons and the predictor, in float32; of a training step, some six values of
    float32 for every token and neuron.
    """

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: PartialLinear) -> None:
        """Opens an entry.

        Args:
            entry: of the site.
            weights: of the site.
            rewrite: that the entry names.
        """
        super().__init__()
        self.entry, self.weights, self._rewrite = entry, weights, rewrite
        self._fold_bits: int = entry.settings["fold_bits"]
        constants = rewrite.constants(entry, weights)
        self._dtype = reference.compute_dtype(weights.w1.dtype)
        self._open(constants)
        real = {name: constants[name].to(self._dtype) for name in ("folded_bias", "slope", "intercept")}
        real |= {name: real[name][: len(self._w1)] for name in ("slope", "intercept")}
        real["folded_weight"] = self._folded_weight(constants["folded_weight"])
        self._base = real | {name: constants[name][: len(self._predictor)] for name in ("lower", "upper")}
        width = self._base["upper"] - self._base["lower"]
        self._width = torch.where(width.isfinite() & (width > 0), width, 0)  # an empty range stays empty
        self._unit = {name: tensor.square().mean().sqrt() if tensor.numel() else 0 for name, tensor in real.items()}
        self._unit |= dict.fromkeys(("lower", "upper"), BOUND_UNIT * self._width)
        for name, tensor in self._base.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor)))
        self.eval()

    @property
    def costs(self) -> Costs:
        """Bytes read."""
        (d_out, _), (_, d), settings = self.weights.w2.shape, self.weights.w1.shape, self.entry.settings
        size, bias = self.weights.w1.element_size(), self.weights.b1 is not None
        return Costs.of(
            d,
            d_out,
            settings["bits"],
            size,
            self._fold_bits,
            settings["row_bits"],
            group_size=settings["group_size"],
            bias=bias,
        )

    @property
    def bounds(self) -> list[nn.Parameter]:
        """The changes of the guard's bounds."""
        return [self.get_parameter("lower"), self.get_parameter("upper")]

    def train(self, mode: bool = True) -> TrainableSite:
        """Chooses what ``forward`` does, and starts counting at zero; leaving training fixes the stored plan."""
        super().train(mode)
        self.corrected = torch.zeros((), device=self.weights.w1.device)
        if not mode:
            self._constants = self._rewrite.constants(self.planned(), self.weights)
            self.tokens, self._beyond = 0, torch.zeros(_STEPS, device=self.weights.w1.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d_out]."""
        if not self.training:
            self._count(x)
            return self._rewrite.forward(x, self._constants, self.entry)
        tokens = x.reshape(-1, x.shape[-1]).to(self._dtype)
        outlier = self._outliers(tokens)
        self.corrected = self.corrected + outlier.sum()
        z = F.linear(tokens, self._w1, self._b1)
        activated = ACTIVATIONS[self.entry.settings["activation"]].eager(z)
        added = (outlier * (activated - self._now("slope") * z - self._now("intercept"))) @ self._w2t
        weight, bias = self._rounded(self._now("folded_weight")), self._now("folded_bias").to(x.dtype)
        if self._fold_bits == 16:
            folded = F.linear(x, weight.to(x.dtype), bias)
        else:
            folded, added = bias, added + tokens @ weight.T
        return (folded.to(self._dtype) + added.view(*x.shape[:-1], len(bias))).to(x.dtype)

    def corrections(self) -> Tensor:
        """Corrections a token counted since training was left, [widenings], with ranges wider by ever more."""
        always = len(self._w1) - len(self._predictor)
        return always + self._beyond.flip(0).cumsum(0).flip(0) / max(1, self.tokens)

    @torch.no_grad()
    def widen(self, step: int) -> None:
        """Moves both bounds outwards, to the widening of this index in :meth:`corrections`."""
        lower, upper = self.bounds
        lower.sub_(step * _WIDEST / _STEPS / BOUND_UNIT)
        upper.add_(step * _WIDEST / _STEPS / BOUND_UNIT)

    @torch.no_grad()
    def planned(self) -> SitePlan:
        """The entry with the tensors as they are now; its figures are the old ones."""
        dtype = self.weights.w1.dtype
        tensors = {name: self._now(name) for name in ("slope", "intercept", "lower", "upper")}
        tensors["folded_bias"] = self._now("folded_bias").to(dtype)
        weight = self._now("folded_weight")
        if self._fold_bits == 16:
            tensors["folded_weight"] = weight.to(dtype)
        else:
            codes = pack(self._codes(weight).to(torch.uint8), self._fold_bits)
            tensors["folded_weight"] = join(codes, self._scale, self._zero)
        old = self.entry.tensors
        stored = {name: t.to(dtype=old[name].dtype, device=old[name].device) for name, t in tensors.items()}
        return replace(self.entry, tensors={**old, **stored})

    def _open(self, constants: dict[str, Tensor]) -> None:
        """Fixed tensors, opened once: the one place that knows how plans lay out rows."""
        settings, columns = self.entry.settings, self.weights.w1.shape[1]
        listed, guarded = constants["counts"].tolist()
        rows = constants["neurons"][:listed].long()
        codes, scale, zero = (constants[name][:guarded] for name in ("codes", "scale", "zero"))
        bits, row_bits = settings["bits"], settings["row_bits"]
        self._predictor = reference.dequantise(codes, scale, zero, bits, columns, self._dtype)
        self._w2t = reference.rows_of(constants["w2t"][rows], row_bits, len(self.weights.w2), self._dtype)
        if row_bits == 16:
            self._w1 = constants["w1"][rows].to(self._dtype)
        else:  # nested in the predictor
            low = reference.rows_of(constants["w1"][rows], low_bits(bits, row_bits), columns, self._dtype)
            self._w1 = self._predictor + low
        self._b1 = constants["b1"][rows].to(self._dtype) if "b1" in constants else None

    def _folded_weight(self, stored: Tensor) -> Tensor:
        if self._fold_bits == 16:
            return stored.to(self._dtype)
        columns = self.weights.w1.shape[1]
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

    def _outliers(self, tokens: Tensor) -> Tensor:
        """Ones where listed neurons are corrected, [tokens, listed], straight-through."""
        lower, upper = self._now("lower"), self._now("upper")
        z_hat = tokens.detach() @ self._predictor.T
        spread = torch.where(self._width > 0, TEMPERATURE * self._width, 1)
        soft = torch.sigmoid((z_hat - upper) / spread) + torch.sigmoid((lower - z_hat) / spread)
        hard = (z_hat < lower) | (z_hat > upper)
        return F.pad(hard + (soft - soft.detach()), (0, len(self._w1) - len(self._predictor)), value=1.0)

    @torch.no_grad()
    def _count(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).to(self._dtype)
        z_hat = tokens @ self._predictor.T
        beyond = torch.maximum(self._now("lower") - z_hat, z_hat - self._now("upper"))
        some = beyond > 0
        share = (beyond / self._width)[some].float().clamp(max=_WIDEST)
        self._beyond += torch.histc(share, _STEPS, 0, _WIDEST)
        self.tokens += len(tokens)
