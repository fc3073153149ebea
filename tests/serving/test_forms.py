from operator import getitem
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tardis_fx.observation.site import ObservedSite
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.serving.forms import forms
from tardis_fx.testing.building import Graph
from tardis_fx.testing.observation import observed_site, site_of

PLAIN, GATED, FUSED = ["up", "down"], ["gate", "up", "down"], ["fused", "down"]


@st.composite
def stored(draw: st.DrawFn) -> ObservedSite:
    """An FFN as a model may store it, and as the matcher sees it."""
    d, g = draw(st.integers(2, 4)), Graph()
    hidden, d_out = draw(st.integers(d + 1, 6)), draw(st.sampled_from([d, 5]))
    names = draw(st.sampled_from([PLAIN, GATED, FUSED]))
    shapes = {"gate": (hidden, d), "up": (hidden, d), "fused": (2 * hidden, d), "down": (d_out, hidden)}
    x = g.input(1, d)

    def project(x: Any, name: str) -> Any:
        rows, columns = shapes[name]
        bias = g.parameter(rows) if draw(st.booleans()) else None
        if not draw(st.booleans()):
            return g.call(F.linear, x, g.parameter(rows, columns), bias)
        product = g.call(torch.matmul, x, g.parameter(columns, rows))
        return product if bias is None else g.call(torch.add, product, bias)

    z = [project(x, name) for name in names[:-1]]
    if names == FUSED:
        halves = g.call("chunk", z[0], 2, -1)
        z = [g.call(getitem, halves, i) for i in draw(st.permutations([0, 1]))]
    activated = g.call(F.silu, z[0])
    g.graph.output(project(activated if len(z) == 1 else g.call(torch.mul, activated, z[1]), "down"))
    site = site_of(g)
    values = [torch.randn(node.meta["example_value"].shape) for node in site.parameters]
    return observed_site(site, values)


@given(stored())
def test_one_form_of_the_weights_has_the_fingerprint_that_the_model_had(site: ObservedSite) -> None:
    matching = [
        form
        for form in forms(site.weights)
        if fingerprint(form.parameters(site.weights), form.function(site.weights, site.site.activation))
        == site.fingerprint
    ]
    assert len(matching) == 1
    assert matching[0].gate_half == site.site.gate_half
    torch.testing.assert_close(matching[0].parameters(site.weights), list(site.parameters), rtol=0, atol=0)
