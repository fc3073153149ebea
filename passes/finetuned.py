"""The result of :func:`tardis_fx.finetune`: a rewrite with dense weights that were trained.

The plan holds all trained constants; the original weights that they were made from are not read again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import trial_run
from tardis_fx.passes.layout import Expected, Tensors, check, check_settings
from tardis_fx.passes.wrapper import Wrapper
from tardis_fx.plan import Planned, SitePlan


class Finetuned(Wrapper):
    """Runs another rewrite with trained constants from the plan."""

    name: ClassVar[str] = "finetuned"
    leaves_matrices = True
    trained = True

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All tensors of two dimensions, because only dense weights and biases are trained."""
        return {name: 1.0 for name, tensor in plan.tensors.items() if tensor.dim() > 1}

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> list[Planned]:
        """Always fails, because calibration does not train.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.method} is trained, not fitted: give a plan without it to tardis_fx.finetune")

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Checks that the weights are finite, in the model's dtype, and can be run by the trained rewrite."""
        if self._alone or not self.inner.leaves_matrices:
            raise ValueError("finetuned does not follow a rewrite of dense matrices")
        check_settings(plan, "inner")
        inner, entry = self.inner, self.inner_entry(plan)
        layout = inner.layout(entry, weights)
        wanted = plan.tensors
        if layout is not None:
            blank = {n: torch.zeros(e.shape, dtype=e.dtype, device="cpu") for n, e in layout.items()}
            wanted = inner.constants(replace(entry, tensors=blank), weights)
        check(plan.tensors, {name: Expected(weights.up.dtype, tuple(t.shape)) for name, t in wanted.items()})
        trial_run(self, plan, weights)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Runs the trained rewrite."""
        return self.inner.forward(x, constants, self.inner_entry(plan))
