"""The function of an FFN, written once for plain and gated FFNs and for any representation of their matrices.

A plain FFN is ``act(x W1ᵀ + b1) W2ᵀ + b2``, a gated one ``(act(x Wgᵀ + bg) * (x W1ᵀ + b1)) W2ᵀ + b2`` (arXiv
2002.05202). Gate and W1 multiply the site's input, W2 the neurons' responses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.graph.site import SiteWeights


class Matrix(ABC):
    """Base class of representations that a linear layer can read in place of a matrix, [rows, columns]."""

    @abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the linear layer: x [..., columns] to [..., rows]."""


def multiply(x: Tensor, weight: Tensor | Matrix, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a matrix or a representation of one."""
    return weight.apply(x, bias) if isinstance(weight, Matrix) else F.linear(x, weight, bias)


#: Names of an FFN's matrices, as in :class:`tardis_fx.graph.site.SiteWeights`, and of their biases.
BIASES = {"gate": "gate_bias", "up": "up_bias", "down": "down_bias"}


def matrices(weights: SiteWeights) -> dict[str, Tensor]:
    """The matrices of a site, by name: ``up``, ``down`` and, if it is gated, ``gate``."""
    return {name: w for name in BIASES if (w := getattr(weights, name)) is not None}


def biases(weights: SiteWeights) -> dict[str, Tensor]:
    """The biases of a site, by name."""
    return {name: b for name in BIASES.values() if (b := getattr(weights, name)) is not None}


def narrowed(weights: SiteWeights, neurons: Tensor) -> SiteWeights:
    """Copies the FFN of some of the neurons, [k]; ``down_bias`` stays whole."""
    up, down = weights.up[neurons], weights.down[:, neurons].contiguous()
    rest = {}
    for name in ("up_bias", "gate", "gate_bias"):
        tensor = getattr(weights, name)
        rest[name] = None if tensor is None else tensor[neurons]
    return replace(weights, up=up, down=down, **rest)


def feed_forward(x: Tensor, project: Callable[[Tensor, str], Tensor], activation: str, *, gated: bool) -> Tensor:
    """Applies an FFN given a function for its projections, [..., d] to [..., d_out].

    Args:
        x: [..., d].
        project: applies a projection to a tensor, by the name of its matrix.
        activation: name in the registry.
        gated: whether the FFN has a ``gate``.
    """
    activated = ACTIVATIONS[activation].eager(project(x, "gate" if gated else "up"))
    return project(activated * project(x, "up") if gated else activated, "down")


def dense(x: Tensor, tensors: Mapping[str, Tensor], activation: str) -> Tensor:
    """Applies an FFN of dense matrices, [..., d] to [..., d_out].

    Args:
        x: [..., d].
        tensors: :func:`matrices` and :func:`biases` of the FFN.
        activation: name in the registry.
    """
    return feed_forward(x, lambda x, name: linear(x, tensors, name), activation, gated="gate" in tensors)


def linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Applies one projection: its matrix, and its bias if there is one."""
    return multiply(x, tensors[name], tensors.get(BIASES[name]))
