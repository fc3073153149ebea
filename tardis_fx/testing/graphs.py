"""Draws graphs of FFNs in various spellings among other operations."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.testing.building import Graph
from tardis_fx.testing.spellings import SPELLINGS

TOKENS, WIDTH, HIDDEN = 3, 8, 32


class Planted(NamedTuple):
    """An FFN in a drawn graph."""

    input: fx.Node
    """The input of the first projection, after the view that an ``addmm`` needs."""
    output: fx.Node
    """The last projection, before such a view."""
    activation: str
    leaks: bool
    """Whether another node reads its intermediate value."""


@dataclass
class Drawn:
    """A drawn graph and its FFNs."""

    graph: fx.Graph
    planted: list[Planted]

    def __repr__(self) -> str:
        return f"{self.planted} in {self.graph}"


class _Linear(NamedTuple):
    result: fx.Node
    input: fx.Node
    node: fx.Node
    """The projection itself, which reads ``input``; ``result`` may be a view of it."""


def _linear(g: Graph, x: fx.Node, columns: int, draw: st.DrawFn) -> _Linear:
    """A projection of [..., in] in one of the accepted forms."""
    *batch, rows = x.meta["example_value"].shape
    forms: dict[str, Callable[[], fx.Node]] = {
        "linear": lambda: g.call(F.linear, x, g.parameter(columns, rows), g.parameter(columns)),
        "linear, no bias": lambda: g.call(F.linear, x, g.parameter(columns, rows)),
        "matmul": lambda: g.call(operator.matmul, x, g.parameter(rows, columns)),
        "matmul, biased": lambda: g.call(operator.add, forms["matmul"](), g.parameter(columns)),
        "matmul, transposed": lambda: g.call(torch.matmul, x, g.call("t", g.parameter(columns, rows))),
        "einsum": lambda: g.call(torch.einsum, "...i,oi->...o", x, g.parameter(columns, rows)),
        "tensordot": lambda: g.call(torch.tensordot, x, g.parameter(rows, columns), 1),
    }
    form = draw(st.sampled_from([*forms, "addmm"]))
    if form == "addmm":
        flat = g.call("view", x, -1, rows)
        product = g.call(torch.addmm, g.parameter(columns), flat, g.parameter(rows, columns))
        return _Linear(g.call("view", product, (*batch, columns)), flat, product)
    node = forms[form]()
    return _Linear(node, x, node)


def _between(g: Graph, h: fx.Node, draw: st.DrawFn) -> fx.Node:
    """Adds nothing, or an operation that does not matter between projections."""
    *batch, columns = h.meta["example_value"].shape
    harmless: list[Callable[[], fx.Node]] = [
        lambda: h,
        lambda: g.call(F.dropout, h, 0.1, False, False),
        lambda: g.call("contiguous", h),
        lambda: g.call("to", h, torch.float32),
        lambda: g.call("view", g.call("reshape", h, -1, columns), *batch, columns),
    ]
    return draw(st.sampled_from(harmless))()


def _attention(g: Graph, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    q, k, v = (_linear(g, x, WIDTH, draw).result for _ in range(3))
    scores = g.call(torch.softmax, g.call(torch.matmul, q, g.call("transpose", k, -1, -2)), -1)
    return _linear(g, g.call(torch.matmul, scores, v), WIDTH, draw).result


def _norm(g: Graph, x: fx.Node, _draw: st.DrawFn) -> fx.Node:
    return g.call(F.layer_norm, x, (WIDTH,), g.parameter(WIDTH), g.parameter(WIDTH))


def _separated(g: Graph, x: fx.Node, draw: st.DrawFn) -> fx.Node:
    """An up and a down projection with more than an activation between them."""
    activated = g.call(F.relu, _linear(g, x, HIDDEN, draw).result)
    between: list[Callable[[fx.Node], fx.Node]] = [
        lambda h: g.call(torch.softmax, h, -1),
        lambda h: g.call("flip", h, -1),
        lambda h: g.call(operator.mul, h, g.parameter(HIDDEN)),
        lambda h: g.call("to", g.call("to", h, torch.int32), torch.float32),
    ]
    return _linear(g, draw(st.sampled_from(between))(activated), WIDTH, draw).result


#: Blocks other than FFNs, [..., WIDTH] to [..., WIDTH].
_OTHERS: list[Callable[[Graph, fx.Node, st.DrawFn], fx.Node]] = [
    _attention,
    _norm,
    _separated,
    lambda g, x, _: g.call(torch.tanh, x),
    lambda g, x, draw: _linear(g, x, WIDTH, draw).result,
]


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    """Draws a chain of FFNs, each in a drawn spelling, and other blocks, with residual sums between some."""
    g = Graph()
    planted: list[Planted] = []
    x = g.input(*draw(st.sampled_from([(TOKENS, WIDTH), (2, TOKENS, WIDTH)])))
    results: list[fx.Node] = []
    for is_ffn in draw(st.lists(st.booleans(), min_size=1, max_size=5)):
        if is_ffn:
            activation = draw(st.sampled_from(sorted(SPELLINGS)))
            up = _linear(g, x, HIDDEN, draw)
            activated = draw(st.sampled_from(SPELLINGS[activation]))(g, _between(g, up.result, draw))
            down = _linear(g, _between(g, activated, draw), WIDTH, draw)
            if leaks := draw(st.integers(0, 4)) == 0:
                results.append(g.call("sum", draw(st.sampled_from([up.result, activated]))))
            planted.append(Planted(up.input, down.node, activation, leaks))
            y = down.result
        else:
            y = draw(st.sampled_from(_OTHERS))(g, x, draw)
        x = g.call(operator.add, x, y) if draw(st.booleans()) else y
    g.graph.output((x, *results))
    return Drawn(g.graph, planted)


def reordered(drawn: Drawn, random: Random) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copies a graph in another topological order with other names; also returns the map of nodes."""
    *nodes, output = drawn.graph.nodes
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = [node for node, missing in waiting.items() if not missing]
    names = random.sample(range(len(nodes)), len(nodes))
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    while ready:
        inputs = [node for node in ready if node.op == "placeholder"]  # stay first
        node = random.choice(inputs or ready)
        ready.remove(node)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node]._rename(f"n{names.pop()}")
        for user in node.users:
            if user is not output:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)
    graph.output(fx.node.map_arg(output.args[0], copies.__getitem__))
    return graph, copies
