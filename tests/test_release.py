"""Weights that a rewritten model does not read can go."""

import logging
from typing import Any

import pytest
import torch
from builders.ffns import Block, Broken, ffn, inputs
from builders.release import HIDDEN, D, compiled, planned
from torch import nn

import tardis_fx
from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.guarded_fold import GuardedFold


@torch.no_grad()
def test_a_model_without_its_matrices_gives_what_it_gave_and_holds_a_number_in_their_place() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = planned(model)
    before = compiled(model, plan)(x)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert tardis_fx.release(model, plan, x) == 4 * 2 * D * HIDDEN
    assert all(p.untyped_storage().nbytes() == 4 for p in matrices)
    torch.compiler.reset()
    assert torch.equal(compiled(model, plan)(x), before)
    assert all(p.isnan().all() for p in matrices)
    assert tardis_fx.release(model, plan, x) == 0


@torch.no_grad()
def test_a_model_that_was_compiled_before_goes_on() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = planned(model)
    fast = compiled(model, plan)
    before = fast(x)
    tardis_fx.release(model, plan, x)
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_what_is_stored_falls_by_what_was_released() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = planned(model)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    freed = tardis_fx.release(model, plan, x)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - freed


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_whose_matrices_are_stored_the_other_way_is_stored_as_the_plan_says(bits: int) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        matrix.data = matrix.T.contiguous().T
    plan = planned(model, row_bits=bits)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == plan.sites[0].stored_bytes
    copies = 0 if bits == 16 else 2  # rows of 16 bits are read from the weights, and W2 lies as they need it
    assert tardis_fx.release(model, plan, x) == copies * 4 * D * HIDDEN


@torch.no_grad()
def test_a_released_ffn_never_runs_as_it_was() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = planned(model)
    tardis_fx.release(model, plan, x)
    with pytest.raises(PlanMismatchError, match="released: compile with prefill='rewritten'"):
        compiled(model, plan, prefill="original")(x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    torch.compiler.reset()
    with pytest.raises(tardis_fx.TardisError):
        compiled(model, plan)(x)


@torch.no_grad()
def test_rows_of_the_original_weights_keep_them_once(caplog: pytest.LogCaptureFixture) -> None:
    """W2 and its transposed copy are one: prefill takes the original FFN, and corrections gather its rows."""
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan, before = planned(model, row_bits=16), model(x)
    fast = compiled(model, plan)(x)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    caplog.clear()
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - 4 * D * HIDDEN
    assert not caplog.text
    up, down = (p for p in model.parameters() if p.dim() == 2)
    weights = SiteWeights(up, model[0].bias, down, model[2].bias)  # type: ignore[index,arg-type]
    assert GuardedFold().constants(plan.rewritten[0], weights)["columns"].data_ptr() == down.data_ptr()
    torch.compiler.reset()
    torch.testing.assert_close(compiled(model, plan, prefill="original")(x), before)
    torch.testing.assert_close(compiled(model, plan)(x), fast)
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        assert tardis_fx.release(model, plan, x) == 0
    assert "keeps its weights" in caplog.text
    down.mul_(2)
    with pytest.raises(tardis_fx.TardisError):
        compiled(model, plan)(x)


@torch.no_grad()
def test_a_matrix_that_something_else_reads_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.head = ffn(D, HIDDEN), nn.Linear(D, HIDDEN)
            self.head.weight = self.ffn.up.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.ffn(x))  # type: ignore[no-any-return]

    model, x = Tied().eval().requires_grad_(False), inputs(32, D)
    plan = planned(model)
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert not model.head.weight.isnan().any()


@torch.no_grad()
def test_layers_of_equal_weights_are_all_released() -> None:
    model = nn.Sequential(ffn(D, HIDDEN), ffn(D, HIDDEN)).eval().requires_grad_(False)
    plan = planned(model)
    assert tardis_fx.release(model, plan, inputs(4, D)) == 2 * 4 * 2 * D * HIDDEN


@torch.no_grad()
@pytest.mark.parametrize("options", [{"on_change": "refit"}, {"on_change": "original"}, {"plan": None}])
def test_what_is_released_is_not_observed_and_not_run(options: dict[str, Any]) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = planned(model)
    tardis_fx.release(model, plan, x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    arguments: dict[str, Any] = {"plan": plan, "inner": "eager", "prefill": "rewritten"} | options
    with pytest.raises(PlanMismatchError, match="which were released"):
        torch.compile(model, backend="tardis", options=arguments)(x)


def test_a_plan_of_another_model_releases_nothing() -> None:
    plan = planned(ffn(D, HIDDEN, seed=3))
    model = ffn(D, HIDDEN)
    with pytest.raises(PlanMismatchError, match="nothing to release"):
        tardis_fx.release(model, plan, inputs(4, D))


# ---- Blocks that share a graph or weights


@torch.no_grad()
def test_every_block_of_a_shared_graph_is_released() -> None:
    model, x = Broken([Block(ffn(D, HIDDEN, seed=i), D) for i in range(4)]), inputs(32, D)
    plan = planned(model)
    before = compiled(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 4 * 4 * 2 * D * HIDDEN
    assert all(p.isnan().all() for p in model.parameters() if p.dim() == 2)
    torch.compiler.reset()
    assert torch.equal(compiled(model, plan)(x), before)


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True])
def test_an_ffn_of_two_blocks_is_released_once(broken: bool) -> None:
    shared = ffn(D, HIDDEN)
    blocks: list[nn.Module] = [Block(shared, D), Block(shared, D), Block(ffn(D, HIDDEN, seed=1), D)]
    model, x = Broken(blocks) if broken else nn.Sequential(*blocks).eval(), inputs(32, D)
    plan = planned(model)
    before = compiled(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 2 * 4 * 2 * D * HIDDEN
    torch.compiler.reset()
    assert torch.equal(compiled(model, plan)(x), before)


@torch.no_grad()
def test_a_matrix_of_two_ffns_stays(caplog: pytest.LogCaptureFixture) -> None:
    first, second = ffn(D, HIDDEN), ffn(D, HIDDEN, seed=1)
    second[0] = first[0]
    model, x = nn.Sequential(first, second).eval(), inputs(32, D)
    plan = planned(model)
    before = compiled(model, plan)(x)
    assert tardis_fx.release(model, plan, x) == 2 * 4 * D * HIDDEN
    assert "keeps weights that something else holds or reads" in caplog.text
    assert first.up.weight.isfinite().all()
    torch.compiler.reset()
    assert torch.equal(compiled(model, plan)(x), before)


@torch.no_grad()
def test_a_matrix_that_another_graph_reads_stays() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn(D, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.ffn(x)
            torch._dynamo.graph_break()
            return x * self.ffn.up.weight.square().mean()  # type: ignore[no-any-return]

    model, x = Reads().eval(), inputs(32, D)
    plan = planned(model)
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert model.ffn.up.weight.isfinite().all()
