"""Plain FFNs as modules, and random inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Activation(nn.Module):
    """An activation by its name in the registry."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        if self.name == "relu2":
            return F.relu(z).square()
        if self.name == "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        return getattr(F, self.name)(z)  # type: ignore[no-any-return]


ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")


class FFN(nn.Sequential):
    """Up projection, activation, down projection."""

    @property
    def activation(self) -> str:
        """Its name in the registry."""
        assert isinstance(self[1], Activation)
        return self[1].name

    @property
    def up(self) -> nn.Linear:
        """[d] to [hidden]."""
        assert isinstance(self[0], nn.Linear)
        return self[0]

    @property
    def down(self) -> nn.Linear:
        """[hidden] to [d_out]."""
        assert isinstance(self[-1], nn.Linear)
        return self[-1]


def ffn(d: int = 16, hidden: int = 64, activation: str = "gelu", *, bias: bool = True, seed: int = 0) -> FFN:
    """An FFN with random weights; its pre-activations are about normal for normal inputs."""
    torch.manual_seed(seed)
    up, down = nn.Linear(d, hidden, bias=bias), nn.Linear(hidden, d, bias=bias)
    with torch.no_grad():
        for linear in (up, down):
            linear.weight.normal_(0, linear.in_features**-0.5)
            if bias:
                linear.bias.normal_(0, 0.3)
    return FFN(up, Activation(activation), down).eval()


class Block(nn.Module):
    """What a transformer's block is around its FFN: a norm before it and a residual sum after it."""

    def __init__(self, inner: FFN, d: int = 16) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(d), inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return x + self.ffn(self.norm(x))  # type: ignore[no-any-return]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Normal inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
