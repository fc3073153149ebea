"""Every accepted way to write an FFN, each beside a neighbour that must be refused with the reason."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from builders.exact import Exact, assert_same
from builders.forms import NO_ACTIVATION, Form, Model, X
from torch import Tensor
from torch.nn import functional as F

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.graph.site import SiteWeights
from tardis_fx.testing.capture import capture

gelu = F.gelu


class Pair(NamedTuple):
    accepted: Form
    neighbour: Form
    reason: str


def _halves(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = m.fused(x).chunk(2, -1)
    return first, second


PLAIN: dict[str, Pair] = {
    "linear without bias": Pair(
        lambda m, x: F.linear(gelu(F.linear(x, m.up.weight)), m.down.weight),
        lambda m, x: F.linear(gelu(F.linear(x, -m.up.weight)), m.down.weight),
        "computed in the graph",
    ),
    "linear by keyword": Pair(
        lambda m, x: F.linear(input=gelu(F.linear(x, weight=m.up.weight, bias=m.up.bias)), weight=m.down.weight),
        lambda m, x: F.linear(input=gelu(F.linear(x, weight=m.up.weight, bias=-m.up.bias)), weight=m.down.weight),
        "computed in the graph",
    ),
    "addmm": Pair(
        lambda m, x: torch.addmm(m.b2, gelu(torch.addmm(m.b1, x[0], m.w1, beta=1, alpha=1)), m.w2),
        lambda m, x: torch.addmm(m.b2, gelu(torch.addmm(m.b1, x[0], m.w1, beta=2)), m.w2),
        "its addmm scales",
    ),
    "addmm by keyword": Pair(
        lambda m, x: torch.addmm(input=m.b2, mat1=gelu(m.b1.addmm(x[0], m.w1)), mat2=m.w2),
        lambda m, x: torch.addmm(input=m.b2, mat1=gelu(m.b1.addmm(x[0], m.w1, alpha=3)), mat2=m.w2),
        "its addmm scales",
    ),
    "matmul and sum": Pair(
        lambda m, x: gelu(x @ m.w1 + m.b1) @ m.w2 + m.b2,
        lambda m, x: gelu(torch.add(x @ m.w1, m.b1, alpha=2)) @ m.w2 + m.b2,
        "its bias is scaled",
    ),
    "a bias with axes in front": Pair(
        lambda m, x: gelu(x @ m.w1 + m.b1.view(1, 1, 32)) @ m.w2,
        lambda m, x: gelu(x @ m.w1 + m.at) @ m.w2,
        NO_ACTIVATION,
    ),
    "a bias that makes columns of one": Pair(
        lambda m, x: gelu(x @ m.w1) @ m.column + m.b2,
        lambda m, x: torch.addmm(m.b2[:1], gelu(x[0] @ m.w1), m.w2),
        "its bias is not a stored vector",
    ),
    "matmul by a transposed weight": Pair(
        lambda m, x: gelu(torch.matmul(x, m.up.weight.T) + m.up.bias) @ m.down.weight.mT,
        lambda m, x: gelu(torch.matmul(x, m.up.weight.flip(0).T)) @ m.down.weight.mT,
        "computed in the graph",
    ),
    "einsum": Pair(
        lambda m, x: torch.einsum("bsh,hd->bsd", gelu(torch.einsum("...i,io->...o", x, m.w1) + m.b1), m.w2) + m.b2,
        lambda m, x: torch.einsum("bsh,hd->sbd", gelu(torch.einsum("...i,io->...o", x, m.w1) + m.b1), m.w2),
        "does more than multiply",
    ),
    "einsum, weight first": Pair(
        lambda m, x: torch.einsum("oi,bsi->bso", m.down.weight, gelu(torch.einsum("oi,bsi->bso", m.up.weight, x))),
        lambda m, x: torch.einsum("oi,bsi->bos", m.down.weight, gelu(torch.einsum("oi,bsi->bso", m.up.weight, x))),
        "does more than multiply",
    ),
    "tensordot": Pair(
        lambda m, x: torch.tensordot(gelu(torch.tensordot(x, m.w1, 1)), m.down.weight, ([2], [1])),
        lambda m, x: torch.tensordot(gelu(torch.tensordot(x, m.w1, 1)).mT, m.down.weight, ([1], [1])),
        "sums over another axis",
    ),
    "reshapes between": Pair(
        lambda m, x: m.down(gelu(m.up(x).reshape(-1, 32)).unflatten(0, (2, 3))),
        lambda m, x: m.down(gelu(m.up(x).view(2, 3, 4, 8)).mT.reshape(2, 3, 32)),
        NO_ACTIVATION,
    ),
    "other axes behind than in front": Pair(
        lambda m, x: m.down(gelu(m.up(x)).view(3, 2, 32)),
        lambda m, x: m.down(gelu(m.up(x)).transpose(0, 1)),
        "transpose stands between",
    ),
    "one axis fewer": Pair(
        lambda m, x: m.down(gelu(m.up(x[:1, 0])).squeeze(0)),
        lambda m, x: m.down(gelu((h := m.up(x[0])).expand_as(h.repeat(2, 1, 1)))),
        NO_ACTIVATION,
    ),
    "casts between": Pair(
        lambda m, x: m.down(gelu(m.up(x).double()).float()),
        lambda m, x: m.down(m.up(x).to(torch.int32).float().relu()),
        "to stands between",
    ),
    "views, not of the bits": Pair(
        lambda m, x: m.down(m.up(x).view(6, 32).relu().view(2, 3, 32)),
        lambda m, x: m.down(m.up(x).view(torch.int32).view(torch.float32).relu()),
        "view stands between",
    ),
    "dropout that does not drop": Pair(
        lambda m, x: m.down(F.dropout(gelu(m.up(x)), 0.1, training=False)),
        lambda m, x: m.down(F.dropout(gelu(m.up(x)), 0.1, training=True)),
        "training mode",
    ),
    "relu by comparison": Pair(
        lambda m, x: m.down(torch.where((h := m.up(x)) > 0, h, 0)),
        lambda m, x: m.down(torch.where((h := m.up(x)) > 0, h, x[..., :1])),
        "is combined with",
    ),
    "relu as a mask": Pair(
        lambda m, x: m.down((h := m.up(x)) * (h > 0).to(h.dtype)),
        lambda m, x: m.down((h := m.up(x)) * ((h > 0).float() + (h > 0).float())),
        "not in the registry",
    ),
    "relu as a threshold": Pair(
        lambda m, x: m.down(F.threshold(m.up(x), 0, 0)),
        lambda m, x: m.down(F.threshold(m.up(x), 0.1, 0)),
        "not in the registry",
    ),
    "relu squared": Pair(
        lambda m, x: m.down((r := F.relu(m.up(x))) * r),
        lambda m, x: m.down((r := F.relu(m.up(x[0]))).unsqueeze(0) * r.unsqueeze(1)),
        "as many tokens",
    ),
    "in place": Pair(
        lambda m, x: m.down(m.up(x).relu_()),
        lambda m, x: (m.down(h := m.up(x)), h.relu_())[0],
        "",
    ),
    "tied weights": Pair(
        lambda m, x: F.linear(gelu(F.linear(x, m.up.weight, m.up.bias)), m.up.weight.t(), m.b2),
        lambda m, x: F.linear(gelu(F.linear(x, w := m.up.weight.clone().mul_(2))), w.t(), m.b2),
        "computed in the graph",
    ),
    "a weight cast to its own type": Pair(
        lambda m, x: F.linear(gelu(F.linear(x, m.up.weight.to(x.dtype))), m.down.weight),
        lambda m, x: F.linear(gelu(F.linear(x.double(), m.up.weight.double())), m.down.weight.double()),
        "computed in the graph",
    ),
    "tokens that an index picked": Pair(
        lambda m, x: m.down(gelu(m.up(x[0][torch.tensor([2, 0])]))),
        lambda m, x: x[0].index_add(0, i := torch.tensor([2, 0]), m.down(gelu(m.up(x[0].index_select(0, i))))),
        "its tokens are routed",
    ),
}  # fmt: skip

GATED: dict[str, Pair] = {
    "chunks": Pair(
        lambda m, x: m.down((h := _halves(m, x))[0] * gelu(h[1])),
        lambda m, x: m.down((h := m.up(x).chunk(2, 0))[0] * gelu(h[1])),
        "chunk stands between",
    ),
    "sizes": Pair(
        lambda m, x: m.down((h := m.fused(x).split([32, 32], -1))[0] * gelu(h[1])),
        lambda m, x: m.narrow(torch.cat([(h := m.up(x).split([24, 8], -1))[0], gelu(h[1])], -1)),
        "stands between",
    ),
    "slices": Pair(
        lambda m, x: m.down((h := m.fused(x))[..., :32] * gelu(h[..., 32:])),
        lambda m, x: m.down((h := m.fused(x))[..., :32] * gelu(h[..., 16:48])),
        "getitem stands between",
    ),
    "slices by full index": Pair(
        lambda m, x: m.down((h := m.fused(x))[:, :, :32] * gelu(h[:, :, 32:64])),
        lambda m, x: m.down((h := m.fused(x))[..., ::2] * gelu(h[..., 1::2])),
        "getitem stands between",
    ),
    "an up projection left as it is": Pair(
        lambda m, x: m.down((h := _halves(m, x))[0] * gelu(h[1])),
        lambda m, x: m.down((h := _halves(m, x))[0].clamp(-7, 7) * gelu(h[1])),
        "activation",
    ),
    "matrices of one size": Pair(
        lambda m, x: m.down(gelu(m.up(x)) * (x @ m.w1)),
        lambda m, x: m.down(gelu(m.one(x)) * m.up(x)),
        "differ in size",
    ),
    "two matrices": Pair(
        lambda m, x: m.down((x @ m.w1) * gelu(m.up(x))),
        lambda m, x: m.down(m.up(x) * gelu(m.up(x))),
        "have the same weights",
    ),
    "glu": Pair(
        lambda m, x: m.down(F.glu(m.fused(x))),
        lambda m, x: m.down(F.glu(m.up(x), dim=0)),
        "glu stands between",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_an_accepted_form_is_one_plain_site_and_gives_the_same_when_rewritten(name: str) -> None:
    model, backend = Model(PLAIN[name].accepted).eval(), Exact()
    output = torch.compile(model, backend=backend, fullgraph=True)(X)
    assert [(s.kind, s.reason) for s in backend.sites] == [("plain", None)]
    assert backend.rewritten == 1
    expected = model(X)
    assert output.shape == expected.shape
    assert_same(output, expected)


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_an_accepted_gate_is_one_gated_site_and_gives_the_same_when_rewritten(name: str) -> None:
    model, backend = Model(GATED[name].accepted).eval(), Exact()
    output = torch.compile(model, backend=backend, fullgraph=True)(X)
    (site,) = backend.sites
    assert (site.kind, site.reason) == ("gated", None)
    assert site.activation == ("sigmoid" if name == "glu" else "gelu")
    assert backend.rewritten == 1
    assert_same(output, model(X))


def _multiplied(transposed: bool, gate: int) -> Form:
    """A fused matrix stored either way, its first or second half the gate."""

    def forward(m: Model, x: Tensor) -> Tensor:
        halves = (x @ m.fused.weight.t() if transposed else m.fused(x)).chunk(2, -1)
        return m.down(halves[1 - gate] * gelu(halves[gate]))  # type: ignore[no-any-return]

    return forward


SEPARATE: dict[str, Form] = {
    "its own gate": lambda m, x: m.down(gelu(m.up(x)) * (x @ m.w1)),
    "its own gate, first": lambda m, x: m.down((x @ m.w1) * gelu(m.up(x))),
    "fused, gate first": _multiplied(False, 0),
    "fused and transposed, gate second": _multiplied(True, 1),
}


@pytest.mark.parametrize(
    "form", [*(GATED[name].accepted for name in GATED), *SEPARATE.values()], ids=[*GATED, *SEPARATE]
)
@torch.no_grad()
def test_the_weights_of_a_gated_site_are_two_matrices_of_one_shape_that_give_its_output(form: Form) -> None:
    model = Model(form)
    gm, inputs, (site,) = capture(model, X)
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    parameters = [values[node] for node in site.parameters]
    weights = SiteWeights.from_site(site, parameters)
    assert weights.gate is not None
    assert weights.gate.shape == weights.up.shape == (32, 8)
    assert weights.bytes == sum(p.numel() * p.element_size() for p in parameters)
    activated = ACTIVATIONS[str(site.activation)].eager(F.linear(X, weights.gate, weights.gate_bias))
    hidden = activated * F.linear(X, weights.up, weights.up_bias)
    assert_same(F.linear(hidden, weights.down, weights.down_bias), model(X))


@pytest.mark.parametrize("name", PLAIN | GATED)
@torch.no_grad()
def test_its_neighbour_is_listed_and_refused(name: str) -> None:
    pair = (PLAIN | GATED)[name]
    model, backend = Model(pair.neighbour).eval(), Exact()
    torch.manual_seed(0)  # of the dropout
    output = torch.compile(model, backend=backend, fullgraph=True)(X)
    assert backend.rewritten == 0
    if pair.reason:
        (site,) = backend.sites
        assert pair.reason in str(site.reason)
    if name != "dropout that does not drop":
        assert_same(output, model(X))


@pytest.mark.parametrize("name", PLAIN | GATED)
@pytest.mark.parametrize("which", ["accepted", "neighbour"])
def test_symbolic_sizes_change_nothing_unless_the_reason_says_so(name: str, which: str) -> None:
    model = Model(getattr((PLAIN | GATED)[name], which)).eval()
    static, symbolic = (capture(model, X, dynamic=dynamic).sites for dynamic in (False, True))
    for fixed, site in zip(static, symbolic, strict=True):
        unknown = fixed.reason is None and "cannot be compared" in str(site.reason)
        assert unknown or (site.kind, site.reason) == (fixed.kind, fixed.reason)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda x, w, u, v, a, b: F.linear(gelu(F.linear(x, w)), v),
    "with biases": lambda x, w, u, v, a, b: F.linear(gelu(F.linear(x, w, u[:, 0])), v, a[0]),
    "by the transposed": lambda x, w, u, v, a, b: gelu(x @ w.T) @ v.T,
    "gated": lambda x, w, u, v, a, b: F.linear(F.silu(F.linear(x, w)) * F.linear(x, u), v),
    "with an adapter": lambda x, w, u, v, a, b: F.linear(gelu(F.linear(x, w) + F.linear(F.linear(x, a), b)), v),
    "unknown": lambda x, w, u, v, a, b: F.linear(F.logsigmoid(F.linear(x, w)), v),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_ffn_whose_weights_have_symbolic_sizes_is_listed(name: str) -> None:
    tensors = [torch.randn(size) for size in ((3, 8), (32, 8), (32, 8), (8, 32), (2, 8), (32, 2))]
    (site,) = capture(FUNCTIONS[name], *tensors, dynamic=True).sites
    assert site.reason is not None
