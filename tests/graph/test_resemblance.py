"""Blocks that only resemble an FFN are listed with the reason; others are not listed."""

import pytest
import torch
from builders.forms import NO_ACTIVATION, Form, Model, X
from torch import Tensor
from torch.nn import functional as F

from tardis_fx.testing.capture import sites_of

gelu = F.gelu

RESEMBLING: dict[str, tuple[Form, str]] = {
    "a norm": (lambda m, x: m.down(m.norm(gelu(m.up(x)))), "layer_norm"),
    "a norm spelt out": (
        lambda m, x: m.down((h := gelu(m.up(x))) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "mean",
    ),
    "a softmax": (lambda m, x: m.down(torch.softmax(m.up(x), -1)), "softmax"),
    "a sum over tokens": (lambda m, x: m.down(gelu(m.up(x)).cumsum(0)), "cumsum"),
    "neurons in another order": (lambda m, x: m.down(gelu(m.up(x)).flip(-1)), "flip"),
    "an activation of a part": (
        lambda m, x: m.down(torch.cat([gelu((h := m.up(x))[..., :16]), h[..., 16:]], -1)),
        "cat",
    ),
    "a convolution": (lambda m, x: m.down(gelu(m.depthwise(m.up(x).mT).mT)), "stands between"),
    "projections that are convolutions": (lambda m, x: m.point2(gelu(m.point1(x.mT))).mT, "is a convolution"),
    "the input": (lambda m, x: m.down(gelu(m.up(x)) + x.repeat(1, 1, 4)), "is combined with"),
    "a mask that was given": (lambda m, x: m.down(gelu(m.up(x)) * (x[..., :1] > 0)), "is combined with"),
    "one number of a parameter": (lambda m, x: m.down(gelu(m.up(x)) * m.b2[0]), NO_ACTIVATION),
    "experts in a batch": (
        lambda m, x: torch.bmm(gelu(torch.bmm(x[:1].expand(4, 3, 8), m.experts1)), m.experts2),
        "tokens are routed",
    ),
    "experts by einsum": (
        lambda m, x: torch.einsum("eth,ehd->etd", gelu(torch.einsum("td,edh->eth", x[0], m.experts1)), m.experts2),
        "tokens are routed",
    ),
    "an expert of a stack": (lambda m, x: gelu(x @ m.experts1[1]) @ m.experts2[1], "tokens are routed"),
    "an expert for each token": (
        lambda m, x: torch.bmm(
            m.experts2.mT[i := m.router(x[0]).argmax(-1)],
            gelu(torch.bmm(m.experts1.mT[i], x[0].unsqueeze(-1)).squeeze(-1)).unsqueeze(-1),
        ).squeeze(-1),
        "tokens are routed",
    ),
}


@pytest.mark.parametrize("name", RESEMBLING)
def test_a_block_that_resembles_an_ffn_is_listed_with_the_reason(name: str) -> None:
    form, reason = RESEMBLING[name]
    (site,) = sites_of(Model(form), X)
    assert reason in str(site.reason)


def _attend(m: Model, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.up(x), x @ m.w1, F.linear(x, m.up.weight))


NO_FFN: dict[str, Form] = {
    "attention wider than its input": lambda m, x: m.down(_attend(m, x)),
    "gated attention": lambda m, x: m.down(_attend(m, x) * torch.sigmoid(m.up(x))),
    "a recurrence": lambda m, x: m.down(torch.linalg.solve(m.up(x).mT @ m.up(x) + torch.eye(32), gelu(m.up(x)).mT).mT),
    "two projections in a row, and a third": lambda m, x: (m.down(h := m.up(x)), m.narrow(h)),
    "a norm of a sum of branches": lambda m, x: m.narrow(m.norm(m.up(x) + m.up(x * 2))),
    "a residual stream": lambda m, x: m.narrow(m.norm(m.up(x) + x.repeat(1, 1, 4))),
    "a residual stream before a square projection": lambda m, x: m.router(
        m.small_norm(x + m.down(gelu(x @ m.w1)).sin())
    ),
}


@pytest.mark.parametrize("name", NO_FFN)
def test_a_block_that_is_not_an_ffn_is_not_listed(name: str) -> None:
    model = Model(NO_FFN[name])
    assert [site.down.weight.name for site in sites_of(model, X) if site.reason] == []
