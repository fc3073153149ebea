"""A matched site can be replaced without changing the graph's outputs, regardless of in-place writes."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F

from tardis_fx.graph.feed_forward import dense
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.surgery import replace
from tardis_fx.testing.building import Graph

TOKENS, WIDTH, HIDDEN = 3, 4, 8

ALIASES: dict[str, Callable[[Graph, fx.Node], fx.Node]] = {
    "itself": lambda g, t: t,
    "a part": lambda g, t: g.call(operator.getitem, t, (Ellipsis, slice(1, 3))),
    "a row": lambda g, t: g.call(operator.getitem, t, 0 if t.meta["example_value"].dim() > 1 else slice(0, 1)),
    "detached": lambda g, t: g.call("detach", t),
    "flat": lambda g, t: g.call("reshape", t, -1),
    "transposed": lambda g, t: g.call("t", t),
    "a copy": lambda g, t: g.call("clone", t),
    "its own type": lambda g, t: g.call("to", t, torch.float32),
}

WRITES: dict[str, Callable[[Graph, fx.Node], fx.Node]] = {
    "method": lambda g, t: g.call("mul_", t, 3),
    "statement": lambda g, t: g.call(operator.iadd, t, 1),
    "item": lambda g, t: g.call(operator.setitem, t, slice(0, 1), 2.0),
    "out": lambda g, t: g.call(torch.add, t, 1, out=t),
    "list": lambda g, t: g.call(torch._foreach_add_, [t], 1.0),
    "inplace": lambda g, t: g.call(F.relu, t, inplace=True),
    "copy": lambda g, t: g.call("copy_", t, g.call(torch.cos, t)),
    "aten": lambda g, t: g.call(torch.ops.aten.neg_.default, t),
    "none": lambda g, t: g.call(torch.cos, t),
}


@st.composite
def programs(draw: st.DrawFn) -> fx.Graph:
    """One or two FFNs, with writes drawn between any two of their steps, through any alias of any value."""
    g = Graph()
    values = [g.call("clone", g.input(TOKENS, WIDTH))]

    def step(node: fx.Node) -> fx.Node:
        values.append(node)
        while draw(st.integers(0, 3)) == 3:
            target = ALIASES[draw(st.sampled_from(sorted(ALIASES)))](g, draw(st.sampled_from(values)))
            written = WRITES[draw(st.sampled_from(sorted(WRITES)))](g, target)
            if draw(st.booleans()) and isinstance(written.meta["example_value"], torch.Tensor):
                values.append(written)
        return node

    x = step(values[0])
    for _ in range(draw(st.integers(1, 2))):
        weights = [g.parameter(HIDDEN, WIDTH), g.parameter(HIDDEN, WIDTH), g.parameter(WIDTH, HIDDEN)]
        if draw(st.integers(0, 9)) == 9:
            values += weights
        act = draw(st.sampled_from([F.silu, F.relu, torch.relu_]))
        if draw(st.booleans()):
            hidden = step(g.call(act, step(g.call(F.linear, x, weights[0]))))
        else:
            gate = step(g.call(act, step(g.call(F.linear, x, weights[0]))))
            hidden = step(g.call(operator.mul, gate, step(g.call(F.linear, x, weights[1]))))
        y = step(g.call(F.linear, hidden, weights[2]))
        x = step(g.call(operator.add, x, y)) if draw(st.booleans()) else y
    outputs = draw(st.lists(st.sampled_from(values), max_size=2))
    g.graph.output((x, *outputs))
    return g.graph


def evaluated(graph: fx.Graph) -> Any:
    torch.manual_seed(0)
    inputs = [torch.randn(n.meta["example_value"].shape) for n in graph.find_nodes(op="placeholder")]
    return fx.Interpreter(fx.GraphModule({}, graph)).run(*inputs), inputs


def rewritten(graph: fx.Graph) -> int:
    """Replaces every site by a dense FFN, as the pipeline does, and counts them."""
    with torch.no_grad():
        sites = [site for site in find_sites(graph) if site.reason is None]
    moved: dict[fx.Node, fx.Node] = {}
    for site in sites:
        weights = {"up": site.up.weight, "down": site.down.weight}
        if site.gate is not None:
            weights["gate"] = site.gate.weight
        forward = lambda x, tensors, site=site: dense(x, tensors, str(site.activation))  # noqa: E731
        x = moved.get(site.input, site.input)
        moved[site.output] = replace(graph, site, x, forward, weights)
    graph.lint()
    return len(sites)


@settings(max_examples=examples(200))
@given(programs())
def test_a_site_that_is_matched_can_be_replaced(graph: fx.Graph) -> None:
    expected = evaluated(graph)
    rewritten(graph)
    torch.testing.assert_close(evaluated(graph), expected)


def test_sites_are_matched_among_writes() -> None:
    """The law above is not vacuous."""
    counts = {0: 0, 1: 0, 2: 0}

    @settings(max_examples=200, derandomize=True, database=None)
    @given(programs())
    def count(graph: fx.Graph) -> None:
        counts[rewritten(graph)] += 1

    count()
    assert min(counts.values()) > 5
