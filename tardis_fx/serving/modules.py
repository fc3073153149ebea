"""Modules that replace those of an FFN, so that the model's own ``forward`` computes the rewritten FFN.

The layers before the activation, and the activation, pass the input through; the last layer receives it and computes
everything.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from tardis_fx.plan import SitePlan
from tardis_fx.serving import op


class Through(nn.Module):
    """Replaces a layer before the activation; returns its input in the form of the layer's output."""

    def __init__(self, *, return_bias: bool) -> None:
        """Takes the option of the replaced layer."""
        super().__init__()
        self.return_bias = return_bias

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"] | tuple[Tensor, None]:
        """Returns x, without a remaining bias to add."""
        return (x, None) if self.return_bias else x


class RewrittenFFN(nn.Module):
    """Replaces the last layer by the whole FFN, whose output includes all biases."""

    def __init__(
        self,
        entry: SitePlan,
        constants: Mapping[str, Tensor],
        original: Mapping[str, Tensor],
        *,
        d_out: int,
        return_bias: bool,
        reduce: bool,
    ) -> None:
        """Stores the constants of the rewrite and the weights for rows that take the original as buffers.

        With ``return_bias`` vLLM's layer returns a pair; with ``reduce`` it sums over the tensor-parallel ranks.
        """
        super().__init__()
        self.return_bias, self.reduce, self.d_out = return_bias, reduce, d_out
        self.spec = op.spec(entry, list(constants), list(original))
        self._constants = [self._keep(f"constant_{name}", value) for name, value in constants.items()]
        self._original = [self._keep(f"original_{name}", value) for name, value in original.items()]

    def _keep(self, name: str, value: Tensor) -> str:
        self.register_buffer(name, value, persistent=False)
        return name

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"] | tuple[Tensor, None]:
        """Applies the FFN."""
        constants = [getattr(self, name) for name in self._constants]
        original = [getattr(self, name) for name in self._original]
        out = torch.ops.tardis.serve(x, constants, original, self.spec, self.d_out)
        if self.reduce:
            out = tensor_model_parallel_all_reduce(out)
        return (out, None) if self.return_bias else out

    def extra_repr(self) -> str:
        """Details for printing the module."""
        return f"d_out={self.d_out}, reduce={self.reduce}, spec={self.spec}"
