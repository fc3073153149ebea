"""FFNs and their surroundings: hooks, computed weights, graph breaks, regional compilation, symbolic sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import models
from builders.architectures import FAMILIES, made
from builders.exact import Exact, assert_same, run
from builders.ffns import Block, config, ffn, ffn_of, inputs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tardis_fx import Plan

X = inputs(2, 3, 16)


# ---- Values that something else reads


def test_a_hook_that_keeps_the_intermediate_value_makes_the_site_refused() -> None:
    model, outputs = nn.Sequential(Block(ffn()), Block(ffn(seed=1))), list[Tensor]()
    ffn_of(model[0])[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    backend = run(model, X)
    assert backend.rewritten == 1
    assert "intermediate value" in str(backend.sites[0].reason)
    torch.testing.assert_close(*outputs)


def test_hooks_that_keep_nothing_or_the_output_do_not_matter() -> None:
    model, outputs = Block(ffn()), list[Tensor]()
    ffn_of(model)[1].register_forward_hook(lambda module, args, output: None)
    model.ffn.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert run(model, X).rewritten == 1
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_hidden_states_of_all_layers_can_be_asked_for(name: str) -> None:
    family = FAMILIES[name]
    model = made(family)
    asked: dict[str, Any] = {**family.inputs, "output_hidden_states": True}
    backend = run(model, **asked)
    assert backend.rewritten == 2


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
    up = ffn_of(model[0]).up
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
    kwargs = FAMILIES["gpt2"].inputs | {"use_cache": False}
    expected = torch.compile(model, backend=whole)(**kwargs)
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": Plan(tuple(whole.plans), config()), "inner": "eager", "strict": True}
    torch._dynamo.utils.counters.clear()
    for block in model.h:
        if how == "compile":
            block.compile(backend="tardis", options=options)
        else:
            block.forward = torch.compile(block.forward, backend="tardis", options=options)
    assert_same(model(**kwargs), expected)
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
