import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from builders import models
from builders.architectures import FAMILIES, made
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx.graph.matcher import find_sites
from tardis_fx.testing.capture import capture, sites_of

X = torch.linspace(-1, 1, 3 * 8).view(3, 8)


def ffn(activation: nn.Module | None = None, d: int = 8, hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, hidden), activation or nn.GELU(), nn.Linear(hidden, d)).eval()


class Model(nn.Module):
    """Two projections and a forward of its own."""

    def __init__(self, forward: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)
        self.wide, self.square = nn.Linear(8, 32), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(32))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


# ---- Sites; for whole models see test_architectures.py


def test_the_gate_is_the_projection_that_the_activation_sees() -> None:
    (first, _) = sites_of(models.llama(), models.tokens(2, 5))
    assert first.gate is not None
    assert "gate_proj" in first.gate.weight.name
    assert "up_proj" in first.up.weight.name
    assert "down_proj" in first.down.weight.name
    (fused, _) = sites_of(made(FAMILIES["phi3, fused"]), models.tokens(2, 5))
    assert fused.gate is fused.up
    assert "gate_up_proj" in fused.up.weight.name


def test_weights_stored_in_by_out_are_said_to_be_transposed() -> None:
    (conv1d, _) = sites_of(models.gpt2(), models.tokens(2, 5))
    (linear, _) = sites_of(made(FAMILIES["opt"]), models.tokens(2, 5))
    assert conv1d.up.transposed
    assert conv1d.down.transposed
    assert not linear.up.transposed
    assert not linear.down.transposed


def test_a_plain_sequential_is_one_site() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 8)).eval()
    (site,) = sites_of(model, X)
    assert (site.kind, site.activation, site.reason) == ("plain", "gelu", None)
    assert [node.meta["example_value"].shape for node in site.parameters] == [(32, 8), (32,), (8, 32), (8,)]


def test_ffns_that_follow_each_other_directly_are_two_sites() -> None:
    first, second = sites_of(nn.Sequential(ffn(), ffn(nn.ReLU())), X)
    assert [(s.name, s.activation, s.reason) for s in (first, second)] == [("0", "gelu", None), ("1", "relu", None)]
    assert second.input is first.output


def test_48_layers_match_in_under_a_second() -> None:
    graph = capture(models.gpt2(layers=48, width=16), models.tokens(1, 4), use_cache=False).gm.graph
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            sites = find_sites(graph)
            taken.append(time.perf_counter() - start)
    assert sum(site.reason is None for site in sites) == len(sites) == 48
    assert min(taken) < 1


# ---- Refusals

REFUSED: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    "the pre-activation is used elsewhere": (
        lambda m, x: (m.down(F.gelu(h := m.up(x))), h.sum()),
        "intermediate value",
    ),
    "the activation is used elsewhere": (lambda m, x: (m.down(a := F.gelu(m.up(x))), a), "intermediate value"),
    "a factor of a spelt activation is used elsewhere": (
        lambda m, x: (m.down((h := m.up(x)) * (s := torch.sigmoid(h))), s.mean()),
        "intermediate value",
    ),
    "the weight is computed": (
        lambda m, x: F.linear(F.gelu(F.linear(x, m.up.weight * 2)), m.down.weight),
        "computed in the graph",
    ),
    "the weight is normalised": (
        lambda m, x: F.linear(F.gelu(m.up(x)), F.normalize(m.down.weight)),
        "computed in the graph",
    ),
    "the activation is unknown": (lambda m, x: m.down(torch.sin(m.up(x))), "not in the registry"),
    "the activation is scaled by neuron": (
        lambda m, x: m.down(F.gelu(m.up(x)) * m.scale),
        "is not an activation function",
    ),
    "the activation is bounded by neuron": (
        lambda m, x: m.down(torch.maximum(m.up(x), m.scale)),
        "is not an activation function",
    ),
    "dropout drops": (lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.5, training=True)), "training mode"),
    "the hidden size is not larger": (lambda m, x: m.square(F.gelu(m.square(x))), "hidden size"),
    "gate and up projection differ in their input": (
        lambda m, x: m.down(F.silu(m.up(x)) * m.wide(x + 1)),
        "different inputs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_site_that_no_rewrite_may_touch_is_listed_with_the_reason(case: str) -> None:
    forward, reason = REFUSED[case]
    (site,) = sites_of(Model(forward), X)
    assert reason in str(site.reason)


def test_a_site_whose_weights_are_inputs_of_the_model_is_refused() -> None:
    def forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), down)

    (site,) = capture(forward, X, torch.ones(32, 8), torch.ones(8, 32)).sites
    assert "not a parameter" in str(site.reason)


def test_a_site_that_needs_gradients_is_refused() -> None:
    model = ffn()
    (site,) = sites_of(model, X, grad=True)
    assert "it needs gradients: call the model under torch.no_grad()" in str(site.reason)
    model.requires_grad_(False)
    (site,) = sites_of(model, X, grad=True)
    assert site.reason is None


def test_a_site_whose_input_needs_gradients_is_refused() -> None:
    (site,) = sites_of(ffn().requires_grad_(False), X.clone().requires_grad_(), grad=True)
    assert "gradients" in str(site.reason)


@pytest.mark.parametrize(("training", "rate", "refused"), [(True, 0.1, True), (True, 0.0, False), (False, 0.1, False)])
def test_dropout_is_refused_only_where_it_drops(training: bool, rate: float, refused: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(rate), nn.Linear(32, 8)).train(training)
    (site,) = sites_of(model, X)
    assert (site.reason is not None) == refused


def test_a_site_under_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (site,) = sites_of(ffn(), X)
    assert "autocast" in str(site.reason)


def test_a_site_that_enters_autocast_inside_the_graph_is_refused() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.down(F.gelu(m.up(x)))  # type: ignore[no-any-return]

    (site,) = sites_of(Model(forward), X)
    assert "autocast" in str(site.reason)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a method": lambda w: w.mul_(2),
    "a function": lambda w: torch.Tensor.copy_(w, w * 2),
    "an initialiser": nn.init.zeros_,
    "a view": lambda w: w.view(-1).mul_(2),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "a row": lambda w: w[0].mul_(2),
    "an alias": lambda w: w.detach().mul_(2),
    "an out argument": lambda w: torch.mul(w, 2, out=w),
    "a list": lambda w: torch._foreach_mul_([w], 2),
}


@pytest.mark.parametrize("by", WRITES)
@pytest.mark.parametrize("projection", ["up", "down"])
def test_a_site_whose_weight_the_graph_writes_to_is_refused(by: str, projection: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        WRITES[by](getattr(m, projection).weight)
        return m.down(F.gelu(m.up(x)))  # type: ignore[no-any-return]

    (site,) = sites_of(Model(forward), X)
    assert "writes to its weight" in str(site.reason)


# ---- Blocks that are not FFNs

NO_FFN: dict[str, Callable[[Model, Tensor], Any]] = {
    "one projection": lambda m, x: F.gelu(m.up(x)),
    "two projections side by side": lambda m, x: m.up(x) + m.wide(x),
    "two projections in a row": lambda m, x: m.down(m.up(x)) if x.dim() < 2 else m.square(m.square(x)),
    "a norm between the projections": lambda m, x: m.square(m.norm(m.square(x))),
    "attention": lambda m, x: m.square(torch.softmax(m.square(x) @ m.square(x).T, -1) @ m.square(x)),
    "a head with a softcap": lambda m, x: torch.tanh(m.up(m.norm(x)) / 30) * 30,
}


@pytest.mark.parametrize("case", NO_FFN)
def test_a_block_that_is_not_an_ffn_is_not_a_site(case: str) -> None:
    assert sites_of(Model(NO_FFN[case]), X) == []


def test_attention_and_head_projections_are_in_no_site() -> None:
    for make in (models.gpt2, partial(made, FAMILIES["bert"])):
        captured = capture(make(), models.tokens(2, 5))
        used = {node for site in captured.sites for node in site.parameters}
        others = [n.name for n in captured.gm.graph.find_nodes(op="placeholder") if n not in used]
        assert len(used) == 2 * 4
        assert all("mlp" in n.name or "dense" in n.name for n in used)
        assert any("attn" in name or "attention" in name for name in others)
