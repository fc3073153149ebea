"""Plans that change nothing but the rounding: every rewrite that can keep all neurons, told to keep them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.packing import group_count, pack, packed_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.graph.site import Site


def exact_entry(site: Site, parameters: Sequence[Tensor], method: str = "partial_linear") -> SitePlan:
    """The entry under which a rewritten site gives what the original gives.

    Args:
        site: as matched; its activation is no affine function.
        parameters: values of ``site.parameters``.
        method: one of :data:`METHODS`.
    """
    weights = SiteWeights.of(site, parameters)
    settings, tensors = METHODS[method](site, weights)
    return SitePlan.of(
        site, parameters, method=method, stored_bytes=weights.bytes, touched_bytes=weights.bytes, settings=settings,
        tensors=tensors,
    )  # fmt: skip


_Made = tuple[dict[str, Any], dict[str, "Tensor"]]


def _partial_linear(site: Site, weights: SiteWeights) -> _Made:
    """All neurons corrected at every token, each off a surrogate of its own."""
    (hidden, d), gated = weights.up.shape, weights.gate is not None
    both = (2,) if gated else ()
    tensors = {
        "neurons": torch.arange(hidden, dtype=torch.int32, device="cpu"),
        "codes": torch.zeros(0, *both, packed_bytes(d, 2), dtype=torch.uint8, device="cpu"),
        "scale": torch.zeros(0, *both, group_count(d, 64), dtype=torch.float16, device="cpu"),
        "zero": torch.zeros(0, *both, group_count(d, 64), dtype=torch.uint8, device="cpu"),
    }
    slope, other, intercept = (_line(hidden, start, end) for start, end in ((-0.5, 0.5), (0.5, -0.25), (-1, 1)))
    up, down = weights.up.double(), weights.down.double()
    shift = intercept.clone()
    if weights.gate is None:
        lines = [(slope, up, weights.up_bias)]
        tensors |= {"slope": slope, "intercept": intercept, "lower": _line(0, 0, 0), "upper": _line(0, 0, 0)}
    else:
        lines = [(slope, weights.gate.double(), weights.gate_bias), (other, up, weights.up_bias)]
        tensors |= {"guard": _line(0, 0, 0).view(0, 4), "surrogate": torch.stack([slope, other, intercept], 1)}
    for steepness, _, bias in lines:
        shift += 0 if bias is None else steepness * bias.double()
    folded_weight = sum((down * steepness) @ matrix for steepness, matrix, _ in lines)
    folded_bias = down @ shift + (0 if weights.down_bias is None else weights.down_bias.double())
    assert not isinstance(folded_weight, int)
    tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
    folded = {"folded_weight": folded_weight, "folded_bias": folded_bias}
    settings = {"bits": 2, "fold_bits": 16, "row_bits": 16, "group_size": 64, "activation": site.activation}
    return settings, tensors | {name: t.to(weights.up.dtype) for name, t in folded.items()}


def _line(count: int, start: float, end: float) -> Tensor:
    """Evenly spaced numbers in float64, each one that float32 holds: plans store them so."""
    return torch.linspace(start, end, count, dtype=torch.float32, device="cpu").double()


def _low_rank(site: Site, weights: SiteWeights) -> _Made:
    """The matrices themselves, as for a budget of all bytes."""
    return {"ranks": None}, {}


def _hot_fold(site: Site, weights: SiteWeights) -> _Made:
    """Every neuron kept."""
    hidden = len(weights.up)
    return {"kept": hidden}, {"kept": torch.arange(hidden, dtype=torch.int32, device="cpu")}


def _wanda(site: Site, weights: SiteWeights) -> _Made:
    """No weight pruned."""
    masks = {name: torch.ones_like(w, dtype=torch.uint8) for name, w in matrices(weights).items()}
    return {"share": 1.0}, {name: pack(mask, 1) for name, mask in masks.items()}


#: Rewrites that can keep everything, with the settings and tensors that tell them to.
METHODS: dict[str, Callable[[Site, SiteWeights], _Made]] = {
    "partial_linear": _partial_linear,
    "low_rank": _low_rank,
    "hot_fold": _hot_fold,
    "wanda": _wanda,
}
