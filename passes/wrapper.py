"""Rewrites that change the constants of another rewrite, or of the original FFN."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, matrices_of
from tardis_fx.passes.layout import Layout, Tensors
from tardis_fx.passes.static import Choice, StaticRewrite
from tardis_fx.plan import SitePlan


class Wrapper(Rewrite):
    """Base class of rewrites that stand after another rewrite and run it with changed constants.

    Attributes:
        inner: the other rewrite; the original FFN if there is none.
    """

    def __init__(self, inner: Rewrite | None = None) -> None:
        self._alone, self.inner = inner is None, inner or Original()
        self.compares_sites = self.inner.compares_sites

    @property
    def method(self) -> str:
        """Its own name, after that of the other rewrite and ``+``."""
        return self.name if self._alone else f"{self.inner.method}+{self.name}"

    def applied_after(self, previous: Rewrite) -> Rewrite:
        """Wraps the previous rewrite."""
        return type(self)(previous)

    def refuse(self, site: Site) -> str | None:
        """Why the other rewrite refuses a site, or None."""
        return self.inner.refuse(site)

    def inner_entry(self, plan: SitePlan) -> SitePlan:
        """The entry in the form of the other rewrite."""
        return replace(plan, method=self.inner.method, settings=plan.settings["inner"])


class Original(StaticRewrite):
    """The original FFN. It is not registered, because it changes nothing by itself."""

    name: ClassVar[str] = "original"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of all weights."""
        return weights.bytes

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Keeps every site unchanged."""
        return [Choice(site.weights.bytes) for site in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """No tensors: the entry is empty."""
        return {}

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All matrices, read whole."""
        return dict.fromkeys(matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The original matrices and biases."""
        return matrices(weights) | biases(weights)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the original FFN."""
        return dense(x, constants, str(plan.activation))
