"""An FFN is listed whatever its activation is, with the name of the operation that is not known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from builders.forms import Model, X
from builders.models import VOCABULARY, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx.testing.capture import capture, sites_of


@torch.library.custom_op("tardis_test::swish", mutates_args=())
def _swish(x: Tensor) -> Tensor:
    return F.silu(x)


@_swish.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tardis_test::gated_pair", mutates_args=())
def _gated_pair(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


@_gated_pair.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tardis_test::gated_halves", mutates_args=())
def _gated_halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@_gated_halves.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("tardis_test::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _opaque(x: Tensor) -> Tensor:
    return F.silu(x)


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 3)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "prelu": (nn.PReLU(), "prelu"),
    "prelu by token": (nn.PReLU(3), "prelu"),
    "rrelu": (nn.RReLU().eval(), "rrelu"),
    "logsigmoid": (nn.LogSigmoid(), "log_sigmoid"),
    "elu": (nn.ELU(), "elu"),
    "celu": (nn.CELU(), "celu"),
    "selu": (nn.SELU(), "selu"),
    "softplus": (nn.Softplus(), "softplus"),
    "softsign": (nn.Softsign(), "softsign"),
    "softshrink": (nn.Softshrink(), "softshrink"),
    "hardshrink": (nn.Hardshrink(), "hardshrink"),
    "hardtanh": (nn.Hardtanh(), "hardtanh"),
    "hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "tanhshrink": (nn.Tanhshrink(), "tanhshrink"),
    "threshold": (nn.Threshold(0.1, 0), "threshold"),
    "relu6": (nn.ReLU6(), "hardtanh"),
    "sine": (torch.sin, "sin"),
    "hyperbolic sine": (torch.sinh, "sinh"),
    "rounded": (torch.round, "round"),
    "no number": (torch.nan_to_num, "nan_to_num"),
    "special": (torch.special.i0, "special_i0"),
    "a lesser": (lambda h: torch.min(h, torch.tensor(3.0)), "min"),
    "a custom op": (_swish, "swish"),
    "an opaque function": (_opaque, "_opaque"),
    "an autograd function": (_Capped.apply, "clamp"),
    "a checkpoint": (
        lambda h: torch.utils.checkpoint.checkpoint(F.silu, h, use_reentrant=False),
        "tag_activation_checkpoint",
    ),
    "a mean kept out": (lambda h: torch.relu(h - h.mean(-1, keepdim=True)), "mean"),
    "a fifth kept": (lambda h: torch.relu(h - (h.mean(-1, True) + torch.tensor(0.8).erfinv() * h.std(-1, keepdim=True))), "mean"),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_activation_that_is_not_known_is_named(name: str, dynamic: bool) -> None:
    activation, op = UNKNOWN[name]
    (site,) = sites_of(Activated(activation), X, dynamic=dynamic)
    assert op in str(site.reason)


class Activated(nn.Module):
    """An FFN with any activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(8, 32), activation, nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


def test_a_number_of_tokens_is_no_constant_of_an_activation() -> None:
    model = Activated(lambda h: F.silu(h) * (h.shape[0] // 2))
    assert [site.reason for site in sites_of(model, X, dynamic=False)] == [None]
    (site,) = sites_of(model, X, dynamic=True)
    assert "not in the registry" in str(site.reason)


def test_an_autograd_function_that_records_gradients_is_named() -> None:
    (site,) = sites_of(Activated(_Capped.apply), X, grad=True)
    assert "autograd_function_apply" in str(site.reason)


GATES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "gated_pair": lambda m, x: m.down(_gated_pair(m.up(x), x @ m.w1)),
    "gated_halves": lambda m, x: m.down(_gated_halves(m.fused(x))),
    "prelu": lambda m, x: m.down(torch.prelu(m.up(x), m.b1[:3]) * (x @ m.w1)),
    "the computation between": lambda m, x: m.down(F.silu(m.up(x)) * (x @ m.w1) * F.linear(x, m.fused.weight[:32])),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", GATES)
def test_a_gate_that_is_not_known_is_named(op: str, dynamic: bool) -> None:
    (site,) = sites_of(Model(GATES[op]), X, dynamic=dynamic)
    assert op in str(site.reason)


def test_an_intermediate_that_is_read_elsewhere_hides_nothing() -> None:
    (site,) = sites_of(Model(lambda m, x: (m.down(h := torch.prelu(m.up(x), m.b1[:1])), h.sum())), X)
    assert "prelu" in str(site.reason)


NO_FFN: dict[str, Callable[[Model, Tensor], Any]] = {
    "an op of attention": lambda m, x: m.down(_attend(m.up(x), x @ m.w1, F.linear(x, m.up.weight))),
    "a product of two": lambda m, x: m.down((m.up(x) @ (x @ m.w1).mT) @ m.up(x)),
    "a recurrence": lambda m, x: m.down(m.lstm(m.up(x))[0]),  # type: ignore[operator]  # the test adds it
    "an op on a residual stream": lambda m, x: m.narrow(_swish(m.up(x) + x.repeat(1, 1, 4))),
}


@pytest.mark.parametrize("name", NO_FFN)
def test_a_block_that_is_not_an_ffn_is_not_listed(name: str) -> None:
    model = Model(NO_FFN[name])
    model.lstm = nn.LSTM(32, 32)
    torch._dynamo.config.allow_rnn = True
    try:
        assert sites_of(model, X) == []
    finally:
        torch._dynamo.config.allow_rnn = False


# ---- Adapters


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it, as PEFT writes it."""

    def __init__(self, base: nn.Linear, adapters: int = 1) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.ModuleList(nn.Linear(base.in_features, 2, bias=False) for _ in range(adapters))
        self.b = nn.ModuleList(nn.Linear(2, base.out_features, bias=False) for _ in range(adapters))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for a, b in zip(self.a, self.b, strict=True):
            result = result + b(a(self.dropout(x.to(next(a.parameters()).dtype)))) * 2.0
        return result.to(x.dtype)  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("where", ["gate", "up", "down", "gate up", "up down", "gate up down"])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_named_in_the_reason(where: str, adapters: int, training: bool) -> None:
    model = Gated()
    for name in where.split():
        setattr(model, name, Adapted(getattr(model, name), adapters))
    (site,) = sites_of(model.train(training), X)
    reasons = [f"an adapter (LoRA) adds to {n}: merge it (merge_and_unload) before calibrating" for n in where.split()]
    assert site.reason in reasons


@pytest.mark.parametrize("where", ["up", "down"])
def test_an_adapter_of_a_plain_ffn_is_named_in_the_reason(where: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    i = {"up": 0, "down": 2}[where]
    model[i] = Adapted(model[i]).eval()  # type: ignore[arg-type]
    (site,) = sites_of(model, X)
    assert f"an adapter (LoRA) adds to {i}: merge it" in str(site.reason)


# ---- Architectures

_GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "intermediate_size": 64,
    "num_key_value_heads": 1,
}  # fmt: skip


def test_apertus_is_listed_with_its_activation() -> None:
    model = hf.ApertusModel(hf.ApertusConfig(**_GROUPED)).eval()
    sites = capture(model, tokens(2, 5) % 61 + 3).sites
    assert [site.name for site in sites] == ["layers.0.mlp", "layers.1.mlp"]
    assert all("is not an activation function" in str(site.reason) for site in sites)


def test_sparse_layers_of_gemma3n_are_listed() -> None:
    config = hf.Gemma3nTextConfig(
        **(_GROUPED | {"intermediate_size": [64, 64]}), head_dim=16, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.95, 0.0], layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    sites = capture(hf.models.gemma3n.modeling_gemma3n.Gemma3nTextModel(config).eval(), tokens(2, 5) % 61 + 3).sites
    reasons = {site.name: site.reason for site in sites}
    assert "mean stands between its projections" in str(reasons["layers.0.mlp"])
    assert reasons["layers.1.mlp"] is None


# ---- Activations that differ from a known one where no grid looks

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a bump": lambda h: torch.relu(h) + (h > 0.0051).float() * (h < 0.0052).float(),
    "a bump of a shifted value": lambda h: torch.relu(h) + (2 * h + 1 > 1.0101).float() * (2 * h + 1 < 1.0102).float(),
    "a bump of a square": lambda h: torch.where((h - 1.0061) ** 2 < 1e-8, 7, torch.relu(h)),
    "a bump far out": lambda h: torch.where((h - 3e5).abs() < 1, 0, torch.relu(h)),
    "a clip far out": lambda h: F.silu(h).clamp(max=448.0),
}
UP: dict[str, Callable[[Tensor], Tensor]] = {
    "a bump": lambda u: torch.where((u - 0.7).abs() < 1e-4, 0, u),
    "a clip far out": lambda u: u.clamp(-1e5, 1e5),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_values_around_the_comparisons_of_the_graph_are_checked(name: str) -> None:
    (site,) = sites_of(Activated(HIDDEN[name]), X)
    assert "not in the registry" in str(site.reason)


@pytest.mark.parametrize("name", UP)
def test_values_around_the_comparisons_of_the_up_projection_are_checked(name: str) -> None:
    (site,) = sites_of(Model(lambda m, x: m.down(F.silu(m.up(x)) * UP[name](x @ m.w1))), X)
    assert "not in the registry" in str(site.reason)
