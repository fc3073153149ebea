"""The contract of a rewrite: one way to replace a site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tardis_fx.errors import ConfigError
from tardis_fx.observation.run import Run
from tardis_fx.passes.layout import check
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.check import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import Planned


@dataclass(frozen=True)
class NoOptions:
    """Of a rewrite without knobs."""


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
    #: Its knobs: a frozen dataclass with a default for each, which refuses a wrong value with a ConfigError.
    Options: ClassVar[type[Any]] = NoOptions
    #: Whether :meth:`forward` gives what the original gives, to rounding: then prefill takes it, too.
    exact: bool = False
    #: Whether what becomes of a site depends on the others even where each has bytes of its own: then :meth:`fit` needs
    #: all of them at once, and ``calibrate(offload=True)`` refuses the rewrite.
    compares_sites: bool = False
    #: Whether the rewritten site is an FFN still, of :meth:`weights`, which another rewrite can be fitted to.
    leaves_ffn: bool = False
    #: Whether there may be any :meth:`matrices`.
    leaves_matrices: bool = False
    #: Whether :meth:`forward` is a fold and its corrections, whose tensors :func:`tardis_fx.heal` distils.
    heals: bool = False
    #: Whether its plans hold weights that :func:`tardis_fx.finetune` has trained.
    trained: bool = False

    def options(self, config: Config) -> Any:
        """Its :attr:`Options` as a config has them.

        Raises:
            ConfigError: an option is unknown or out of its range.
        """
        given, known = config.options_of(self.name), [each.name for each in fields(self.Options)]
        if unknown := [name for name in given if name not in known]:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{self.name} has no option {', '.join(map(repr, unknown))}: {listed}")
        return self.Options(**given)

    @abstractmethod
    def refuse(self, site: Site) -> str | None:
        """Why this rewrite cannot take a site that the matcher would let it have, or None."""

    @abstractmethod
    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]] | list[Planned]:
        """Plans every site of ``sites``, none of which :meth:`refuse` refuses, in their order.

        It yields the runs that it needs, and is sent what each of them found; where it needs none, it may return the
        plans. It takes its decisions from what it is sent alone, so that an interrupted calibration can be resumed.
        """

    @abstractmethod
    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The tensors that :meth:`forward` reads, on the weights' device."""

    @abstractmethod
    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The rewritten site: x [..., d] to [..., d_out]. Traced with ``torch.fx``: no branches on values or shapes."""

    def replacement(self, plan: SitePlan, weights: SiteWeights) -> Callable[[Tensor], Tensor]:
        """What a plan puts in a site's place, [..., d] to [..., d_out], eagerly."""
        return partial(self.forward, constants=self.constants(plan, weights), plan=plan)

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout | None:
        """The tensors that an entry with the plan's settings holds, or None where only :meth:`constants` knows.

        Args:
            plan: read from a file that anybody may have written.
            weights: of its site.

        Raises:
            ValueError: no entry has such settings. So may any other exception say.
        """
        return None

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Checks an entry before anything else is asked of it: by its layout, or else by a trial run.

        Raises:
            ValueError: it is none that :meth:`fit` could have made. So may any other exception say.
        """
        layout = self.layout(plan, weights)
        if layout is None:
            trial_run(self, plan, weights)
        else:
            check(plan.tensors, layout)

    # ---- What a rewrite offers to those that come behind it; see tardis_fx.passes.composed and int8_ffn

    @property
    def method(self) -> str:
        """What plans call it: its name, or, of a composition, the names in their order with ``+`` between."""
        return self.name

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        """The weights of the FFN that the rewritten site is, where it is one."""
        raise NotImplementedError

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Names of the constants, [out, in] in the model's dtype, that :meth:`forward` reads by
        :func:`tardis_fx.graph.feed_forward.multiply` and not otherwise, for other forms of a matrix may stand in their
        place; each with the share of it that ``touched_bytes`` counts.
        """  # noqa: D205
        return {}

    def for_matrices(self, config: Config) -> Config:
        """The config by which it leaves matrices where that is a matter of options, for a rewrite that takes these."""
        return config

    def after(self, previous: Rewrite) -> Rewrite | None:
        """This rewrite applied after another one at the same sites, or None for their composition.

        Raises:
            ConfigError: the two rewrites cannot be composed.
        """
        return None


def trial_run(rewrite: Rewrite, plan: SitePlan, weights: SiteWeights) -> None:
    """Runs two tokens through a rewritten site and checks what comes out; on the CPU, which checks every index.

    Raises:
        ValueError: the output is of another shape or dtype than the site's.
        Exception: the rewrite's own.
    """
    own: dict[str, Any] = {name: None if t is None else t.cpu() for name, t in vars(weights).items()}
    with torch.no_grad():
        x = torch.zeros(2, weights.up.shape[1], dtype=weights.up.dtype, device="cpu")
        output = rewrite.forward(x, rewrite.constants(plan, replace(weights, **own)), plan)
    if (output.dtype, tuple(output.shape)) != (x.dtype, (2, len(weights.down))):
        raise ValueError(f"it gives {output.dtype} {tuple(output.shape)} for x {x.dtype} {tuple(x.shape)}")


def with_errors(
    rewrite: Rewrite, sites: Sequence[ObservedSite], plans: Sequence[Planned], config: Config
) -> Fit[list[Planned]]:
    """Plans with the errors that a rewrite makes on the held-back tokens against the original FFN, in one run."""
    known: dict[str, Planned] = {plan.fingerprint: plan for plan in plans}
    own = {p.fingerprint: p for p in plans if isinstance(p, SitePlan) and p.method == rewrite.method}
    chosen = [site for site in sites if site.fingerprint in own]
    if chosen:
        functions = {s.fingerprint: rewrite.replacement(own[s.fingerprint], s.weights) for s in chosen}
        checks = yield Run(
            f"error of {rewrite.method} at a budget of {config.budget}",
            lambda s: Check(s, functions[s.fingerprint], held_back=True),
            chosen,
        )
        known |= {identity: replace(own[identity], error=check.error) for identity, check in checks.items()}
    return [known[site.fingerprint] for site in sites]


def matrices_of(plan: SitePlan) -> tuple[str, ...]:
    """Names of an FFN's own matrices, as in :class:`tardis_fx.graph.site.SiteWeights`."""
    return ("gate", "up", "down") if plan.kind == "gated" else ("up", "down")


def stored_bytes(site: ObservedSite, constants: Mapping[str, Tensor]) -> int:
    """Size of a site's weights, which are kept, and of all constants that are none of them."""
    own = {p.untyped_storage().data_ptr() for p in site.parameters}  # of a fused matrix, the halves' too
    return site.weights.bytes + sum(c.nbytes for c in constants.values() if c.untyped_storage().data_ptr() not in own)
