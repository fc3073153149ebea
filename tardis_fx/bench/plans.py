"""Makes plans for random weights, without calibration text, that read as much as is asked for.

The speed of a plan depends only on the bytes that it reads.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from tardis_fx.config import Config
from tardis_fx.errors import BenchError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite
from tardis_fx.plan import Plan, SitePlan


@runtime_checkable
class Recipe(Protocol):
    """Makes the random plans of one rewrite; its string names it in tables."""

    @property
    def rewrite(self) -> Rewrite:
        """The rewrite of the plans."""

    @property
    def config(self) -> Config:
        """The config of the plans."""

    def added(self, size: int) -> float:
        """Approximate bytes that a plan adds, relative to an FFN's; ``size`` is that of a weight in bytes."""

    def site_plan(self, site: ObservedSite, x: Float32[Tensor, "tokens d"]) -> SitePlan:
        """Makes the plan of one site, with thresholds set on its inputs."""

    def step(self, entry: SitePlan, weights: SiteWeights, x: Float32[Tensor, "tokens d"]) -> tuple[float, float]:
        """Bytes that a step of several tokens reads, and the share of (token, neuron) pairs that are outliers.

        What several tokens read of a neuron counts once.
        """


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


class _Inputs(list[Tensor]):
    """Observer that keeps a site's inputs."""

    update = list[Tensor].append


def ffn_sites(model: nn.Module, example: Tensor) -> list[ObservedSite]:
    """All FFNs of a model in eval mode, found by running it on an example of its first argument."""
    return list(BatchObservation(model, [example], progress=False).sites)


@torch.no_grad()
def random_plans(model: nn.Module, batch: Tensor, recipes: Sequence[AnyRecipe]) -> dict[AnyRecipe, Plan]:
    """Makes plans of every FFN of a model in eval mode, by recipe.

    Thresholds are set on the inputs of the FFNs for a batch, the model's first argument, of 500 tokens or more.

    Raises:
        BenchError: the model has no FFN that every rewrite accepts.
    """
    observation = BatchObservation(model, [batch], progress=False)
    rewrites = {recipe.rewrite.name: recipe.rewrite for recipe in recipes}
    sites = [
        site
        for site in observation.sites
        if site.site.reason is None and all(rewrite.refuse(site.site) is None for rewrite in rewrites.values())
    ]
    if not sites:
        raise BenchError(f"the model has no FFN that {' and '.join(rewrites)} can rewrite")
    inputs = observation.answer(Run("inputs of the FFNs", lambda _: _Inputs(), sites))
    return {
        recipe: Plan(
            tuple(recipe.site_plan(site, torch.cat(inputs[site.fingerprint])) for site in sites), recipe.config
        )
        for recipe in recipes
    }
