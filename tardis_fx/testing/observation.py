"""Observations of sites with given inputs, to fit rewrites without a model."""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import RepeatableObservation, Run, Seen
from tardis_fx.observation.site import ObservedSite, fitted_tokens
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.testing.building import Graph
from tardis_fx.testing.ffn import FFN, GatedFFN, gated_ffn
from tardis_fx.testing.spellings import SPELLINGS


class SiteObservation(RepeatableObservation):
    """Observation of FFNs that all see the same batches, without capture, so that a fit takes milliseconds."""

    def __init__(self, ffns: Sequence[FFN | GatedFFN | ObservedSite], batches: Sequence[Float[Tensor, "_ d"]]) -> None:
        """Matches each FFN in a separate graph.

        Args:
            ffns: FFNs or sites; their weights are not copied.
            batches: inputs of every FFN.
        """
        super().__init__()
        self._batches = batches
        self._sites = [ffn if isinstance(ffn, ObservedSite) else observed(ffn) for ffn in ffns]

    @property
    def sites(self) -> list[ObservedSite]:
        """The sites of the FFNs, in order."""
        return self._sites

    def _shown(self, run: Run) -> dict[str, Any]:
        """Shows every batch to every site's observer."""
        assert not run.replaced  # no site feeds another
        if run.moved is not None:
            return {}
        observers = {site.fingerprint: run.make(site) for site in run.sites}
        for batch in self._batches:
            tokens = batch.detach().reshape(-1, batch.shape[-1]).float()
            if not torch.isfinite(tokens).all():
                raise CalibrationError(f"the inputs hold NaN or infinity ({run.title})")
            for observer in observers.values():
                observer.update(tokens.clone())
        return observers

    def seen(self, site: ObservedSite) -> Seen:
        """Numbers of tokens and held-back tokens in all batches."""
        sizes = [batch.shape[:-1].numel() for batch in self._batches]
        return Seen(sum(sizes), sum(size - fitted_tokens(size) for size in sizes))


def observed(ffn: FFN | GatedFFN) -> ObservedSite:
    """Matches an FFN as a site with its weights."""
    g = Graph()
    activated = SPELLINGS[ffn.activation][0]
    entering: list[Any] = [ffn.up] if isinstance(ffn, FFN) else list(ffn.gate_up)
    x = g.input(1, entering[0].in_features)

    def linear(x: Any, module: torch.nn.Linear) -> Any:
        bias = () if module.bias is None else (g.parameter(*module.bias.shape),)
        return g.call(F.linear, x, g.parameter(*module.weight.shape), *bias)

    z = [linear(x, module) for module in entering]
    if isinstance(ffn, FFN):
        hidden = activated(g, z[0])
    else:
        if len(z) == 1:
            halves = g.call("chunk", z[0], 2, -1)
            z = [g.call(getitem, halves, i) for i in range(2)]
        hidden = g.call("mul", activated(g, z[0]), z[1])
    g.graph.output(linear(hidden, ffn.down))
    return observed_site(site_of(g), [parameter.detach() for parameter in ffn.parameters()])


def site_of(g: Graph) -> Site:
    """The only site of a graph."""
    with torch.no_grad():
        (site,) = find_sites(g.graph)
    return site


def observed_site(site: Site, parameters: Sequence[Tensor]) -> ObservedSite:
    """Makes an observed site from values of ``site.parameters``."""
    weights = SiteWeights.from_site(site, parameters)
    return ObservedSite(site, fingerprint(parameters, site.function), weights, tuple(parameters))


def gated(d: int = 8, hidden: int = 32) -> ObservedSite:
    """A gated site with random weights."""
    return observed(gated_ffn(d, hidden, bias=False))


def affine(d: int = 8, hidden: int = 32) -> ObservedSite:
    """A site without an activation, with random weights."""
    g = Graph()
    up = g.call(F.linear, g.input(1, d), g.parameter(hidden, d), g.parameter(hidden))
    g.graph.output(g.call(F.linear, up, g.parameter(d, hidden), g.parameter(d)))
    site = site_of(g)
    torch.manual_seed(0)
    shapes = [node.meta["example_value"].shape for node in site.parameters]
    return observed_site(site, [torch.randn(shape, dtype=torch.float32, device="cpu") for shape in shapes])
