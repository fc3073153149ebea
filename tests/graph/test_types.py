"""A site has one number type, and its intermediate values have none that is coarser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tardis_fx.testing.capture import sites_of

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class FFN(nn.Module):
    """An FFN, plain or gated, whose weights have the types given, and casts to them."""

    def __init__(self, up: torch.dtype, down: torch.dtype, gate: torch.dtype | None = None, cast: Any = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, dtype=up), nn.Linear(32, 8, dtype=down)
        self.gate = None if gate is None else nn.Linear(8, 32, dtype=gate)
        self.cast: Callable[[Tensor], Tensor] = cast or (lambda h: h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = torch.relu(self.cast(h)) if self.gate is None else h * torch.relu(self.gate(x))
        return self.down(h.to(self.down.weight.dtype))  # type: ignore[no-any-return]


def reason(model: nn.Module, x: Tensor | None = None) -> str | None:
    (site,) = sites_of(model, torch.ones(2, 8) if x is None else x)
    return site.reason


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE])
@pytest.mark.parametrize("gated", [False, True])
def test_any_one_type_is_accepted(dtype: torch.dtype, gated: bool) -> None:
    assert reason(FFN(dtype, dtype, dtype if gated else None), torch.ones(2, 8, dtype=dtype)) is None


@pytest.mark.parametrize(("up", "down"), [(HALF, SINGLE), (SINGLE, HALF), (BRAIN, SINGLE), (BRAIN, HALF)])
@pytest.mark.parametrize("gated", [False, True])
def test_projections_of_two_types_are_refused_by_name(up: torch.dtype, down: torch.dtype, gated: bool) -> None:
    x = torch.ones(2, 8, dtype=up)
    expected = f"the weight of its down projection is {down}, but the weight of its up projection is {up}"
    assert reason(FFN(up, down, up if gated else None), x) == expected


class Biased(nn.Module):
    """Sums a bias in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False).half(), nn.Linear(32, 8).half()
        self.bias = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + self.bias).half())  # type: ignore[no-any-return]


def test_a_bias_of_another_type_is_refused_by_name() -> None:
    expected = "the bias of its up projection is torch.float32, but the weight of its up projection is torch.float16"
    assert reason(Biased(), torch.ones(2, 8).half()) == expected


#: The weights' type, and casts that keep its precision and range, or do not.
FINE = [(HALF, SINGLE), (HALF, DOUBLE), (BRAIN, SINGLE), (SINGLE, DOUBLE), (SINGLE, SINGLE)]
COARSE = [
    (SINGLE, BRAIN),
    (SINGLE, HALF),
    (DOUBLE, SINGLE),
    (HALF, BRAIN),
    (BRAIN, HALF),
    (SINGLE, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("dtype", "through"), FINE)
def test_an_activation_in_a_finer_type_is_accepted(dtype: torch.dtype, through: torch.dtype) -> None:
    model = FFN(dtype, dtype, cast=lambda h: h.to(through))
    assert reason(model, torch.ones(2, 8, dtype=dtype)) is None


@pytest.mark.parametrize(("dtype", "through"), COARSE)
def test_a_cast_that_rounds_or_clips_is_refused(dtype: torch.dtype, through: torch.dtype) -> None:
    model = FFN(dtype, dtype, cast=lambda h: h.to(through).to(dtype))
    assert f"is {through}, coarser than its weights, {dtype}" in str(reason(model, torch.ones(2, 8, dtype=dtype)))
