"""Constants by the weights of each call: one graph for several modules, and weights that change."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builders.compiled import compiled
from builders.ffns import FFN, Block, expected, ffn, ffn_of, inputs, planned
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from tardis_fx import Plan, PlanMismatchError, StaleWeightError
from tardis_fx.passes.weight_guard import GuardedGraph

FEW, MANY = inputs(4, 16, seed=7), inputs(40, 16, seed=8)


# ---- One graph, several modules


@torch.no_grad()
def test_blocks_that_share_one_graph_use_their_own_constants() -> None:
    blocks = [Block(ffn(seed=seed)) for seed in range(4)]
    model = nn.Sequential(*blocks).eval()
    plan = planned(model)
    compilations: list[int] = []

    def counting(gm: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compilations.append(1)
        return gm.forward

    torch._dynamo.register_backend(counting, name="counting")  # type: ignore[no-untyped-call]
    for i, block in enumerate(blocks):
        block.compile(backend="tardis", options={"plan": plan, "inner": "counting"})
        norm = block.norm(FEW)
        own_plan = Plan((plan.sites[i],), plan.config)
        for _ in range(2):
            torch.testing.assert_close(block(FEW), FEW + expected(ffn_of(block), own_plan, norm))
    assert len(compilations) == 1, "not one graph: the test tests nothing"


@torch.no_grad()
def test_two_models_of_equal_weights_share_a_plan(original: FFN, plan: Plan) -> None:
    for model in (original, copy.deepcopy(original), Block(copy.deepcopy(original)).ffn):
        torch.testing.assert_close(compiled(model, plan)(FEW), expected(original, plan, FEW))


class Turned(nn.Module):
    """An FFN whose square second matrix is multiplied by from either side."""

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.turned = nn.Linear(16, 64), nn.Parameter(torch.randn(64, 64)), turned

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(self.up(x))
        return z @ self.down if self.turned else F.linear(z, self.down)


@torch.no_grad()
def test_a_square_matrix_read_the_other_way_round_is_another_weight() -> None:
    straight, turned = Turned(turned=False).eval(), Turned(turned=True).eval()
    for planned_for, fitting, refused in ((straight, straight, turned), (turned, turned, straight)):
        plan = planned(planned_for)
        assert plan.sites[0].method == "guarded_fold"
        assert not torch.equal(compiled(fitting, plan)(FEW), fitting(FEW))
        torch._dynamo.reset()
        with pytest.raises(PlanMismatchError):
            compiled(refused, plan)(FEW)


# ---- Weights that change


def _load(model: FFN, *, assign: bool) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=assign)


CHANGES: dict[str, Callable[[FFN], Any]] = {
    "up weight in place": lambda m: m.up.weight.mul_(2),
    "up bias in place": lambda m: m.up.bias.add_(1),
    "down weight in place": lambda m: m.down.weight.mul_(2),
    "down bias in place": lambda m: m.down.bias.add_(1),
    "one element": lambda m: m.up.weight[3, 4].add_(1e-3),
    "a view": lambda m: m.up.weight.view(-1)[5:].mul_(2),
    "load_state_dict": lambda m: _load(m, assign=False),
    "load_state_dict, assigned": lambda m: _load(m, assign=True),
    "data replaced": lambda m: setattr(m.up.weight, "data", 2 * m.up.weight.data),
    "bias data replaced": lambda m: setattr(m.down.bias, "data", 2 * m.down.bias.data),
    "parameter replaced": lambda m: setattr(m.up, "weight", nn.Parameter(2 * m.up.weight)),
    "module replaced": lambda m: m.__setitem__(0, ffn(seed=5)[0]),
    "an optimiser's step": lambda m: _train(m, torch.optim.SGD(m.parameters(), 0.1)),
    # PyTorch does not count these as writes.
    "a fused optimiser's step": lambda m: _train(m, torch.optim.AdamW(m.parameters(), 0.1, fused=True)),
    "a NumPy view": lambda m: np.multiply(m.up.weight.numpy(), -3, out=m.up.weight.numpy()),
    "a DLPack view": lambda m: from_dlpack(m.down.weight.detach()).mul_(2),
    "data in place": lambda m: m.up.weight.data.mul_(2),
    "bias data in place": lambda m: m.down.bias.data.add_(1),
    "storage": lambda m: m.up.weight.untyped_storage().copy_((2 * m.up.weight).untyped_storage()),
}


def _train(model: FFN, optimiser: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        F.mse_loss(model(FEW), FEW).backward()
    optimiser.step()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_weight_raises_and_never_answers(change: str, model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan)
    fast(FEW)
    CHANGES[change](model)
    for _ in range(3):
        with pytest.raises(StaleWeightError, match="changed since calibration"):
            fast(FEW)


@pytest.mark.parametrize("change", [name for name in CHANGES if "module" not in name])
@torch.no_grad()
def test_weights_put_back_work_again(change: str, model: FFN, plan: Plan) -> None:
    fast, state = compiled(model, plan), {name: value.clone() for name, value in model.state_dict().items()}
    before = fast(FEW)
    CHANGES[change](model)
    with pytest.raises(StaleWeightError):
        fast(FEW)
    model.load_state_dict(state)
    for _ in range(2):
        assert torch.equal(fast(FEW), before)


@torch.no_grad()
def test_weights_changed_before_compiling_are_refused(model: FFN, plan: Plan) -> None:
    model.up.weight[0, 0] += 1
    with pytest.raises(PlanMismatchError, match="changed since calibration"):
        compiled(model, plan)(FEW)


@torch.no_grad()
def test_one_weight_of_several_changed_before_a_recompilation_is_refused() -> None:
    model = nn.Sequential(Block(ffn()), Block(ffn(seed=1))).eval()
    fast = compiled(model, planned(model))
    with torch.inference_mode():
        fast(FEW)
    ffn_of(model[1]).up.weight[0, 0] += 1
    with pytest.raises(StaleWeightError, match=r"1\.ffn: its weights changed since calibration"):
        fast(FEW)


@torch.no_grad()
def test_weights_of_another_site_of_the_plan_are_served_with_its_constants(plan: Plan) -> None:
    """Swapping two sites' weights is a change that the plan covers."""
    first, second = ffn(seed=1), ffn(seed=2)
    plan = planned(nn.Sequential(Block(first), Block(second)).eval())
    fast = compiled(first, plan)
    fast(FEW)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(fast(FEW), expected(second, Plan(plan.sites[1:], plan.config), FEW))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_on_change_original_runs_the_changed_model(change: str, model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, on_change="original")
    rewritten = fast(FEW)
    CHANGES[change](model)
    for _ in range(2):
        torch.testing.assert_close(fast(FEW), model(FEW))
    assert not torch.equal(rewritten, model(FEW))


@torch.no_grad()
def test_on_change_original_leaves_the_other_sites_rewritten() -> None:
    second = Block(ffn(seed=1))
    model = nn.Sequential(Block(ffn()), second).eval()
    plan = planned(model)
    fast = compiled(model, plan, on_change="original")
    fast(FEW)
    ffn_of(model[0]).up.weight.mul_(2)
    first = model[0](FEW)
    second_plan = Plan((plan.sites[1],), plan.config)
    torch.testing.assert_close(fast(FEW), first + expected(ffn_of(second), second_plan, second.norm(first)))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_on_change_refit_observes_the_changed_model_and_fits_it(change: str, model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, on_change="refit", profile_tokens=512)
    stale = fast(FEW)
    CHANGES[change](model)
    for i in range(8):  # four runs of two calls
        x = inputs(256, 16, seed=i)
        torch.testing.assert_close(fast(x), model(x))
    output, exact = fast(FEW), model(FEW)
    assert not torch.equal(output, exact)
    assert (output - exact).norm() < 0.5 * exact.norm() < 5 * (stale - exact).norm()


@torch.no_grad()
def test_another_instance_in_the_same_graph_runs_its_original(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = (Block(ffn(seed=seed)) for seed in range(3))
    plan = planned(nn.Sequential(first, second).eval())
    for block in (first, second, third):
        block.compile(backend="tardis", options={"plan": plan, "inner": "eager"})
    exact = [block.forward(FEW) for block in (first, second, third)]
    for _ in range(2):
        assert not torch.equal(first(FEW), exact[0])
        torch.testing.assert_close(third(FEW), exact[2])
        assert not torch.equal(second(FEW), exact[1])
    assert "the plan has no entry for the weights" in caplog.text
    ffn_of(third).up.weight.mul_(2)
    with pytest.raises(StaleWeightError):
        third(FEW)


@torch.no_grad()
def test_another_instance_is_an_error_where_strict() -> None:
    first, second = Block(ffn()), Block(ffn(seed=1))
    plan = planned(first)
    for block in (first, second):
        block.compile(backend="tardis", options={"plan": plan, "inner": "eager", "strict": True})
    first(FEW)
    with pytest.raises(PlanMismatchError, match="strict"):
        second(FEW)


@torch.no_grad()
def test_instances_that_the_plan_treats_differently_share_a_graph() -> None:
    """A refused entry's instance runs its original whichever came first, and the other keeps its rewrite."""
    orders: list[tuple[int, int]] = [(0, 1), (1, 0)]
    for order in orders:
        blocks = [Block(ffn(seed=seed)) for seed in range(2)]
        plan = planned(nn.Sequential(*blocks).eval())
        refused = plan.sites[1].kept("for a test")
        plan = Plan((plan.sites[0], refused), plan.config)
        for block in blocks:
            block.compile(backend="tardis", options={"plan": plan, "inner": "eager"})
        for i in (*order, *order):
            assert torch.equal(blocks[i](FEW), blocks[i].forward(FEW)) == (i == 1 or order[0] == 1)


@torch.no_grad()
def test_many_tokens_under_original_prefill_follow_the_weights(model: FFN, plan: Plan) -> None:
    """The original subgraph holds no constants, so a changed weight is served, exact."""
    fast = compiled(model, plan, prefill="original")
    fast(MANY)
    model.up.weight.mul_(2)
    torch.testing.assert_close(fast(MANY), model(MANY))


# ---- The guard itself


@torch.no_grad()
def test_the_guard_looks_at_every_call(model: FFN, plan: Plan) -> None:
    """The compiled graph is called through its guard, not beside it."""
    graphs: list[Any] = []

    class Recorded(GuardedGraph):
        def __call__(self, *args: Any) -> Any:
            graphs.append(self)
            return super().__call__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tardis_fx.backend.GuardedGraph", Recorded)
        fast = compiled(model, plan)
        for _ in range(3):
            fast(FEW)
    assert len(graphs) == 3


@torch.no_grad()
def test_weights_that_did_not_change_are_not_read_again(
    model: FFN, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, reads = compiled(model, plan), []
    fast(FEW)
    monkeypatch.setattr("tardis_fx.passes.pipeline.fingerprint", lambda weights: reads.append(weights))
    for _ in range(3):
        fast(FEW)
    assert reads == []


@torch.no_grad()
def test_blocks_streamed_through_one_buffer_use_their_own_constants() -> None:
    blocks = [Block(ffn(seed=seed)) for seed in range(3)]
    plan = planned(nn.Sequential(*blocks).eval())
    stored = [[parameter.detach().clone() for parameter in block.ffn.parameters()] for block in blocks]
    wanted = [
        FEW + expected(ffn_of(block), Plan((entry,), plan.config), block.norm(FEW))
        for block, entry in zip(blocks, plan.sites, strict=True)
    ]
    buffer = [tensor.clone() for tensor in stored[0]]
    for block in blocks:
        block.compile(backend="tardis", options={"plan": plan, "inner": "eager"})
    for _ in range(3):
        for block, values, result in zip(blocks, stored, wanted, strict=True):
            for parameter, value, room in zip(block.ffn.parameters(), values, buffer, strict=True):
                parameter.data = room.copy_(value)
            torch.testing.assert_close(block(FEW), result)


@torch.no_grad()
def test_a_buffer_that_holds_another_blocks_weights_is_noticed(model: FFN, plan: Plan) -> None:
    """The parameters, their storages and versions stay the same; what the storages hold does not."""
    buffer = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, room in zip(model.parameters(), buffer, strict=True):
        parameter.data = room
    fast = compiled(model, plan)
    fast(FEW)
    for parameter, room in zip(ffn(seed=9).parameters(), buffer, strict=True):
        room.copy_(parameter)
    with pytest.raises(StaleWeightError):
        fast(FEW)


@torch.no_grad()
def test_storages_that_a_weight_left_are_freed(model: FFN, plan: Plan) -> None:
    fast, left = compiled(model, plan, on_change="original"), []
    fast(FEW)
    gc.collect()  # what Dynamo left behind
    for _ in range(3):
        left += [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        fast(FEW)
    assert all(storage.expired() for storage in left)


@torch.no_grad()
def test_weights_can_be_freed_after_calibration_and_compilation(model: FFN) -> None:
    """As FSDP and offloaders do; a NumPy view of a storage would forbid it."""
    fast = compiled(model, planned(model))
    before, values = fast(FEW), [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.untyped_storage().resize_(value.nbytes)
        parameter.data.copy_(value)
    assert torch.equal(fast(FEW), before)
