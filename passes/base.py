"""The contract of a rewrite: one way to replace a site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar

from tardis_fx.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.plan import SitePlan

#: Entry points of this group name subclasses of :class:`Rewrite`.
GROUP = "tardis_fx.passes"


class Rewrite(ABC):
    """One way to replace a site.

    A rewrite is stateless. ``fit`` measures and decides; what it decides is a :class:`SitePlan`, which a file can hold.
    ``constants`` turns plan and weights into the tensors that ``forward`` reads. ``forward`` is plain PyTorch: it runs
    eagerly as the specification, and is traced into the graph that Inductor compiles.

    The constants of two sites with equal weight shapes and equal ``settings`` must have equal shapes and dtypes, for
    one compiled graph may serve both.
    """

    #: Name in ``Config(method=...)`` and in the entry-point group.
    name: ClassVar[str]
    #: Whether :meth:`forward` gives what the original gives, to rounding: then prefill takes it, too.
    exact: ClassVar[bool] = False

    @abstractmethod
    def refuse(self, site: Site) -> str | None:
        """Why this rewrite cannot take a site that the matcher would let it have, or None."""

    @abstractmethod
    def fit(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[SitePlan]:
        """Plans every site of ``sites``, none of which :meth:`refuse` refuses, in their order.

        On live calls it is begun again after every run that it asks of the observation, and those that are done answer
        at once: it must ask for the same runs each time, and may keep what is costly in ``observation.memo``.
        """

    @abstractmethod
    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The tensors that :meth:`forward` reads, on the weights' device."""

    @abstractmethod
    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The rewritten site: x [..., d] to [..., d_out]. Traced with ``torch.fx``: no branches on values or shapes."""


@cache
def rewrite_named(name: str) -> Rewrite:
    """The registered rewrite of this name.

    Raises:
        ConfigError: none is registered, or it is no :class:`Rewrite`.
    """
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        raise ConfigError(f"no rewrite named {name!r}; registered are {', '.join(sorted(registered)) or 'none'}")
    rewrite = registered[name].load()
    if not (isinstance(rewrite, type) and issubclass(rewrite, Rewrite)):
        raise ConfigError(f"the entry point {name!r} of group {GROUP} is no subclass of Rewrite: {rewrite!r}")
    return rewrite()
