"""Plans that change nothing but the rounding: every rewrite that can keep all neurons, told to keep them all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.correction import guard_width
from tardis_fx.runtime.packing import group_count, pack, packed_bytes


def exact_entry(site: Site, parameters: Sequence[Tensor], method: str = "guarded_fold") -> SitePlan:
    """The entry under which a rewritten site gives what the original gives.

    Args:
        site: as matched; its activation is no affine function.
        parameters: values of ``site.parameters``.
        method: one of :data:`METHODS`.
    """
    weights = SiteWeights.from_site(site, parameters)
    settings, tensors = METHODS[method](site, weights)
    return SitePlan.from_site(
        site, parameters, method=method, stored_bytes=weights.bytes, touched_bytes=weights.bytes, settings=settings,
        tensors=tensors,
    )  # fmt: skip


_Made = tuple[dict[str, Any], dict[str, "Tensor"]]


def _guarded_fold(site: Site, weights: SiteWeights) -> _Made:
    """All neurons corrected at every token, each off a surrogate of its own."""
    (hidden, d), k = weights.up.shape, len(weights.projections)
    tensors = {
        "neurons": torch.arange(hidden, dtype=torch.int32, device="cpu"),
        "codes": torch.zeros(0, k, packed_bytes(d, 2), dtype=torch.uint8, device="cpu"),
        "scale": torch.zeros(0, k, group_count(d, 64), dtype=torch.float16, device="cpu"),
        "zero": torch.zeros(0, k, group_count(d, 64), dtype=torch.uint8, device="cpu"),
        "guard": torch.zeros(0, guard_width(k), dtype=torch.float32, device="cpu"),
    }
    slopes = [_line(hidden, start, end) for start, end in ((-0.5, 0.5), (0.5, -0.25))[:k]]
    intercept, down = _line(hidden, -1, 1), weights.down.double()
    shift, folded_weight = intercept, torch.zeros(len(down), d, dtype=torch.float64, device="cpu")
    for slope, (matrix, bias) in zip(slopes, weights.projections.values(), strict=True):
        shift = shift if bias is None else shift + slope * bias.double()
        folded_weight += (down * slope) @ matrix.double()
    folded_bias = down @ shift + (0 if weights.down_bias is None else weights.down_bias.double())
    tensors["surrogate"] = torch.stack([*slopes, intercept], 1).float()
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
    "guarded_fold": _guarded_fold,
    "low_rank": _low_rank,
    "hot_fold": _hot_fold,
    "wanda": _wanda,
}
