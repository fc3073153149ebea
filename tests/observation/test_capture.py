from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.ffns import ffn, inputs
from torch import Tensor, fx, nn

from tardis_fx import CalibrationError
from tardis_fx.observation.capture import Capture

X = inputs(5, 16)


def ignore(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
    return gm.forward


def test_a_batch_is_the_first_argument_or_all_arguments_by_keyword() -> None:
    model = ffn()
    with torch.no_grad():
        expected = model(X)
    captured = Capture(model, ignore)
    assert torch.equal(captured(X), expected)
    assert torch.equal(captured({"input": X}), expected)


def test_the_observer_sees_every_graph_with_its_inputs_and_replaces_it() -> None:
    seen: list[list[Tensor]] = []

    def observer(gm: fx.GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        assert len(gm.graph.find_nodes(op="placeholder")) == len(given)
        seen.append(given)
        return lambda *values: (torch.full((3,), float(len(values))),)

    model = ffn()
    assert Capture(model, observer)(X).tolist() == [5.0] * 3
    (given,) = seen
    assert {t.data_ptr() for t in given} == {X.data_ptr(), *(p.data_ptr() for p in model.parameters())}


def test_no_gradients_are_kept() -> None:
    modes: list[bool] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ffn()

        def forward(self, x: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return self.inner(x)  # type: ignore[no-any-return]

    result = Capture(Model(), ignore)(X)
    assert not result.requires_grad
    assert torch.is_grad_enabled()


def test_captures_leave_nothing_in_each_others_caches() -> None:
    model = ffn()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            Capture(model, lambda gm, inputs: ignore(gm, inputs))(X)  # another observer each time


def test_many_shapes_stay_within_the_recompilation_limit() -> None:
    limit = torch._dynamo.config.recompile_limit
    captured = Capture(nn.Sequential(nn.Flatten(), nn.Linear(16, 16)), ignore)
    for dimensions in range(1, limit + 4):
        assert captured(torch.ones(2, *[1] * dimensions, 16)).shape == (2, 16)
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("batch", [X.to("meta"), {"input": X.to("meta")}], ids=["tensor", "dict"])
def test_a_batch_on_another_device_is_refused_and_both_devices_named(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="the batch is on meta, the model on cpu"):
        Capture(ffn(), ignore)(batch)


def test_an_error_of_the_model_is_the_users_to_see() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Capture(ffn(), ignore)({"text": X})
