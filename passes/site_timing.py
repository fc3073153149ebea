"""Times the original and the rewritten form of FFNs that run the same code.

1. Each form is a graph of the FFN alone, which the inner backend compiles. The sites run in turn, each with its own
   weights or constants, and before each turn the other tensors of the model's graph are read, so that caches are as
   cold as in decoding.
2. Inputs are random. They are scaled so that the rewritten sites touch the bytes per token that the plan expects,
   because the time of a correction depends on them.
3. Rounds of the two forms are interleaved. A round of the rewritten form includes the check that no weight has changed.
"""

import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch._guards import tracing

from tardis_fx.graph.excerpt import concrete, excerpt, traced
from tardis_fx.graph.frozen import freeze
from tardis_fx.graph.site import is_freed, is_released
from tardis_fx.graph.subclasses import stored_tensors
from tardis_fx.passes.weight_guard import Constants, SiteGuard
from tardis_fx.runtime.touched import count_touched, uncounted

#: Compiles a graph for inputs.
Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

#: Seconds for which rounds are timed, and the minimum number of rounds.
DURATION, LEAST_ROUNDS = 1.0, 9
#: Bytes of the graph's other tensors that are read, at most: more than a cache holds.
EVICTING = 2**28
#: Number of sites that the scale of all inputs is the mean of. Counting the bytes of more would take long.
SCALED = 3
#: Number of scales that are tried, and the largest one, as a power of two.
STEPS, LARGEST = 7, 6
#: Number of sites that are timed under freezing, where each is compiled separately.
FROZEN = 4


class Candidate(NamedTuple):
    """A site that could be rewritten.

    Attributes:
        guard: of the site.
        weights: of the site.
        constants: for these weights.
        forward: the rewritten site as it is traced into the graph.
    """

    guard: SiteGuard
    weights: list[Tensor]
    constants: Constants
    forward: Callable[[Any, Any], Any]

    @property
    def forms(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Graphs of the original and of the rewritten FFN."""
        return excerpt(self.guard.site), traced(self.forward, self.constants.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input, [..., d], with hints for symbolic sizes."""
        return tuple(map(concrete, self.guard.site.input.meta["example_value"].shape))


@torch.inference_mode(mode=False)
@torch.no_grad()
def seconds_per_site(
    sites: Sequence[Candidate], values: Sequence[Any], compile_graph: Compile, *, frozen: bool
) -> tuple[float, float]:
    """Median seconds of the original and of the rewritten form, per site.

    Args:
        sites: that run the same code in both forms, for the same shapes.
        values: inputs of the graph that has the sites.
        compile_graph: the inner backend.
        frozen: whether it makes the weights part of the compiled code.
    """
    with tracing(None), uncounted():  # neither the graph being compiled nor a counter sees the trials
        sites = sites[:FROZEN] if frozen else sites
        inputs = _inputs(sites)
        before = _runs([s.forms[0] for s in sites], inputs, [s.weights for s in sites], compile_graph, frozen)
        after = _runs(
            [s.forms[1] for s in sites], inputs, [[*s.constants.tensors.values()] for s in sites], compile_graph, frozen
        )

        def original() -> None:
            for run in before:
                run()

        def rewritten() -> None:
            for site, run in zip(sites, after, strict=True):
                site.constants.weights.holds(site.weights)
                run()

        others = _others(values, {id(weight) for site in sites for weight in site.weights})
        taken = medians(original, rewritten, lambda: [tensor.sum() for tensor in others], inputs[0].device)
    return taken[0] / len(sites), taken[1] / len(sites)


def medians(
    original: Callable[[], None], rewritten: Callable[[], None], before: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Median seconds of two functions over interleaved rounds, after two warm-up rounds.

    Args:
        original: runs the original form of all sites.
        rewritten: runs the rewritten form of all sites.
        before: called before each run, and not timed.
        device: that computes.
    """
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < 2 + LEAST_ROUNDS or time.perf_counter() < started + DURATION:
        rounds.append([_seconds(run, before, device) for run in (original, rewritten)])
    first, second = zip(*rounds[2:], strict=True)
    return median(first), median(second)


def _seconds(run: Callable[[], None], before: Callable[[], object], device: torch.device) -> float:
    before()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _others(values: Sequence[Any], own: Container[int]) -> list[Tensor]:
    """Tensors of numbers among values, except those with the given ids, up to a total size."""
    others, size = [], 0
    for tensor in stored_tensors(v for v in values if isinstance(v, Tensor) and id(v) not in own):
        if size < EVICTING and tensor.is_floating_point() and not (is_freed(tensor) or is_released(tensor)):
            others.append(tensor)
            size += tensor.nbytes
    return others


def _runs(
    graphs: Sequence[fx.GraphModule],
    inputs: Sequence[Tensor],
    tensors: Sequence[Sequence[Tensor]],
    compile_graph: Compile,
    frozen: bool,
) -> list[Callable[[], Any]]:
    """A function for each site that runs its compiled graph; without freezing, one graph serves all sites."""
    if not frozen:
        compiled = compile_graph(graphs[0], [inputs[0], *tensors[0]])
        return [partial(compiled, x, *given) for x, given in zip(inputs, tensors, strict=True)]
    for graph, given in zip(graphs, tensors, strict=True):
        freeze(graph, given)
    return [partial(compile_graph(graph, [x]), x) for graph, x in zip(graphs, inputs, strict=True)]


def _inputs(sites: Sequence[Candidate]) -> list[Float[Tensor, "..."]]:
    """A random input for each site, at the scale at which the sites touch the bytes that the plan expects."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    inputs = []
    for site in sites:
        x = torch.randn(site.shape, dtype=torch.float32, device="cpu", generator=generator)
        inputs.append(x.to(site.weights[0].device, site.weights[0].dtype))
    scaled = range(0, len(sites), -(-len(sites) // SCALED))
    exponents = [_exponent(sites[i], inputs[i].flatten(0, -2)[:1]) for i in scaled]
    return [x * 2 ** (sum(exponents) / len(exponents)) for x in inputs]


def _exponent(site: Candidate, x: Float[Tensor, "1 d"]) -> float:
    """The power of two for a site's input that brings the touched bytes closest to the plan's, by bisection."""
    low, high, misses = float(-LARGEST), float(LARGEST), dict[float, float]()
    for _ in range(STEPS):
        exponent = (low + high) / 2
        with count_touched() as touched:
            site.guard.rewrite.forward(x * 2**exponent, site.constants.tensors, site.constants.entry)
        excess = touched.per_token - site.constants.entry.touched_bytes
        if not touched.sites:  # no op whose bytes depend on the input
            return 0.0
        misses[exponent] = abs(excess)
        low, high = (low, exponent) if excess > 0 else (exponent, high)
    return min(misses, key=lambda exponent: misses[exponent])
