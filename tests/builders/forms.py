"""A module with weights in all shapes, and a forward that a test gives it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

X = torch.linspace(-3, 3, 2 * 3 * 8).sin().view(2, 3, 8)
NO_ACTIVATION = "is not an activation function"


class Model(nn.Module):
    """Weights in all shapes, and a forward of its own."""

    def __init__(self, forward: "Form") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.fused = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 64)
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 32) / 3), nn.Parameter(torch.randn(32, 8) / 6)
        self.b1, self.b2 = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(8))
        self.column = nn.Parameter(torch.randn(32, 1))
        self.at = nn.Parameter(torch.randn(3, 32))
        self.experts1, self.experts2 = nn.Parameter(torch.randn(4, 8, 32)), nn.Parameter(torch.randn(4, 32, 8))
        self.depthwise, self.norm = nn.Conv1d(32, 32, 3, padding=1, groups=32), nn.LayerNorm(32)
        self.point1, self.point2 = nn.Conv1d(8, 32, 1), nn.Conv1d(32, 8, 1)
        self.router, self.narrow, self.small_norm = nn.Linear(8, 4), nn.Linear(32, 4), nn.LayerNorm(8)
        self.one = nn.Linear(8, 1)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


Form = Callable[[Model, Tensor], Any]
