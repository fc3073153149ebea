"""Whether the output of an FFN is normalised before anything is added to it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx.testing.capture import sites_of

X = torch.linspace(-3, 3, 2 * 3 * 8).sin().view(2, 3, 8)


class Layer(nn.Module):
    """A plain FFN and what its layer does with the input and the output."""

    def __init__(self, after: Callable[["Layer", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.RMSNorm(8)
        self._after = after

    def forward(self, x: Tensor) -> Tensor:
        return self._after(self, x, self.down(F.gelu(self.up(x))))


def by_hand(y: Tensor) -> Tensor:
    """RMSNorm as models spell it."""
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def normalised(after: Callable[[Layer, Tensor, Tensor], Tensor]) -> bool:
    (site,) = sites_of(Layer(after).eval(), X)
    assert site.reason is None
    return site.normalised


@pytest.mark.parametrize(
    "after",
    {
        "torch's": lambda m, x, y: x + m.norm(y),
        "torch's, behind a cast": lambda m, x, y: x + m.norm(y.double().float()),
        "by hand": lambda m, x, y: x + by_hand(y),
        "its type is read for what is added": lambda m, x, y: x.type_as(y) + m.norm(y),
        "by hand, behind a cast": lambda m, x, y: x + by_hand(y.double()).float(),
        "by hand, behind a view": lambda m, x, y: x + by_hand(y.view(6, 8)).view(2, 3, 8),
        "a layer norm": lambda m, x, y: x + F.layer_norm(y, (8,)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_an_output_with_a_norm_before_the_residual_addition_is_normalised(
    after: tuple[str, Callable[[Layer, Tensor, Tensor], Tensor]],
) -> None:
    assert normalised(after[1])


@pytest.mark.parametrize(
    "after",
    {
        "added": lambda m, x, y: x + y,
        "added, in place": lambda m, x, y: y.add_(x),
        "added behind a cast": lambda m, x, y: x + y.double(),
        "normalised after the addition": lambda m, x, y: m.norm(x + y),
        "normalised and added": lambda m, x, y: y + m.norm(y),
        "returned": lambda m, x, y: y,
        "multiplied": lambda m, x, y: y * 0.5,
    }.items(),
    ids=lambda pair: pair[0],
)
def test_an_output_that_is_added_or_returned_is_not_normalised(
    after: tuple[str, Callable[[Layer, Tensor, Tensor], Tensor]],
) -> None:
    assert not normalised(after[1])
