"""A site: one feed-forward network, or one linear layer outside of them, found in a graph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

Kind = Literal["plain", "gated", "linear"]


@dataclass(frozen=True)
class Projection:
    """One matrix multiplication by a weight, with its bias.

    Attributes:
        node: the node whose value is ``input @ weight (+ bias)``.
        product: the node that multiplies: ``node`` itself unless it only adds the bias.
        input: node of the activations, [..., columns in].
        weight: node of the stored weight.
        bias: node of the bias, [columns out], or None.
        transposed: the weight is stored [in, out] (``addmm``, ``matmul``) and not [out, in] (``linear``).
        reason: why no rewrite may take this form of projection, or None.
    """

    node: fx.Node
    product: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    reason: str | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns in and columns out; those of one expert for stacked weights, hints for symbolic sizes."""
        shape = self.weight.meta["example_value"].shape
        *stack, rows, columns = (optimization_hint(size, fallback=0) for size in shape)
        if stack and columns == 1:  # a convolution: [out, in, kernel]
            (rows,), columns = stack, rows
        return (rows, columns) if self.transposed else (columns, rows)

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        """The nodes of weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Site:
    """One FFN of a graph: ``down(activation(up(input)))``, or ``down(activation(gate(input)) * up(input))``.

    A linear layer outside of FFNs is a site of its own kind: ``up(input)``.

    Attributes:
        name: module path shared by the weights, as in ``model.named_modules()`` if the graph knows it.
        kind: plain, gated or linear.
        activation: name in the registry of activations, or None if it is not registered.
        up: first projection; in a gated site, the one without the activation; the linear layer itself.
        down: last projection; ``up`` itself of a linear layer.
        gate: the projection with the activation in a gated site; ``up`` itself if both are one fused matrix.
        gate_half: index of the half of a fused matrix's columns out that is the gate, 0 or 1; else None.
        inner: all nodes strictly between input and output, ``up`` and ``gate`` included.
        reason: why the site cannot be rewritten, or None.
        affine: slope and intercept of the activation if it is an affine function, else None.
        bounds: lower and upper bound of the input's elements, as far as the graph shows them.
        normalised: the output is normalised before anything is added to it.
    """

    name: str
    kind: Kind
    activation: str | None
    up: Projection
    down: Projection
    gate: Projection | None
    inner: frozenset[fx.Node]
    reason: str | None = None
    affine: tuple[float, float] | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    gate_half: int | None = None
    normalised: bool = False

    @property
    def input(self) -> fx.Node:
        """Node of the activations that enter the site, [..., d]."""
        return self.up.input

    @property
    def output(self) -> fx.Node:
        """Node of the site's result, [..., d_out]."""
        return self.down.node

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        """The nodes of all weights and biases of the site, in a fixed order."""
        gate = () if self.gate is None or self.gate is self.up else self.gate.parameters
        down = () if self.down is self.up else self.down.parameters
        return (*gate, *self.up.parameters, *down)

    @property
    def function(self) -> str | None:
        """Describes the function of the site's weights, for its fingerprint; see :func:`function_of`."""
        projections = {"gate": self.gate, "up": self.up, "down": None if self.down is self.up else self.down}
        turned = [n for n, p in projections.items() if p is not None and p.transposed and p.sizes[0] == p.sizes[1]]
        return function_of(self.activation, self.gate_half, turned)

    def refused(self, reason: str) -> "Site":
        """This site with a reason for refusal; an earlier reason is kept."""
        return self if self.reason else replace(self, reason=reason)


def is_freed(weight: Tensor) -> bool:
    """Whether a weight's storage was freed, as FSDP and offloaders do between two calls."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    needed = (weight.storage_offset() + last + 1) * weight.element_size()
    return weight.numel() > 0 and weight.untyped_storage().nbytes() < needed


def function_of(activation: str | None, gate_half: int | None = None, turned: Sequence[str] = ()) -> str | None:
    """Describes the function of an FFN's weights, as far as their shapes do not determine it.

    Args:
        activation: name in the registry, or None.
        gate_half: index of the half of a fused matrix that is the gate, or None.
        turned: square matrices that are stored [in, out]: ``gate``, ``up``, ``down``.
    """
    parts = [*([] if gate_half is None else [f"gate in half {gate_half}"]), *(f"{name} transposed" for name in turned)]
    return ", ".join([str(activation), *parts]) if parts else activation


def is_released(weight: Tensor) -> bool:
    """Whether a matrix is one value expanded, as :func:`tardis_fx.release` leaves it."""
    return weight.dim() == 2 and weight.numel() > 1 and not any(weight.stride())


@dataclass(frozen=True)
class SiteWeights:
    """The weights of a site, each matrix as [out, in] regardless of how it is stored.

    Those of a refused site may have other shapes: stacked experts, convolutions. A linear layer is ``up`` alone, and
    its ``down`` has no rows.

    Attributes:
        up: of the up projection; its half of a fused matrix.
        up_bias: None if the projection has none, like the other biases.
        down: of the down projection.
        down_bias: of the down projection.
        gate: the projection with the activation in a gated site; None in a plain one.
        gate_bias: of the gate.
    """

    up: Float[Tensor, "h d"]
    up_bias: Float[Tensor, " h"] | None
    down: Float[Tensor, "d_out h"]
    down_bias: Float[Tensor, " d_out"] | None
    gate: Float[Tensor, "h d"] | None = None
    gate_bias: Float[Tensor, " h"] | None = None

    @classmethod
    def from_site(cls, site: Site, parameters: Sequence[Tensor]) -> "SiteWeights":
        """Sorts the values of ``site.parameters`` by role, without copies."""
        values = dict(zip(site.parameters, (p.detach() for p in parameters), strict=True))

        def read(projection: Projection) -> tuple[Tensor, Tensor | None]:
            weight = values[projection.weight]
            bias = None if projection.bias is None else values[projection.bias]
            return weight.mT if projection.transposed else weight, bias

        up, up_bias = read(site.up)
        gate, gate_bias = (None, None) if site.gate is None else read(site.gate)
        if site.gate_half is not None:  # both are one matrix
            order = slice(None, None, -1 if site.gate_half else 1)
            gate, up = up.tensor_split(2, -2)[order]
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.tensor_split(2, -1)[order]
        down, down_bias = (up.new_empty(0, len(up)), None) if site.down is site.up else read(site.down)
        return cls(up, up_bias, down, down_bias, gate, gate_bias)

    @property
    def projections(self) -> dict[str, tuple[Float[Tensor, "h d"], Float[Tensor, " h"] | None]]:
        """The matrices and biases of the projections by name, the gate first."""
        gate = {} if self.gate is None else {"gate": (self.gate, self.gate_bias)}
        return {**gate, "up": (self.up, self.up_bias)}

    @property
    def count(self) -> int:
        """Number of all weights and biases."""
        return sum(tensor.numel() for tensor in vars(self).values() if tensor is not None)

    @property
    def bytes(self) -> int:
        """Size of all weights and biases."""
        return sum(tensor.nbytes for tensor in vars(self).values() if tensor is not None)
