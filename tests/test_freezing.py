"""Inductor's freezing, which leaves the weights in the graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders.ffns import config, ffn, inputs
from torch import nn
from torch._inductor import config as inductor_config

import tardis_fx
from tardis_fx import Plan
from tardis_fx.errors import StaleWeightError


@pytest.fixture(autouse=True)
def freezing() -> Iterator[None]:
    with torch.no_grad(), inductor_config.patch(freezing=True):
        yield


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), ffn(16, 64), nn.Linear(16, 16)).to(dtype).eval().requires_grad_(False)


def _plan(model: nn.Module, dtype: torch.dtype) -> Plan:
    return tardis_fx.calibrate(model, [inputs(256, 16).to(dtype)], config=config(budget=0.6, prefill="rewritten"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model_gives_what_the_rewritten_one_gives(dtype: torch.dtype) -> None:
    model = _model(dtype)
    plan, x = _plan(model, dtype), inputs(4, 16, seed=1).to(dtype)
    options: dict[str, Any] = {"plan": plan, "strict": True}
    frozen = torch.compile(model, backend="tardis", options=options)(x)
    torch.compiler.reset()
    with inductor_config.patch(freezing=False):
        free = torch.compile(model, backend="tardis", options=options)(x)
    torch.testing.assert_close(frozen, free)
    assert not torch.equal(frozen, model(x))  # or nothing was folded


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_changed_weight_is_refused(how: str) -> None:
    model = _model(torch.float32)
    x, weight = inputs(4, 16), model[1][0].weight  # type: ignore[index,operator,union-attr]
    options: dict[str, Any] = {"plan": _plan(model, torch.float32)}
    fast = torch.compile(model, backend="tardis", options=options)
    fast(x)
    if how == "replaced":
        weight.data = weight.data * 1.5
    else:
        weight.mul_(1.5)
    with pytest.raises(StaleWeightError, match="freezing holds copies"):
        fast(x)


def test_another_instance_is_compiled_anew() -> None:
    model, other = _model(torch.float32), _model(torch.float32)
    other[1][0].weight.mul_(1.5)  # type: ignore[index,operator,union-attr]
    x = inputs(4, 16)

    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)  # type: ignore[no-any-return]

    options: dict[str, Any] = {"plan": _plan(model, torch.float32), "on_change": "original"}
    fast = torch.compile(call, backend="tardis", options=options)
    fast(model, x)
    torch.testing.assert_close(fast(other, x), other(x))


def test_without_a_plan_the_original_runs_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _model(torch.float32), inputs(4, 16)
    torch.testing.assert_close(torch.compile(model, backend="tardis")(x), model(x))
    assert "its weights are part of the graph (freezing)" in caplog.text


class Surrounded(nn.Module):
    """An FFN behind a graph that has weights and no input, with a buffer that every call writes to."""

    kept: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.position = ffn(16, 64), nn.Parameter(torch.ones(16))
        self.register_buffer("kept", torch.zeros(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = self.position * 2
        torch._dynamo.graph_break()
        self.kept.copy_(x)
        return self.ffn(self.kept + position)  # type: ignore[no-any-return]


def test_buffers_that_change_and_graphs_without_inputs_are_none_of_its_business() -> None:
    model = Surrounded().eval().requires_grad_(False)
    batch = inputs(8, 16)
    with inductor_config.patch(freezing=False):
        plan = tardis_fx.calibrate(model, [batch] * 32, config=config(budget=0.6, prefill="rewritten"))
    options: dict[str, Any] = {"plan": plan}
    fast = torch.compile(model, backend="tardis", options=options)
    for seed in range(3):
        x = inputs(8, 16, seed=seed)
        out = fast(x)
        assert (out - model(x)).norm() < 0.5 * model(x).norm()
