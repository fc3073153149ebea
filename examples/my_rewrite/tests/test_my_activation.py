"""An activation of one's own is one line in the registry, which matching, fitting and every kernel read."""

import sympy
import torch
from torch import nn

from tardis_fx import Config, calibrate
from tardis_fx.graph.activations import Activation, Z, register
from tardis_fx.testing import assert_equivalent, assert_error_within

register(Activation("lecun_tanh", 1.7159 * sympy.tanh(2 * Z / 3), lambda z: 1.7159 * torch.tanh(2 * z / 3)))


class FFN(nn.Module):
    """With the activation spelt out in arithmetic."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x) * (2 / 3)) * 1.7159)


@torch.no_grad()
def test_an_ffn_with_a_registered_activation_is_found_and_rewritten():
    torch.manual_seed(0)
    model, x = FFN().eval(), torch.randn(32, 64)
    model.up.weight *= 3  # so that neurons saturate
    config = Config(method="guarded_fold", budget=0.7, prefill="rewritten", progress=False)
    plan = calibrate(model, list(torch.randn(4, 600, 64)), config=config)
    assert [(site.activation, site.method) for site in plan.sites] == [("lecun_tanh", "guarded_fold")]
    options = {"plan": plan, "select": "always", "strict": True, "inner": "eager"}
    fast = torch.compile(model, backend="tardis", options=options)
    by_reference, by_kernel = fast(x), torch.cat([fast(few) for few in x.split(4)])  # many tokens at once, and few
    assert_equivalent(by_kernel, by_reference, tolerance=1e-3)  # the kernel reads 8-bit codes in fixed point
    assert_error_within(plan.sites[0], by_kernel, model(x), slack=0.1)
