"""The op that replaces an FFN: a single node for the compiler of the model, with the branch by rows inside.

It has no state: the entry is encoded in a string, and every tensor is an argument. So layers with equal settings
compile to equal graphs, and any process can use a compiled graph that vLLM keeps on disk.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from tardis_fx.graph.feed_forward import dense
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.pipeline import decode_tokens
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.serving.rows import decoding
from tardis_fx.serving.step import query_lengths


@dataclass(frozen=True)
class _Spec:
    """The decoded string of :func:`spec`.

    Attributes:
        run: the rewritten site, a function of the rows and the constants in order.
        activation: of the site.
        original: names of the weights, as in :class:`tardis_fx.graph.site.SiteWeights`.
    """

    run: Callable[..., Tensor]
    activation: str
    original: tuple[str, ...]


def spec(entry: SitePlan, constants: Sequence[str], original: Sequence[str]) -> str:
    """Encodes everything of a site except its tensors, of which it keeps the size of the output's bias.

    Args:
        entry: of the site.
        constants: names of the rewrite's constants, in the order of the op's argument.
        original: names of the original weights, likewise; empty if no row takes the original.
    """
    planned = {"kind": entry.kind, "activation": entry.activation, "method": entry.method, "settings": entry.settings}
    content = {"planned": planned, "bias": list(entry.tensors["bias"].shape) if "bias" in entry.tensors else None}
    return json.dumps(content | {"constants": list(constants), "original": list(original)}, sort_keys=True)


@lru_cache(maxsize=256)
def _read(text: str) -> _Spec:
    content = json.loads(text)
    bias = {} if content["bias"] is None else {"bias": torch.empty(content["bias"], dtype=torch.float32, device="meta")}
    entry = SitePlan(
        fingerprint="", name="", dtype="", shapes=(), dense_bytes=0, tensors=bias, **content["planned"]
    )  # fmt: skip
    few_rows = bool(content["original"])  # which larger steps take
    return _Spec(_traced(entry, content["constants"], few_rows), str(entry.activation), tuple(content["original"]))


def _traced(entry: SitePlan, names: Sequence[str], few_rows: bool) -> Callable[..., Tensor]:
    """Traces the forward of a rewrite to a graph; for few rows, the kernel computes the fold in it."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, *constants = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", *names))
    output = rewrite_named(entry.method).forward(x, dict(zip(names, constants, strict=True)), entry).node  # type: ignore[arg-type, attr-defined]
    graph.output(output)
    if few_rows:
        cpu.take_fold(output)
    return fx.GraphModule({}, graph)


def serve(
    x: Float[Tensor, "*rows d"], constants: list[Tensor], original: list[Tensor], text: str, d_out: int
) -> Float[Tensor, "*rows {d_out}"]:
    """Applies a rewritten FFN to the rows of one step: all leading axes of ``x`` together.

    Args:
        x: inputs.
        constants: made by the rewrite from plan and weights.
        original: weights for rows that take the original, or empty.
        text: from :func:`spec`.
        d_out: output width.
    """
    site = _read(text)
    rows = x.reshape(-1, x.shape[-1])
    if not original:
        return site.run(rows, *constants).view(*x.shape[:-1], d_out)
    weights = dict(zip(site.original, original, strict=True))
    lengths = query_lengths(len(rows))
    decoded = decoding(lengths, decode_tokens(x.device, GuardedFold()))
    if all(decoded):
        out = site.run(rows, *constants)
    elif not any(decoded):
        out = dense(rows, weights, site.activation)
    else:
        mask = np.zeros(len(rows), dtype=bool)
        mask[: sum(lengths)] = np.repeat(decoded, lengths)
        few, many = (torch.from_numpy(np.flatnonzero(m)).to(x.device) for m in (mask, ~mask))
        out = x.new_empty(len(rows), d_out)
        out[few] = site.run(rows[few], *constants)
        out[many] = dense(rows[many], weights, site.activation)
    return out.view(*x.shape[:-1], d_out)


def _fake(x: Tensor, constants: list[Tensor], original: list[Tensor], text: str, d_out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], d_out))


# Kept for the life of the process, because deleting it removes the op.
_LIBRARY = torch.library.Library("tardis", "FRAGMENT")
_LIBRARY.define(
    "serve(Tensor x, Tensor[] constants, Tensor[] original, str text, int d_out) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.impl("serve", serve, "CompositeExplicitAutograd")
torch.library.register_fake("tardis::serve", _fake, lib=_LIBRARY)
