"""Unfuses the single op of ``nn.TransformerEncoderLayer`` in eval mode, so that its FFN can be found."""

from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.forms import call, call_name


def is_fused(node: fx.Node) -> bool:
    """Whether a node is a fused encoder layer."""
    return call_name(node) == "_transformer_encoder_layer_fwd" and len(node.args) >= 18


def unfuse(graph: fx.Graph) -> None:
    """Replaces every fused encoder layer without a mask by attention, norms and FFN.

    Args:
        graph: of a Dynamo graph module: nodes carry ``meta["example_value"]``, and the new ones do too.
    """
    for node in [n for n in graph.nodes if is_fused(n) and all(mask is None for mask in n.args[18:]) and not n.kwargs]:
        before = set(graph.nodes)
        tracer = fx.proxy.GraphAppendingTracer(graph)
        args: list[Any] = [fx.Proxy(a, tracer) if isinstance(a, fx.Node) else a for a in node.args[:18]]
        with graph.inserting_before(node):
            result: fx.Node = _layer(*args).node  # type: ignore[attr-defined]
        fake_mode = node.meta["example_value"].fake_mode
        for new in graph.nodes:
            if new not in before:
                values = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["example_value"])
                with fake_mode:
                    new.meta["example_value"] = call(new, *values)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _layer(
    x: Tensor, embed_dim: int, heads: int, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    gelu: bool, norm_first: bool, eps: float, norm1_weight: Tensor, norm1_bias: Tensor, norm2_weight: Tensor,
    norm2_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor,
) -> Tensor:  # fmt: skip
    """``nn.TransformerEncoderLayer.forward``, unfused: x [batch, tokens, embed_dim] to the same shape."""

    def norm1(y: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(y: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(y: Tensor) -> Tensor:
        parts = F.linear(y, in_weight, in_bias).chunk(3, -1)
        query, key, value = (parts[i].unflatten(-1, (heads, embed_dim // heads)).transpose(1, 2) for i in range(3))
        attended = F.scaled_dot_product_attention(query, key, value)
        return F.linear(attended.transpose(1, 2).flatten(2), out_weight, out_bias)

    def feed_forward(y: Tensor) -> Tensor:
        hidden = F.linear(y, up_weight, up_bias)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), down_weight, down_bias)

    if norm_first:
        x = x + attend(norm1(x))
        return x + feed_forward(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed_forward(x))
