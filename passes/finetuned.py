"""A rewrite of dense weights whose weights were trained: what :func:`tardis_fx.finetune` makes of a plan.

The plan holds all of the trained constants, and those of the original that they were made from are not read again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.errors import ConfigError
from tardis_fx.passes.base import Rewrite, trial_run
from tardis_fx.passes.layout import Expected, check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.plan import Planned, SitePlan


class Finetuned(Rewrite):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "finetuned"
    leaves_matrices = True
    trained = True

    def __init__(self, inner: Rewrite | None = None) -> None:
        """Wraps the rewrite that was trained; None is good for nothing but to be put behind one."""
        self._inner = inner

    @property
    def method(self) -> str:
        """Its name behind the other's."""
        return self.name if self._inner is None else f"{self._inner.method}+{self.name}"

    def after(self, previous: Rewrite) -> Rewrite:
        """Around another rewrite."""
        return type(self)(previous)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All of two dimensions, for nothing but dense weights and biases is trained."""
        return {name: 1.0 for name, tensor in plan.tensors.items() if tensor.dim() > 1}

    def refuse(self, site: Site) -> str | None:
        """What the other one refuses."""
        return None if self._inner is None else self._inner.refuse(site)

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> list[Planned]:
        """Calibration trains nothing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.method} is trained, not fitted: give a plan without it to tardis_fx.finetune")

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """What :func:`tardis_fx.finetune` trains: weights in the model's dtype, finite, that the other one can run."""
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
        """The plan's tensors."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The other rewrite's."""
        assert self._inner is not None
        return self._inner.forward(x, constants, self._entry(plan))

    def _entry(self, plan: SitePlan) -> SitePlan:
        """What the other rewrite takes for its own."""
        assert self._inner is not None
        return replace(plan, method=self._inner.method, settings=plan.settings["inner"])
