"""The contract of a rewrite: one way to replace a site."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.layout import Layout, Tensors, check
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.statistics.check import Check


@dataclass(frozen=True)
class NoOptions:
    """Options of a rewrite without any options."""


class Rewrite(ABC):
    """One way to replace a site.

    A rewrite is stateless. ``fit`` measures and decides; its result is a :class:`SitePlan`, which a file can hold.
    ``constants`` turns plan and weights into the tensors that ``forward`` reads. ``forward`` is plain PyTorch: it runs
    eagerly as the specification, and is traced into the graph that Inductor compiles.

    The constants of two sites with equal weight shapes and equal ``settings`` must have equal shapes and dtypes,
    because one compiled graph may serve both.
    """

    #: Name in ``Config(method=...)`` and in the entry-point group.
    name: ClassVar[str]
    #: Its options: a frozen dataclass with defaults, which refuses a wrong value with a ConfigError.
    Options: ClassVar[type[Any]] = NoOptions
    #: Whether its sites are linear layers outside of FFNs, instead of FFNs.
    linear: bool = False
    #: Whether :meth:`forward` equals the original to rounding, so that prefill also takes it.
    exact: bool = False
    #: Most tokens of a step that counts as decoding on a CPU: its kernel is faster than the original there.
    decode_tokens: int = 8
    #: Whether the plan of a site depends on other sites even if each has its own budget: then :meth:`fit` needs all
    #: sites at once, and ``calibrate(offload=True)`` refuses the rewrite.
    compares_sites: bool = False
    #: Whether the rewritten site is still an FFN, of :meth:`weights`, to which another rewrite can be fitted.
    leaves_ffn: bool = False
    #: Whether :meth:`matrices` may return any.
    leaves_matrices: bool = False
    #: Whether its plans hold weights that :func:`tardis_fx.finetune` has trained.
    trained: bool = False

    def options(self, config: Config) -> Any:
        """The :attr:`Options` of this rewrite from a config.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        options, known = config.options_of(self.name), [field.name for field in fields(self.Options)]
        if unknown := [name for name in options if name not in known]:
            listed = ", ".join(known) or "none"
            raise ConfigError(f"{self.name} has no option {', '.join(map(repr, unknown))}: it has {listed}")
        return self.Options(**options)

    @abstractmethod
    def refuse(self, site: Site) -> str | None:
        """Why this rewrite cannot take a site that the matcher accepts, or None."""

    @abstractmethod
    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]] | list[Planned]:
        """Plans every site of ``sites``, which :meth:`refuse` has accepted, in their order.

        It yields the runs that it needs, and is sent the result of each; without runs, it may return the plans. Its
        decisions depend only on these results, so that an interrupted calibration can be resumed.
        """

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The tensors that :meth:`forward` reads, on the weights' device; by default, those of the plan."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()}

    @abstractmethod
    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """The rewritten site. Traced with ``torch.fx``: no branches on values or shapes."""

    def replacement(
        self, plan: SitePlan, weights: SiteWeights
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d_out"]]:
        """The eager function that replaces a site."""
        return partial(self.forward, constants=self.constants(plan, weights), plan=plan)

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout | None:
        """The tensors that an entry with these settings must hold, or None if only :meth:`constants` can check them.

        Args:
            plan: read from an untrusted file.
            weights: of its site.

        Raises:
            ValueError: the settings are invalid. Any other exception has the same meaning.
        """
        return None

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Checks an entry before use, by its layout or otherwise by a trial run.

        Raises:
            ValueError: :meth:`fit` cannot have made it. Any other exception has the same meaning.
        """
        layout = self.layout(plan, weights)
        if layout is None:
            trial_run(self, plan, weights)
        else:
            check(plan.tensors, layout)

    def parts(self, plan: SitePlan) -> str:
        """What :func:`tardis_fx.explain` says of an entry after its method: what a token may read, in how many bits."""
        return ""

    # ---- Interface for rewrites applied after this one; see tardis_fx.passes.composed and int8_ffn

    @property
    def method(self) -> str:
        """Name in plans; for a composition, the names joined with ``+`` in order."""
        return self.name

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        """Weights of the rewritten FFN, if the rewritten site is still an FFN."""
        raise NotImplementedError

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Names of the constants that are matrices, each with the share of it that ``touched_bytes`` counts.

        They are [out, in] in the model's dtype. :meth:`forward` must read them only through
        :func:`tardis_fx.graph.feed_forward.multiply`, because other forms of a matrix may replace them.
        """
        return {}

    def for_matrices(self, config: Config) -> Config:
        """The config with which this rewrite leaves matrices to a following rewrite, if that depends on options."""
        return config

    def applied_after(self, previous: "Rewrite") -> "Rewrite | None":
        """This rewrite wrapped around another one at the same sites, or None to compose the two.

        Raises:
            ConfigError: the two rewrites cannot be composed.
        """
        return None


def trial_run(rewrite: Rewrite, plan: SitePlan, weights: SiteWeights) -> None:
    """Runs two tokens through a rewritten site and checks the output; on the CPU, which checks every index.

    Raises:
        ValueError: the output does not have the shape or dtype of the site's output.
        Exception: raised by the rewrite.
    """
    on_cpu: dict[str, Any] = {name: None if t is None else t.cpu() for name, t in vars(weights).items()}
    with torch.no_grad():
        x = torch.zeros(2, weights.up.shape[1], dtype=weights.up.dtype, device="cpu")
        output = rewrite.replacement(plan, replace(weights, **on_cpu))(x)
    if (output.dtype, tuple(output.shape)) != (x.dtype, (2, len(weights.down))):
        raise ValueError(f"it gives {output.dtype} {tuple(output.shape)} for x {x.dtype} {tuple(x.shape)}")


def with_errors(
    rewrite: Rewrite, sites: Sequence[ObservedSite], plans: Sequence[Planned], config: Config
) -> Fit[list[Planned]]:
    """Measures the errors of plans against the original FFNs on the held-back tokens, in one run."""
    entries: dict[str, Any] = {plan.fingerprint: plan for plan in plans}
    chosen = [site for site in sites if entries[site.fingerprint].method == rewrite.method]
    if chosen:
        functions = {s.fingerprint: rewrite.replacement(entries[s.fingerprint], s.weights) for s in chosen}
        checks = yield Run(
            f"error of {rewrite.method}" + (f" at a budget of {config.budget}" if config.budget else ""),
            lambda s: Check(s, functions[s.fingerprint], held_back=True),
            chosen,
        )
        entries |= {identity: replace(entries[identity], error=check.error) for identity, check in checks.items()}
    return [entries[site.fingerprint] for site in sites]


def matrices_of(plan: SitePlan) -> tuple[str, ...]:
    """Names of an FFN's matrices, as in :class:`tardis_fx.graph.site.SiteWeights`."""
    return ("gate", "up", "down") if plan.kind == "gated" else ("up", "down")


def stored_bytes(site: ObservedSite, constants: Tensors) -> int:
    """Size of a site's weights, which are kept, and of all constants that do not share their memory."""
    kept = {p.untyped_storage().data_ptr() for p in site.parameters}  # halves of a fused matrix share it
    return site.weights.bytes + sum(c.nbytes for c in constants.values() if c.untyped_storage().data_ptr() not in kept)
