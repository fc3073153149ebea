"""All matrices by products of two thin ones, whose outputs on the calibration tokens are nearest.

1. With ``L Lᵀ`` the Gram matrix of what W multiplies, the best rank r in ``‖X Wᵀ - X (A B)ᵀ‖`` is the truncated SVD of
   ``W L = U S Vᵀ``: ``A = U_r S_r``, ``B = V_rᵀ L⁻¹`` (truncation-aware whitening, SVD-LLM, arXiv 2403.07378).
2. All matrices get the same share of their full rank, the largest that the budget allows.
3. A budget of all bytes keeps the matrices as they are: in factors, full rank costs more than they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.feed_forward import BIASES, biases, feed_forward, linear, matrices
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Expected
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.quantisation import factor
from tardis_fx.statistics.operands import Grams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan


class LowRank(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "low_rank"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """All of rank 1."""
        return _bytes(weights, [1] * len(matrices(weights)))

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Factors of every site."""
        grams = yield measured(Grams, sites)
        found = []
        for site in sites:
            weights, gram = site.weights, grams[site.fingerprint]
            if config.budget == 1:
                found.append(Choice(weights.bytes, settings={"ranks": None}))
                continue
            ranks = _ranks(weights, config.budget)
            tensors: dict[str, Tensor] = {}
            for (name, weight), rank in zip(matrices(weights).items(), ranks, strict=True):
                a, b = truncated(weight.double().cpu(), rank, gram.of(name))
                tensors |= {f"{name}_a": a.to(weight.dtype), f"{name}_b": b.to(weight.dtype)}
            found.append(Choice(_bytes(weights, ranks), tensors, {"ranks": ranks}))
        return found

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The factors, of the ranks that the settings name, or none."""
        ranks, own = plan.settings["ranks"], matrices(weights)
        if ranks is None:
            return {}
        found: Layout = {}
        for (name, weight), rank in zip(own.items(), ranks, strict=True):
            if type(rank) is not int or not 1 <= rank <= min(weight.shape):
                raise ValueError(f"the rank of {name} must be from 1 to {min(weight.shape)}, not {rank!r:.80}")
            found |= factors(name, weight.shape, rank, weight.dtype)
        return found

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The factors, or the matrices."""
        return dict.fromkeys(plan.tensors or matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Factors ``up_a`` [h, r1], ``up_b`` [r1, d], ``down_a`` [d_out, r2], ..., or the matrices."""
        found = {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()} | biases(weights)
        return found if plan.settings["ranks"] else found | matrices(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """Two thin linear layers for each."""

        def project(x: Tensor, name: str) -> Tensor:
            if plan.settings["ranks"] is None:
                return linear(x, constants, name)
            return thin(x, constants, name, BIASES[name])

        return feed_forward(x, project, str(plan.activation), gated=plan.kind == "gated")


def factors(name: str, sizes: Sequence[int], rank: int, dtype: torch.dtype) -> Layout:
    """What :func:`truncated` makes of a matrix of such sizes."""
    rows, columns = sizes
    return {f"{name}_a": Expected(dtype, (rows, rank)), f"{name}_b": Expected(dtype, (rank, columns))}


def thin(x: Tensor, constants: Mapping[str, Tensor], name: str, bias: str) -> Tensor:
    """A projection by factors ``{name}_a`` [rows, rank] and ``{name}_b`` [rank, columns], and its bias if any."""
    return F.linear(F.linear(x, constants[f"{name}_b"]), constants[f"{name}_a"], constants.get(bias))


def truncated(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors [rows, rank] and [rank, columns], the singular values split evenly between them.

    Args:
        weight: [rows, columns], float64.
        rank: of the product.
        gram: [columns, columns] of what the matrix multiplies; None looks at the weights alone.
    """
    lower = None if gram is None else factor(gram)
    u, s, vt = torch.linalg.svd(weight if lower is None else weight @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    if lower is not None:
        b = torch.linalg.solve_triangular(lower, b, upper=False, left=False)
    return a.contiguous(), b.contiguous()


def _ranks(weights: SiteWeights, budget: float) -> list[int]:
    """The largest ranks within a budget that are the same share of full rank, in the order of the matrices."""
    full = [min(w.shape) for w in matrices(weights).values()]
    for step in range(max(full), 0, -1):
        ranks = [max(1, f * step // max(full)) for f in full]
        if _bytes(weights, ranks) <= budget * weights.bytes:
            break
    return ranks


def _bytes(weights: SiteWeights, ranks: Sequence[int]) -> int:
    numbers = sum(rank * sum(w.shape) for rank, w in zip(ranks, matrices(weights).values(), strict=True))
    return numbers * weights.up.element_size() + bias_bytes(weights)
