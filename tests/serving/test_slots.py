"""FFNs among vLLM's modules, without its engine: modules with the attributes of its layers."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, local
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders.ffns import planned
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx.errors import PlanMismatchError, ServingError
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.testing.ffn import ffn, gated_ffn
from tardis_fx.testing.observation import observed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.config import Prefill
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.plan import Plan, SitePlan
    from tardis_fx.serving.slots import Slot

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))


def layer(weights: list[Tensor], biases: list[Tensor | None], *, axis: int, rank: int = 0, size: int = 1) -> Any:
    """A layer of vLLM that merges some matrices, of which this rank holds a part along an axis."""
    from vllm.model_executor.layers.linear import LinearBase

    class Layer(LinearBase):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            parts = [weight.chunk(size, axis)[rank] for weight in weights]
            self.weight = nn.Parameter(torch.cat(parts))
            bias_parts = [b if axis else b.chunk(size)[rank] for b in biases if b is not None]
            self.bias = nn.Parameter(torch.cat(bias_parts)) if bias_parts else None
            self.input_size, self.output_size = weights[0].shape[1], sum(len(weight) for weight in weights)
            self.output_partition_sizes = [len(weight) for weight in parts]
            self.tp_rank, self.tp_size, self.return_bias = rank, size, True

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return F.linear(x, self.weight, self.bias), None

    return Layer()


class MLP(nn.Module):
    """As vLLM's models write an FFN: the projections in one layer, in the order given, where they are two."""

    def __init__(self, w: SiteWeights, activation: Any, *, gate_half: int = 0, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        pairs = [(w.gate, w.gate_bias), (w.up, w.up_bias)][:: -1 if gate_half else 1]
        matrices, biases = zip(*(pair for pair in pairs if pair[0] is not None), strict=True)
        self.first = layer(list(matrices), list(biases), axis=0, rank=rank, size=size)
        self.act_fn = activation
        self.last = layer([w.down], [w.down_bias], axis=1, rank=rank, size=size)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(x)
        x, _ = self.last(self.act_fn(x))
        return x


def activation(name: str, *args: Any) -> Any:
    """A module of vLLM, or one of PyTorch, by the name of its class."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import activation as layers

    with set_current_vllm_config(VllmConfig()):
        return (getattr(layers, name, None) or getattr(nn, name))(*args)


def rewritten(mlps: Sequence[nn.Module], plan: Plan, prefill: Prefill = "rewritten") -> Sequence[nn.Module]:
    """The modules of all ranks, rewritten; each is looked at in a thread, for the ranks wait for each other."""
    from tardis_fx.serving import loader, slots

    rank, barrier, shards = local(), Barrier(len(mlps), timeout=60), dict[int, Tensor]()

    def gather(shard: Tensor, axis: int) -> Tensor:
        shards[rank.number] = shard
        barrier.wait()
        whole = torch.cat([shards[number] for number in range(len(mlps))], axis)
        barrier.wait()
        return whole

    def find(number: int) -> list[tuple[Slot, SitePlan]]:
        rank.number = number
        return slots.find(nn.ModuleDict({"mlp": mlps[number]}), plan)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(len(mlps)) as pool:
        patched.setattr(slots, "tensor_model_parallel_all_gather", gather)
        slots_of_ranks = list(pool.map(find, range(len(mlps))))
    for slot, entry in (pair for of_rank in slots_of_ranks for pair in of_rank):
        loader._rewrite(slot, entry, prefill)
    return mlps


MODELS: dict[str, tuple[Callable[..., Any], list[str], int]] = {
    "plain": (ffn, ["GELU"], 0),
    "gate and up apart": (gated_ffn, ["SiluAndMul"], 0),
    "fused": (partial(gated_ffn, fused=True), ["SiluAndMul"], 0),
    "up first": (gated_ffn, ["MulAndSilu"], 1),
    "no biases": (partial(gated_ffn, activation="gelu_tanh", bias=False), ["GeluAndMul", "tanh"], 0),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_modules_give_the_rewritten_site_and_the_original_one_for_many_rows(name: str, size: int) -> None:
    make, act, gate_half = MODELS[name]
    model = make()
    plan, weights, rewrite = planned(model, row_bits=4), observed(model).weights, rewrite_named("guarded_fold")
    entry = plan.rewritten[0]
    few, many = rewrite.forward(X[:3], rewrite.constants(entry, weights), entry), model(X).detach()
    assert not torch.isclose(few, many[:3], rtol=1e-3).all(1).any()  # else the branches could not be told apart
    mlps = [MLP(weights, activation(*act), gate_half=gate_half, rank=r, size=size) for r in range(size)]
    torch.testing.assert_close(sum(mlp(X) for mlp in mlps), many + (size - 1) * bias(weights), rtol=1e-4, atol=1e-4)
    rewritten(mlps, plan, "original")
    torch.testing.assert_close(sum(mlp(X[:3]) for mlp in mlps), few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(mlp(X) for mlp in mlps), many, rtol=1e-4, atol=1e-4)


def bias(weights: SiteWeights) -> Tensor:
    """Of the last layer, which every rank of a module that is not rewritten adds here."""
    return torch.zeros(()) if weights.down_bias is None else weights.down_bias


@pytest.mark.parametrize(
    "act", [["GeluAndMul"], ["SiluAndMulWithClamp", 7.0], ["SwigluOAIAndMul"], ["MulAndSilu"], ["SiLU"]]
)
def test_a_module_that_computes_anything_else_of_gate_and_up_is_refused_by_name(act: list[Any]) -> None:
    model = gated_ffn()
    with pytest.raises(
        ServingError, match="mlp: .* silu of part 0 of first times part 1 of first, and MLP has no module"
    ):
        rewritten([MLP(observed(model).weights, activation(*act))], planned(model))


def test_gate_and_up_in_layers_of_their_own_are_found_and_refused_by_name() -> None:
    model = gated_ffn()
    w = observed(model).weights
    mlp = MLP(w, activation("SiLU"))
    assert w.gate is not None
    mlp.first, mlp.second = (layer([m], [b], axis=0) for m, b in ((w.gate, w.gate_bias), (w.up, w.up_bias)))
    with pytest.raises(ServingError, match="silu of first times second, and MLP has no module"):
        rewritten([mlp], planned(model))


def test_other_weights_are_refused_and_named_once() -> None:
    model = gated_ffn(fused=True)
    other = observed(gated_ffn(seed=9)).weights
    with pytest.raises(PlanMismatchError, match=r"no FFN has its weights .*: mlp\)"):
        rewritten([MLP(other, activation("SiluAndMul"))], planned(model))
