from random import Random

import pytest
import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F

from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site
from tardis_fx.testing import assert_matches
from tardis_fx.testing.building import Graph
from tardis_fx.testing.graphs import HIDDEN, TOKENS, WIDTH, Drawn, graphs, reordered
from tardis_fx.testing.spellings import SPELLINGS

many = settings(max_examples=examples(100))


def matched(graph: fx.Graph) -> list[Site]:
    with torch.no_grad():
        return find_sites(graph)


def summary(site: Site, original: dict[fx.Node, fx.Node] | None = None) -> tuple[object, ...]:
    """A site without names and order; nodes are those of the original graph."""

    def named(node: fx.Node) -> str:
        return (original[node] if original else node).name

    def leaking(reason: str | None) -> str | None:
        return reason and reason.partition("intermediate value")[1]  # the rest names nodes

    parameters = tuple(named(node) for node in site.parameters)
    inner = frozenset(named(node) for node in site.inner)
    return named(site.input), named(site.output), site.kind, site.activation, parameters, inner, leaking(site.reason)


@many
@given(graphs())
def test_exactly_the_planted_ffns_are_found(drawn: Drawn) -> None:
    assert_matches(drawn.graph, count=sum(not planted.leaks for planted in drawn.planted))
    accepted = [(s.input, s.output, s.activation) for s in matched(drawn.graph) if s.reason is None]
    assert accepted == [(p.input, p.output, p.activation) for p in drawn.planted if not p.leaks]


@many
@given(graphs())
def test_every_ffn_whose_intermediate_is_read_elsewhere_is_refused(drawn: Drawn) -> None:
    reasons = {s.output: s.reason for s in matched(drawn.graph)}
    for planted in drawn.planted:
        if planted.leaks:
            assert "intermediate value" in str(reasons[planted.output])


@many
@given(graphs(), st.randoms(use_true_random=False))
def test_matching_is_invariant_under_renaming_and_reordering(drawn: Drawn, random: Random) -> None:
    graph, copies = reordered(drawn, random)
    graph.lint()
    original = {copy: node for node, copy in copies.items()}
    assert {summary(s, original) for s in matched(graph)} == {summary(s) for s in matched(drawn.graph)}


@many
@given(graphs())
def test_matching_changes_nothing_and_repeats(drawn: Drawn) -> None:
    before = str(drawn.graph)
    first = matched(drawn.graph)
    assert matched(drawn.graph) == first
    assert str(drawn.graph) == before


@given(graphs())
def test_sites_come_in_the_order_of_their_outputs(drawn: Drawn) -> None:
    position = {node: i for i, node in enumerate(drawn.graph.nodes)}
    outputs = [position[s.output] for s in matched(drawn.graph)]
    assert outputs == sorted(outputs)


@given(graphs())
def test_only_the_output_reads_the_inner_nodes(drawn: Drawn) -> None:
    for site in matched(drawn.graph):
        assert site.input not in site.inner
        assert site.output not in site.inner
        if site.reason is None:
            assert {user for node in site.inner for user in node.users} <= {*site.inner, site.output}


@pytest.mark.parametrize(
    ("activation", "spelling"), [(name, i) for name, ways in SPELLINGS.items() for i in range(len(ways))]
)
def test_every_spelling_of_an_activation_is_recognised(activation: str, spelling: int) -> None:
    g = Graph()
    hidden = g.call(F.linear, g.input(TOKENS, WIDTH), g.parameter(HIDDEN, WIDTH))
    g.graph.output(g.call(F.linear, SPELLINGS[activation][spelling](g, hidden), g.parameter(WIDTH, HIDDEN)))
    (site,) = matched(g.graph)
    assert (site.kind, site.activation, site.reason) == ("plain", activation, None)
