"""Weights that a rewritten model does not read can go, or be mapped from files; nothing else reads what is gone."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.ffns import config, ffn, inputs
from torch import nn

import tardis_fx
from tardis_fx import Plan
from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.partial_linear import PartialLinear

D, HIDDEN = 16, 64


def _planned(model: nn.Module, **changes: Any) -> Plan:
    settings = {"budget": 0.6, "prefill": "rewritten", "fold_bits": 8, "row_bits": 8} | changes
    return tardis_fx.calibrate(model, [inputs(512, D)], config=config(**settings))


def _fast(model: nn.Module, plan: Plan, **options: Any) -> Any:
    return torch.compile(model, backend="tardis", options={"plan": plan, "inner": "eager", "strict": True} | options)


@torch.no_grad()
def test_a_model_without_its_matrices_gives_what_it_gave_and_holds_a_number_in_their_place() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = _planned(model)
    before = _fast(model, plan)(x)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert tardis_fx.release(model, plan, x) == 4 * 2 * D * HIDDEN
    assert all(p.untyped_storage().nbytes() == 4 for p in matrices)
    torch.compiler.reset()
    assert torch.equal(_fast(model, plan)(x), before)
    assert model(x).isnan().all()
    assert tardis_fx.release(model, plan, x) == 0


@torch.no_grad()
def test_a_model_that_was_compiled_before_goes_on() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D, seed=1)
    plan = _planned(model)
    fast = _fast(model, plan)
    before = fast(x)
    tardis_fx.release(model, plan, x)
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_what_is_stored_falls_by_what_was_released() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    freed = tardis_fx.release(model, plan, x)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - freed


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_whose_matrices_are_stored_the_other_way_is_stored_as_the_plan_says(bits: int) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        matrix.data = matrix.T.contiguous().T
    plan = _planned(model, row_bits=bits)
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == plan.sites[0].stored_bytes
    copies = 0 if bits == 16 else 2  # rows of 16 bits are read from the weights, and W2 lies as they need it
    assert tardis_fx.release(model, plan, x) == copies * 4 * D * HIDDEN


@torch.no_grad()
def test_a_released_ffn_never_runs_as_it_was() -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    tardis_fx.release(model, plan, x)
    with pytest.raises(PlanMismatchError, match="released: compile with prefill='rewritten'"):
        _fast(model, plan, prefill="original")(x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    torch.compiler.reset()
    with pytest.raises(tardis_fx.TardisError):
        _fast(model, plan)(x)


@torch.no_grad()
def test_rows_of_the_original_weights_keep_them_once(caplog: pytest.LogCaptureFixture) -> None:
    """W2 and its transposed copy are one: prefill takes the original FFN, and corrections gather its rows."""
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan, before = _planned(model, row_bits=16), model(x)
    fast = _fast(model, plan)(x)
    stored = tardis_fx.explain(model, plan, x).sites[0].stored_bytes
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert tardis_fx.explain(model, plan, x).sites[0].stored_bytes == stored - 4 * D * HIDDEN
    assert not caplog.text
    w1, w2 = (p for p in model.parameters() if p.dim() == 2)
    weights = SiteWeights(w1, model[0].bias, w2, model[2].bias)  # type: ignore[index,arg-type]
    assert PartialLinear().constants(plan.sites[0], weights)["w2t"].data_ptr() == w2.data_ptr()
    torch.compiler.reset()
    torch.testing.assert_close(_fast(model, plan, prefill="original")(x), before)
    torch.testing.assert_close(_fast(model, plan)(x), fast)
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        assert tardis_fx.release(model, plan, x) == 0
    assert "keeps its weights" in caplog.text
    w2.mul_(2)
    with pytest.raises(tardis_fx.TardisError):
        _fast(model, plan)(x)


@torch.no_grad()
def test_a_matrix_that_something_else_reads_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.head = ffn(D, HIDDEN), nn.Linear(D, HIDDEN)
            self.head.weight = self.ffn[0].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.ffn(x))  # type: ignore[no-any-return]

    model, x = Tied().eval().requires_grad_(False), inputs(32, D)
    plan = _planned(model)
    assert tardis_fx.release(model, plan, x) == 4 * D * HIDDEN
    assert not model.head.weight.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = ffn(D, HIDDEN).to(dtype), inputs(32, D).to(dtype)
    plan = tardis_fx.calibrate(model, [inputs(512, D).to(dtype)], config=config(budget=0.6))
    before = model(x)
    assert tardis_fx.release(model, plan, x, folder=tmp_path) == dtype.itemsize * 2 * D * HIDDEN
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == dtype.itemsize * 2 * D * HIDDEN
    assert torch.equal(model(x), before)
    assert torch.equal(_fast(model, plan, prefill="original")(x), before)
    assert (_fast(model, plan, prefill="rewritten")(x) - before).norm() < 0.3 * before.norm()


@torch.no_grad()
def test_mapping_twice_and_in_two_models_keeps_both_whole_and_apart(tmp_path: Path) -> None:
    model, twin, x = ffn(D, HIDDEN), ffn(D, HIDDEN), inputs(32, D)
    plan, before = _planned(model), model(x)
    old = weakref.ref(model[0].weight.untyped_storage())  # type: ignore[index,operator,union-attr]
    for each in (model, model, twin):
        tardis_fx.release(each, plan, x, folder=tmp_path)
    gc.collect()
    assert old() is None  # or nothing was freed
    assert torch.equal(model(x), before)
    model[0].weight.mul_(2)  # type: ignore[index,operator,union-attr]
    assert torch.equal(twin(x), before)


@torch.no_grad()
def test_layers_of_equal_weights_are_all_released() -> None:
    model = nn.Sequential(ffn(D, HIDDEN), ffn(D, HIDDEN)).eval().requires_grad_(False)
    plan = _planned(model)
    assert tardis_fx.release(model, plan, inputs(4, D)) == 2 * 4 * 2 * D * HIDDEN


@torch.no_grad()
@pytest.mark.parametrize("options", [{"on_change": "refit"}, {"on_change": "original"}, {"plan": None}])
def test_what_is_released_is_not_observed_and_not_run(options: dict[str, Any]) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan = _planned(model)
    tardis_fx.release(model, plan, x)
    model[0].bias.add_(1)  # type: ignore[index,operator,union-attr]
    options = {"plan": plan, "inner": "eager", "prefill": "rewritten"} | options
    with pytest.raises(PlanMismatchError, match="which were released"):
        torch.compile(model, backend="tardis", options=options)(x)


def test_a_plan_of_another_model_releases_nothing() -> None:
    plan = _planned(ffn(D, HIDDEN, seed=3))
    model = ffn(D, HIDDEN)
    with pytest.raises(PlanMismatchError, match="nothing to release"):
        tardis_fx.release(model, plan, inputs(4, D))
