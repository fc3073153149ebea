"""FFNs in what surrounds them: hooks, nested graphs, graph breaks, regional compilation, symbolic sizes, mixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import models
from builders.architectures import FAMILIES, made
from builders.capture import sites_of
from builders.compiled import compiled
from builders.exact import Exact, assert_same
from builders.ffns import Block, config, ffn, inputs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tardis_fx import Plan, calibrate, explain

if TYPE_CHECKING:
    from collections.abc import Callable

X = inputs(2, 3, 16)


def run(model: nn.Module, *args: Any, fullgraph: bool = True, **kwargs: Any) -> Exact:
    """The backend after one call, whose result was the model's."""
    backend = Exact()
    with torch.no_grad():
        expected = model(*args, **kwargs)
        assert_same(torch.compile(model, backend=backend, fullgraph=fullgraph)(*args, **kwargs), expected)
    return backend


# ---- Values that something else reads


def test_a_hook_that_keeps_the_intermediate_value_makes_the_site_refused() -> None:
    model, kept = nn.Sequential(Block(ffn()), Block(ffn(seed=1))), list[Tensor]()
    model[0].ffn[1].register_forward_hook(lambda module, given, output: kept.append(output))  # type: ignore[union-attr, operator, index]
    backend = run(model, X)
    assert backend.rewritten == 1
    assert "intermediate value" in str(backend.sites[0].reason)
    torch.testing.assert_close(*kept)


def test_hooks_that_keep_nothing_or_the_output_do_not_matter() -> None:
    model, kept = Block(ffn()), list[Tensor]()
    model.ffn[1].register_forward_hook(lambda module, given, output: None)
    model.ffn.register_forward_hook(lambda module, given, output: kept.append(output))
    assert run(model, X).rewritten == 1
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_hidden_states_of_all_layers_can_be_asked_for(name: str) -> None:
    family = FAMILIES[name]
    model = made(family)
    backend = run(model, **family.inputs, output_hidden_states=True)
    assert backend.rewritten == 2


# ---- Graphs inside the graph, and fused ops


@torch.compiler.nested_compile_region
def _region(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


NESTED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "checkpoint": (lambda m, x: checkpoint(m, x, use_reentrant=False), "tag_activation_checkpoint"),
    "reentrant checkpoint": (lambda m, x: checkpoint(m, x, use_reentrant=True), "tag_activation_checkpoint"),
    "cond": (lambda m, x: torch.cond(x.sum() > 0, lambda y: m(y) + 0, lambda y: y + 1, (x,)), "cond"),
    "region, run twice": (lambda m, x: _region(m, _region(m, x)), "invoke_subgraph"),
    "checkpoint in a checkpoint": (
        lambda m, x: checkpoint(lambda y: checkpoint(m, y, use_reentrant=False), x, use_reentrant=False),
        "tag_activation_checkpoint",
    ),
}


class Nested(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.ffn, self.plain, self.call = ffn(), ffn(seed=1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.call(self.ffn, x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant one
@pytest.mark.parametrize("name", NESTED)
def test_a_site_in_a_graph_of_its_own_is_listed_with_its_weights_and_refused(name: str) -> None:
    call, op = NESTED[name]
    model = Nested(call).eval()
    backend = run(model, X)
    *nested, plain = backend.sites
    assert len(nested) == 1 + ("twice" in name)
    assert (plain.name, plain.reason) == ("plain", None)
    for site in nested:
        assert (site.name, site.activation) == ("ffn", "gelu")
        assert site.reason == f"it is computed inside {op}, in a graph of its own"
        assert {node.op for node in site.parameters} == {"placeholder"}
        assert {node.graph for node in site.parameters} == {node.graph for node in plain.parameters}


def _encoder(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, **({"batch_first": True} | changed))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize(("norm_first", "activation"), [(False, "relu"), (True, "gelu")])
def test_a_fused_encoder_layer_is_refused_with_the_remedy(norm_first: bool, activation: str) -> None:
    model = _encoder(norm_first=norm_first, activation=activation)
    backend = run(model, X)
    assert [(s.name, s.activation) for s in backend.sites] == [(f"layers.{i}", activation) for i in range(2)]
    assert all("torch.backends.mha.set_fastpath_enabled(False)" in str(s.reason) for s in backend.sites)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch._dynamo.reset()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        assert run(model, X).rewritten == 2
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_encoder_and_decoder_layers_that_are_not_fused_are_rewritten() -> None:
    assert run(_encoder(batch_first=False), X).rewritten == 2
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True).eval()
    assert run(decoder, X, X).rewritten == 1


# ---- Weights that are computed

COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Hardtanh()),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_computed_at_each_call_are_refused_until_they_are_stored(name: str) -> None:
    model = nn.Sequential(Block(ffn()))
    up = model[0].ffn[0]  # type: ignore[union-attr, index]
    COMPUTED[name](up)
    backend = run(model.eval(), X)
    (site,) = backend.sites
    assert "computed in the graph" in str(site.reason)
    assert site.name == "0.ffn"
    if name == "pruning":
        prune.remove(up, "weight")
    else:
        parametrize.remove_parametrizations(up, "weight")
    torch._dynamo.reset()
    assert run(model, X).rewritten == 1


# ---- Graph breaks, regional compilation


class Broken(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.first, self.second, self.inside = ffn(), ffn(seed=1), inside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first[0](x)
        if self.inside:
            torch._dynamo.graph_break()
        x = x + self.first[2](self.first[1](hidden))
        if not self.inside:
            torch._dynamo.graph_break()
        return x + self.second(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("inside", "rewritten"), [(False, 2), (True, 1)])
def test_a_graph_break_hides_only_the_site_that_it_cuts(inside: bool, rewritten: int) -> None:
    backend = run(Broken(inside).eval(), X, fullgraph=False)
    assert backend.graphs == 2
    assert backend.rewritten == len(backend.sites) == rewritten


@pytest.mark.parametrize("how", ["compile", "forward"])
@torch.no_grad()
def test_blocks_compiled_one_by_one_are_rewritten_in_one_shared_graph(how: str) -> None:
    torch.manual_seed(0)
    model, whole = made(FAMILIES["gpt2"]), Exact()
    given = FAMILIES["gpt2"].inputs | {"use_cache": False}
    expected = torch.compile(model, backend=whole)(**given)
    torch._dynamo.reset()
    options = {"plan": Plan(tuple(whole.plans), config()), "inner": "eager", "strict": True}
    torch._dynamo.utils.counters.clear()
    for block in model.h:
        if how == "compile":
            block.compile(backend="tardis", options=options)
        else:
            block.forward = torch.compile(block.forward, backend="tardis", options=options)
    assert_same(model(**given), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- Symbolic sizes


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "deberta_v2"])
@torch.no_grad()
def test_all_sizes_symbolic(name: str) -> None:
    model, backend = made(FAMILIES[name]), Exact()
    kwargs = {"use_cache": False} if name in ("gpt2", "opt") else {}
    fast = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for shape in [(2, 5), (3, 7), (4, 6)]:
        ids = models.tokens(*shape) % 61 + 3
        assert_same(fast(ids, **kwargs), model(ids, **kwargs))
    assert backend.rewritten == len(backend.sites) == 2 * backend.graphs
    assert backend.graphs == 1


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=["batch", "sequence", "both"])
@torch.no_grad()
def test_marked_axes_are_rewritten_once_for_all_sizes(axes: tuple[int, ...]) -> None:
    model, backend = made(FAMILIES["gpt2"]), Exact()
    fast = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    for step in range(3):
        ids = models.tokens(*(4 + step * (axis in axes) for axis in range(2)), seed=step)
        for axis in axes:
            torch._dynamo.mark_dynamic(ids, axis)
        assert_same(fast(ids, use_cache=False), model(ids, use_cache=False))
    assert (backend.graphs, backend.rewritten) == (1, 2)


# ---- Mixtures of experts written as modules


class Mixture(nn.Module):
    """Each token goes to two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(ffn(seed=i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == i)
            result.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, place, None])
        return result


class Capacity(Mixture):
    """Each expert takes the three tokens that it likes best."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = self.router(x).softmax(-1).topk(3, 0)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            result = result.index_add(0, tokens[:, i], expert(x.index_select(0, tokens[:, i])) * weights[:, i, None])
        return result


@pytest.mark.parametrize("kind", [Mixture, Capacity])
def test_experts_are_listed_and_refused_because_their_tokens_are_routed(kind: type[Mixture]) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        backend = run(kind().eval(), X.view(6, 16))
    assert [s.name for s in backend.sites] == [f"experts.{i}" for i in range(4)]
    assert {s.reason for s in backend.sites} == {"it is an expert of a mixture: its tokens are routed"}


def test_experts_that_see_every_token_are_plain_ffns() -> None:
    class Soft(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            return sum(e(x) * weights[:, i, None] for i, e in enumerate(self.experts))  # type: ignore[return-value]

    assert run(Soft().eval(), X.view(6, 16)).rewritten == 4


def test_a_model_of_experts_alone_has_a_plan_that_refuses_them_and_runs_as_it_was() -> None:
    family = FAMILIES["mixtral"]
    model = made(family)
    plan = calibrate(model, [family.inputs], config=config())
    reports = explain(model, plan, family.inputs).sites
    assert [(r.name, r.status) for r in reports] == [(f"layers.{i}.mlp.experts", "refused") for i in range(2)]
    stacked = [(e.gate_up_proj, e.down_proj) for e in (layer.mlp.experts for layer in model.layers)]
    assert [r.dense_bytes for r in reports] == [4 * (up.numel() + down.numel()) for up, down in stacked]
    with torch.no_grad():
        assert_same(compiled(model, plan)(**family.inputs), model(**family.inputs))


def test_a_site_whose_number_of_tokens_depends_on_the_data_is_refused() -> None:
    class Unpadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x[x[:, 0] > 0])  # type: ignore[no-any-return]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (site,) = sites_of(Unpadded().eval(), X.view(6, 16))
    assert "depends on the data" in str(site.reason)
