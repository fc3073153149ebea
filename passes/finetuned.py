"""The result of :func:`tardis_fx.finetune`: a rewrite with dense weights that were trained.

The plan holds all trained constants; the original weights that they were made from are not read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, trial_run
from tardis_fx.passes.layout import Expected, check
from tardis_fx.plan import Planned, SitePlan


class Finetuned(Rewrite):
    """Runs another rewrite with trained constants from the plan."""

    name: ClassVar[str] = "finetuned"
    leaves_matrices = True
    trained = True

    def __init__(self, inner: Rewrite | None = None) -> None:
        """Wraps the rewrite that was trained; None is only useful to be chained after one."""
        self._inner = inner

    @property
    def method(self) -> str:
        """Name of the trained rewrite, ``+``, and its own name."""
        return self.name if self._inner is None else f"{self._inner.method}+{self.name}"

    def applied_after(self, previous: Rewrite) -> Rewrite:
        """Wraps the previous rewrite."""
        return type(self)(previous)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All tensors of two dimensions, because only dense weights and biases are trained."""
        return {name: 1.0 for name, tensor in plan.tensors.items() if tensor.dim() > 1}

    def refuse(self, site: Site) -> str | None:
        """Why the trained rewrite refuses a site, or None."""
        return None if self._inner is None else self._inner.refuse(site)

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> list[Planned]:
        """Always fails, because calibration does not train.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.method} is trained, not fitted: give a plan without it to tardis_fx.finetune")

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Checks that the weights are finite, in the model's dtype, and can be run by the trained rewrite."""
        inner = self._inner
        if inner is None or not inner.leaves_matrices:
            raise ValueError("it is not put behind a rewrite of dense matrices")
        if plan.settings.keys() != {"inner"}:
            raise ValueError(f"it has the settings {', '.join(plan.settings)}, not those of the other rewrite")
        entry = self._entry(plan)
        layout = inner.layout(entry, weights)
        wanted: Mapping[str, Tensor] = plan.tensors
        if layout is not None:
            blank = {n: torch.zeros(e.shape, dtype=e.dtype, device="cpu") for n, e in layout.items()}
            wanted = inner.constants(replace(entry, tensors=blank), weights)
        check(plan.tensors, {name: Expected(weights.up.dtype, tuple(t.shape)) for name, t in wanted.items()})
        trial_run(self, plan, weights)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The trained tensors of the plan."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """Runs the trained rewrite."""
        assert self._inner is not None
        return self._inner.forward(x, constants, self._entry(plan))

    def _entry(self, plan: SitePlan) -> SitePlan:
        """The entry in the form of the trained rewrite."""
        assert self._inner is not None
        return replace(plan, method=self._inner.method, settings=plan.settings["inner"])
