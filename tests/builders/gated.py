"""Gated FFNs, their matrices apart or fused."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tardis_fx.observation.site import ObservedSite
from tardis_fx.testing.building import Graph
from tardis_fx.testing.observation import observed_site, site_of

FUNCTIONS: dict[str, Callable[..., Any]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}


class Gated(nn.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(
        self, d: int = 16, hidden: int = 48, activation: str = "silu", *, bias: bool = True, fused: bool = False,
        d_out: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        gate, up = nn.Linear(d, hidden, bias), nn.Linear(d, hidden, bias)
        for projection in (gate, up):  # large enough for the activation to bend
            projection.weight.data *= 2
        self.down = nn.Linear(hidden, d_out or d, bias)
        self.activation = FUNCTIONS[activation]
        if fused:
            self.both = nn.Linear(d, 2 * hidden, bias)
            self.both.weight.data = torch.cat([gate.weight, up.weight]).detach()
            if bias:
                self.both.bias.data = torch.cat([gate.bias, up.bias]).detach()
        else:
            self.gate, self.up = gate, up
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if hasattr(self, "both") else (self.gate(x), self.up(x))
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]


def observed(model: Gated) -> ObservedSite:
    """The site of a model with matrices apart, as the matcher sees it."""
    g = Graph()
    x = g.input(1, model.gate.in_features)

    def linear(x: fx.Node, module: nn.Linear) -> fx.Node:
        bias = () if module.bias is None else (g.parameter(*module.bias.shape),)
        return g.call(F.linear, x, g.parameter(*module.weight.shape), *bias)

    activated = g.call(model.activation, linear(x, model.gate))
    g.graph.output(linear(g.call(torch.mul, activated, linear(x, model.up)), model.down))
    modules = model.gate, model.up, model.down
    parameters = [p.detach() for module in modules for p in (module.weight, module.bias) if p is not None]
    return observed_site(site_of(g), parameters)
