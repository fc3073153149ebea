"""FFNs in graphs of their own and in fused ops are listed with their weights, and refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.exact import run
from builders.ffns import ffn, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

X = inputs(2, 3, 16)


@torch.compiler.nested_compile_region
def _region(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


NESTED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "checkpoint": (lambda m, x: checkpoint(m, x, use_reentrant=False), "tag_activation_checkpoint"),
    "reentrant checkpoint": (lambda m, x: checkpoint(m, x, use_reentrant=True), "tag_activation_checkpoint"),
    "cond": (lambda m, x: torch.cond(x.sum() > 0, lambda y: m(y) + 0, lambda y: y + 1, (x,)), "cond"),
    "region, run twice": (lambda m, x: _region(m, _region(m, x)), "invoke_subgraph"),
    "checkpoint in a checkpoint": (
        lambda m, x: checkpoint(lambda y: checkpoint(m, y, use_reentrant=False), x, use_reentrant=False),
        "tag_activation_checkpoint",
    ),
}


class Nested(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.ffn, self.plain, self.call = ffn(), ffn(seed=1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.call(self.ffn, x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant one
@pytest.mark.parametrize("name", NESTED)
def test_a_site_in_a_graph_of_its_own_is_listed_with_its_weights_and_refused(name: str) -> None:
    call, op = NESTED[name]
    model = Nested(call).eval()
    backend = run(model, X)
    *nested, plain = backend.sites
    assert len(nested) == 1 + ("twice" in name)
    assert (plain.name, plain.reason) == ("plain", None)
    for site in nested:
        assert (site.name, site.activation) == ("ffn", "gelu")
        assert site.reason == f"it is computed inside {op}, in a graph of its own"
        assert {node.op for node in site.parameters} == {"placeholder"}
        assert {node.graph for node in site.parameters} == {node.graph for node in plain.parameters}


def _encoder(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, **({"batch_first": True} | changed))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_fused_encoder_layer_is_unfused_and_rewritten(norm_first: bool, activation: str, dynamic: bool) -> None:
    model = _encoder(norm_first=norm_first, activation=activation)
    backend = run(model, X, dynamic=dynamic)  # asserts that the outputs are eager's
    assert [(s.name, s.activation, s.reason) for s in backend.sites] == [
        (f"layers.{i}", activation, None) for i in range(2)
    ]
    assert backend.rewritten == 2


def test_a_fused_encoder_layer_with_a_mask_is_refused_with_the_remedy() -> None:
    model, mask = _encoder(), torch.tensor([[False, False, True]] * 2)
    call = lambda x: model(x, src_key_padding_mask=mask)  # noqa: E731
    backend = run(call, X)
    assert all("torch.backends.mha.set_fastpath_enabled(False)" in str(s.reason) for s in backend.sites)
    assert len(backend.sites) == 2
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch._dynamo.reset()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        assert run(call, X).rewritten == 2
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_encoder_and_decoder_layers_that_are_not_fused_are_rewritten() -> None:
    assert run(_encoder(batch_first=False), X).rewritten == 2
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True).eval()
    assert run(decoder, X, X).rewritten == 1
