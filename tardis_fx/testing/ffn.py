"""Plain and gated FFNs as modules, and random inputs for them."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Activation(nn.Module):
    """An activation by its name in the registry."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Float[Tensor, "*batch h"]) -> Float[Tensor, "*batch h"]:
        """Applies the activation elementwise."""
        if self.name == "relu2":
            return F.relu(z).square()
        if self.name == "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        return getattr(F, self.name)(z)  # type: ignore[no-any-return]


ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")


class FFN(nn.Sequential):
    """A plain FFN: up projection, activation, down projection."""

    @property
    def activation(self) -> str:
        """Name of the activation in the registry."""
        assert isinstance(self[1], Activation)
        return self[1].name

    @property
    def up(self) -> nn.Linear:
        """The up projection, [d] to [hidden]."""
        assert isinstance(self[0], nn.Linear)
        return self[0]

    @property
    def down(self) -> nn.Linear:
        """The down projection, [hidden] to [d_out]."""
        assert isinstance(self[-1], nn.Linear)
        return self[-1]


class GatedFFN(nn.Module):
    """A gated FFN: the activated gate times the up projection, then the down projection.

    Attributes:
        gate_up: gate and up projection, or one fused projection that is cut in halves, the gate first.
        down: [hidden] to [d_out].
    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, activation: Activation, down: nn.Linear, *, fused: bool) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList([_stacked(gate, up)] if fused else [gate, up])
        self._activation, self.down = activation, down

    @property
    def activation(self) -> str:
        """Name of the activation in the registry."""
        return self._activation.name

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_out"]:
        """Applies the FFN."""
        z = [linear(x) for linear in self.gate_up]
        gate, up = z if len(z) == 2 else z[0].chunk(2, -1)
        return self.down(self._activation(gate) * up)  # type: ignore[no-any-return]


def _stacked(gate: nn.Linear, up: nn.Linear) -> nn.Linear:
    """One projection that concatenates the outputs of two."""
    fused = nn.Linear(gate.in_features, 2 * gate.out_features, bias=gate.bias is not None)
    with torch.no_grad():
        for parameter, first, second in zip(fused.parameters(), gate.parameters(), up.parameters(), strict=True):
            parameter.copy_(torch.cat([first, second]))
    return fused


def ffn(d: int = 16, hidden: int = 64, activation: str = "gelu", *, bias: bool = True, seed: int = 0) -> FFN:
    """An FFN with random weights, whose pre-activations are about normal for normal inputs."""
    up, down = _projections((d, hidden), (hidden, d), bias=bias, seed=seed)
    return FFN(up, Activation(activation), down).eval()


def gated_ffn(
    d: int = 16, hidden: int = 64, activation: str = "silu", *, bias: bool = True, fused: bool = False, seed: int = 0
) -> GatedFFN:
    """A gated FFN with random weights, the same whether gate and up are fused or not."""
    gate, up, down = _projections((d, hidden), (d, hidden), (hidden, d), bias=bias, seed=seed)
    return GatedFFN(gate, up, Activation(activation), down, fused=fused).eval()


def _projections(*sizes: tuple[int, int], bias: bool, seed: int) -> list[nn.Linear]:
    torch.manual_seed(seed)
    linears = [nn.Linear(columns, rows, bias=bias) for columns, rows in sizes]
    with torch.no_grad():
        for linear in linears:
            linear.weight.normal_(0, linear.in_features**-0.5)
            if bias:
                linear.bias.normal_(0, 0.3)
    return linears


class Block(nn.Module):
    """A transformer block around an FFN: a norm before it and a residual sum after it."""

    def __init__(self, inner: FFN | GatedFFN, d: int = 16) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(d), inner
        self.eval()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Applies the block."""
        return x + self.ffn(self.norm(x))  # type: ignore[no-any-return]


def inputs(*shape: int, seed: int = 1) -> Float32[Tensor, "*shape"]:
    """Normally distributed inputs of the given shape."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu")
