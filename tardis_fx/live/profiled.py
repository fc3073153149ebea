"""Compiled original graphs that also show the inputs of their sites to profiles."""

import logging
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.live.profiles import OBSERVING, Profile, Settings, profiles_of
from tardis_fx.live.retrace import CALLERS
from tardis_fx.observation.site import ObservedSite
from tardis_fx.runtime.fingerprint import fingerprint

_log = logging.getLogger("tardis_fx")

#: Maximum number of a site's tokens observed in each call.
TOKENS = 1024


def return_inputs(gm: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Makes a graph return the inputs of sites, [tokens, d] each, after its own outputs."""
    inputs = []
    for site in sites:
        with gm.graph.inserting_before(site.up.product):  # before any later write
            width = site.input.meta["example_value"].shape[-1]
            tokens = gm.graph.call_function(torch.reshape, (site.input, (-1, width)))
            first = gm.graph.call_function(operator.getitem, (tokens, slice(TOKENS)))
            inputs.append(gm.graph.call_function(torch.clone, (first,)))
    output = gm.graph.output_node()
    output.args = ((*output.args[0], *inputs),)  # type: ignore[misc]
    gm.graph.lint()
    gm.recompile()


class ProfiledGraph:
    """Runs the original graph and observes it until all its profiles are finished.

    If another thread is observing, a call only runs the original. Errors of the observation do not reach the caller.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        sites: Sequence[Site],
        positions: Sequence[Sequence[int]],
        settings: Settings,
        finished: Callable[[], Callable[..., Any] | None],
    ) -> None:
        """Combines a graph made by :func:`return_inputs` with the profiles of its sites.

        ``positions`` are those of each site's parameters among the graph's inputs. ``finished`` is called once when all
        profiles are finished; the function that it returns runs from then on.
        """
        self._compiled, self._sites, self._positions = compiled, list(sites), positions
        self._settings, self._finished = settings, finished
        self._profiles: dict[str, Profile] = {}
        self._observes = True
        self._successor: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph on its inputs and records the tokens."""
        if self._successor is not None:
            return self._successor(*inputs)
        CALLERS.add(threading.get_ident())
        results = self._compiled(*inputs)
        outputs, seen = results[: -len(self._sites)], results[-len(self._sites) :]
        if self._observes and OBSERVING.acquire(blocking=False):
            try:
                with torch.inference_mode(mode=False), torch.no_grad():
                    done = self._observe([[inputs[i] for i in positions] for positions in self._positions], seen)
                self._observes = not done
            except Exception as error:
                self._observes = done = False
                names = ", ".join(site.name for site in self._sites)
                _log.error(
                    "%s: nothing is fitted, because the observation failed: %s: %s", names, type(error).__name__, error
                )
            finally:
                OBSERVING.release()
            if done:
                self._successor = self._finished()
        return outputs

    def _observe(self, parameters: list[list[Tensor]], seen: Sequence[Float[Tensor, "_ _"]]) -> bool:
        """Adds inputs of the sites to their profiles; returns whether all profiles are finished."""
        sites = [
            ObservedSite(
                site, fingerprint(weights, site.function), SiteWeights.from_site(site, weights), tuple(weights)
            )
            for site, weights in zip(self._sites, parameters, strict=True)
        ]
        profiles = profiles_of(sites, self._settings)
        self._profiles = {k: p for k, p in self._profiles.items() if p.alive} | profiles
        for profile in set(profiles.values()):
            profile.update(
                [(s.fingerprint, x) for s, x in zip(sites, seen, strict=True) if profiles[s.fingerprint] is profile]
            )
        return all(profile.plan is not None for profile in self._profiles.values())
