"""Linear layers outside of FFNs: which are found, and that no FFN's projection is one of them."""

from typing import Any

import pytest
import torch
import transformers as hf
from builders.profile import examples
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tardis_fx.graph import linear_layers
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.graph.unfuse import unfuse
from tardis_fx.testing.capture import capture
from tardis_fx.testing.graphs import Drawn, graphs

IDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = IDS | {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = torch.arange(10).view(2, 5) + 3


def linear(model: nn.Module, *args: Any) -> list[Site]:
    """The linear layers of a model, whose FFNs must be those that are found without them."""
    captured = capture(model, *args)
    with torch.no_grad():
        sites = find_sites(captured.gm.graph, linear=True)
    ffns = len(captured.sites)
    assert [(s.name, s.reason) for s in sites[:ffns]] == [(s.name, s.reason) for s in captured.sites]
    assert all(site.kind == "linear" for site in sites[ffns:])
    return sites[ffns:]


def names(sites: list[Site]) -> list[str]:
    assert not [site.reason for site in sites if site.reason]
    return [site.name for site in sites]


def test_gpt2_has_fused_projections_and_a_head_of_the_embeddings_table() -> None:
    config = hf.GPT2Config(**IDS, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    sites = linear(hf.GPT2LMHeadModel(config).eval(), TOKENS)
    layers = [f"transformer.h.{i}.attn.{name}" for i in range(2) for name in ("c_attn", "c_proj")]
    assert names(sites) == [*layers, "transformer.wte"]
    assert [site.up.sizes for site in sites] == [*[(64, 192), (64, 64)] * 2, (64, 96)]
    assert [site.up.transposed for site in sites] == [True] * 4 + [False]
    assert sites[1].function == "None, up transposed"  # a square matrix could be either


@pytest.mark.parametrize("tied", [False, True])
def test_llama_has_four_projections_and_a_head(tied: bool) -> None:
    config = hf.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=tied)
    sites = linear(hf.LlamaForCausalLM(config).eval(), TOKENS)
    layers = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]
    assert names(sites) == [*layers, "model.embed_tokens" if tied else "lm_head"]
    assert all(site.input is sites[0].input for site in sites[:3])


def test_an_encoder_has_four_projections_and_a_pooler() -> None:
    sites = linear(hf.BertModel(hf.BertConfig(**SHAPE)).eval(), TOKENS)
    parts = ("self.query", "self.key", "self.value", "output.dense")
    layers = [f"encoder.layer.{i}.attention.{part}" for i in range(2) for part in parts]
    assert names(sites) == [*layers, "pooler.dense"]


def test_a_layer_that_torch_fuses_in_eval_mode_is_found() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    graph = capture(model, torch.randn(2, 3, 64)).gm.graph
    unfuse(graph)
    with torch.no_grad():
        ffn, *sites = find_sites(graph, linear=True)
    assert ffn.kind == "plain"
    assert names(sites) == ["layers.0.self_attn", "layers.0.self_attn.out_proj"]


@settings(max_examples=examples(100))
@given(graphs())
def test_no_projection_of_an_ffn_is_a_linear_layer_and_no_other_is_missed(drawn: Drawn) -> None:
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_layers, "LEAST", 1)
        ffns, sites = find_sites(drawn.graph), find_sites(drawn.graph, linear=True)
    assert sites[: len(ffns)] == ffns
    inside = {node for site in ffns for node in (*site.inner, site.output)}
    for site in sites[len(ffns) :]:
        assert site.kind == "linear"
        assert inside.isdisjoint({*site.inner, site.output})
    products = {p.product for s in sites for p in (s.up, s.down, s.gate) if p is not None}
    multiplying = {
        n for n in drawn.graph.nodes if getattr(n.target, "__name__", "") in ("linear", "addmm", "tensordot")
    }
    assert multiplying <= products | inside


class Layers(nn.Module):
    """A layer, and others that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.narrow, self.few = nn.Linear(64, 64), nn.Linear(64, 63), nn.Linear(63, 64)
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.few(torch.sin(self.narrow(self.layer(x)))) @ y  # type: ignore[no-any-return]


def test_small_layers_and_products_with_inputs_are_no_sites() -> None:
    assert names(linear(Layers().eval(), torch.randn(3, 64), torch.randn(64, 64))) == ["layer"]


class Unknown(nn.Module):
    """An FFN of an activation that is not registered, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.up(F.layer_norm(self.before(x), (64,)))))  # type: ignore[no-any-return]


def test_projections_of_a_refused_ffn_are_no_linear_layers() -> None:
    assert names(linear(Unknown().eval(), torch.randn(3, 64))) == ["before"]


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_weight_that_the_graph_computes_is_listed_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    parametrize.register_parametrization(model[0], "weight", Twice())
    (site,) = linear(model, torch.randn(3, 64))
    assert site.name == "0"
    assert "computed in the graph" in str(site.reason)


class Checkpointed(nn.Module):
    """A layer in a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_a_layer_in_a_graph_of_its_own_is_listed_with_the_reason() -> None:
    (site,) = linear(Checkpointed().eval(), torch.randn(3, 64))
    assert (site.name, site.reason) == (
        "layer", "it is computed inside tag_activation_checkpoint, in a graph of its own"
    )  # fmt: skip


class Mixed(nn.Module):
    """A layer whose input has another dtype than its weight once the bias is added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_bias_of_another_dtype_is_the_reason() -> None:
    (site,) = linear(Mixed().eval(), torch.randn(3, 64))
    assert site.reason == "its bias is torch.bfloat16, but its weight is torch.float32"


def test_the_weights_of_a_linear_layer_count_once() -> None:
    model = nn.Linear(64, 80).eval()
    (site,) = linear(model, torch.randn(3, 64))
    weights = SiteWeights.from_site(site, list(model.parameters()))
    assert weights.bytes == 4 * weights.count == 4 * (64 * 80 + 80)
    assert torch.equal(weights.up, model.weight)
    assert weights.up_bias is not None
    assert weights.down.shape == (0, 80)
