"""Leaves FFNs original where their rewritten form takes longer on this device, and remembers both times.

1. A rewritten FFN stays if it is as fast as the original, or faster.
2. What was timed is kept in the cache folder, and timed again only for other code, shapes, bytes, devices or versions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from tardis_fx.digest import digest
from tardis_fx.passes.site_timing import Candidate, Compile, seconds_per_site
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import records
from tardis_fx.runtime.cpu import build

_log = logging.getLogger("tardis_fx")


class Times(NamedTuple):
    """Seconds of one FFN in both forms, for a step of some tokens."""

    original: float
    rewritten: float
    tokens: int

    @property
    def pays(self) -> bool:
        """Whether the rewritten form is as fast as the original, or faster."""
        return self.rewritten <= self.original

    def __str__(self) -> str:
        faster = "rewritten form" if self.pays else "original"
        times = f"{self.original * 1e6:,.1f} µs, rewritten {self.rewritten * 1e6:,.1f} µs"
        return f"the {faster} is faster here: {times}, for {self.tokens} token{'s' * (self.tokens != 1)}"


_TIMES: dict[tuple[Any, ...], dict[int, Times]] = {}


def times_of(entry: SitePlan) -> list[Times]:
    """The times that decided on an entry's site in the graphs compiled so far, by rising number of tokens."""
    known = _TIMES.get(_identity(entry), {})
    return [known[tokens] for tokens in sorted(known)]


def reset() -> None:
    """Forgets the times of this process; those on disk stay."""
    _TIMES.clear()


@dataclass(frozen=True)
class Selection:
    """Chooses the sites of a graph that stay original.

    Attributes:
        compile_graph: the inner backend.
        inner: its name and mode.
        frozen: whether it makes the weights part of the compiled code.
    """

    compile_graph: Compile
    inner: str
    frozen: bool

    def __call__(self, candidates: Sequence[Candidate], values: Sequence[Any]) -> list[bool]:
        """Whether each site of a graph with these inputs is rewritten; times those that no record knows.

        Sites of the same code and shapes are timed, and decided on, together.
        """
        keys = [self._key(candidate) for candidate in candidates]
        groups = {key: [c for c, k in zip(candidates, keys, strict=True) if k == key] for key in keys}
        times = {key: self._times(key, sites, values) for key, sites in groups.items()}
        for key, taken in times.items():
            known = [_TIMES.setdefault(_identity(site.constants.entry), {}) for site in groups[key]]
            if not taken.pays and any(times_of_site.get(taken.tokens) != taken for times_of_site in known):
                names = _listed([site.guard.name or "an FFN" for site in groups[key]])
                _log.warning("not rewritten: %s: %s", names, taken)
            for times_of_site in known:
                times_of_site[taken.tokens] = taken
        return [times[key].pays for key in keys]

    def _key(self, candidate: Candidate) -> tuple[Any, ...]:
        """What both forms of a site compute, and for which shapes; sites with one key are timed together."""
        original, rewritten = candidate.forms
        tensors = [*candidate.weights, *candidate.constants.tensors.values()]
        layouts = [(str(t.dtype), tuple(t.shape), t.stride(), str(t.device)) for t in tensors]
        return original.code, rewritten.code, candidate.shape, *layouts

    def _times(self, key: tuple[Any, ...], sites: Sequence[Candidate], values: Sequence[Any]) -> Times:
        """The times of sites with one key, from their record or measured."""
        name = f"times-{digest(key, self._conditions(sites))}"
        record = records.read(name, ("original", "rewritten"))
        if record is None:
            original, rewritten = seconds_per_site(sites, values, self.compile_graph, frozen=self.frozen)
            record = {"original": original, "rewritten": rewritten}
            records.write(name, record)
        return Times(**record, tokens=math.prod(sites[0].shape[:-1]))

    def _conditions(self, sites: Sequence[Candidate]) -> list[Any]:
        """What the times of sites depend on besides their code and shapes.

        Corrections read more or less of the same tensors, by the plan. The number of sites decides whether their
        weights are still in a cache when their turn comes again.
        """
        device = sites[0].weights[0].device
        touched = sum(site.constants.entry.touched_bytes for site in sites) / len(sites)
        conditions = [self.inner, self.frozen, len(sites), f"{touched:.2g}", torch.__version__, version("tardis-fx")]
        if device.type == "cuda":
            return [*conditions, torch.cuda.get_device_name(device)]
        return [*conditions, build.processor(), torch.get_num_threads(), build.kernel_name()]


def _identity(entry: SitePlan) -> tuple[Any, ...]:
    """Distinguishes entries for the same weights; a plan that is read again has the same."""
    return entry.fingerprint, entry.method, str(entry.settings), entry.touched_bytes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
