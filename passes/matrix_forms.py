"""Forms of a matrix, [rows, columns]: what a plan holds of it, and the linear layer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.feed_forward import Matrix, multiply
from tardis_fx.passes.layout import Expected
from tardis_fx.passes.layout import codes as coded_layout
from tardis_fx.quantisation import factor, quantise
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import pack, packed_bytes, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tardis_fx.passes.layout import Layout


@dataclass(frozen=True, eq=False)
class Form(Matrix):
    """A matrix, [rows, columns]; its first fields are its tensors, in the order of :attr:`endings`."""

    #: What the names of the tensors end in, behind the name of the matrix.
    endings: ClassVar[tuple[str, ...]] = ("",)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a matrix of this name."""
        return dict(zip(self._names(name), (getattr(self, f.name) for f in fields(self)), strict=False))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, *rest: Any) -> Self:
        """The matrix of this name among tensors; all that is no tensor follows."""
        return cls(*(tensors[each] for each in cls._names(name)), *rest)

    @classmethod
    def _names(cls, name: str) -> list[str]:
        return [f"{name}{ending}" for ending in cls.endings]


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """As it is."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer."""
        return multiply(x, self.weight, bias)


@dataclass(frozen=True, eq=False)
class Coded(Form):
    """In a few bits, as :mod:`tardis_fx.quantisation` lays them out.

    Attributes:
        codes: [rows, packed columns], uint8.
        scale: [rows, groups], float16.
        zero: [rows, groups], uint8.
        bits: of a code.
        columns: of the matrix.
        dtype: of the matrix.
    """

    endings: ClassVar[tuple[str, ...]] = ("_codes", "_scale", "_zero")

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    columns: int
    dtype: torch.dtype

    @classmethod
    def from_matrix(cls, weight: Tensor, gram: Tensor | None, bits: int, group_size: int) -> Self:
        """By GPTQ, or to nearest where there is no Gram matrix of what the matrix multiplies, [columns, columns]."""
        found = quantise(weight.float(), gram, bits, group_size)
        return cls(found.codes, found.scale, found.zero, bits, found.columns, weight.dtype)

    @staticmethod
    def layout(name: str, shape: Sequence[int], bits: int, group_size: int) -> Layout:
        """What a plan holds."""
        return coded_layout(f"{name}_", tuple(shape[:1]), shape[1], bits, group_size)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer, of a matrix that is made at every call."""
        weight = torch.ops.tardis.dequantise(self.codes, self.scale, self.zero, self.bits, self.columns, self.dtype)
        return F.linear(x, weight, bias)


@dataclass(frozen=True, eq=False)
class Int8(Form):
    """Symmetric codes of 8 bits, rounded to nearest.

    Attributes:
        codes: [rows, columns], int8.
        scale: [rows], in the dtype of the matrix.
        dtype: of the matrix.
    """

    endings: ClassVar[tuple[str, ...]] = ("_codes", "_scale")

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def from_matrix(cls, weight: Tensor) -> Self:
        """Rounds to nearest."""
        scale = (weight.float().abs().amax(1) / 127).to(weight.dtype)
        codes = (weight.float() / scale.float()[:, None]).nan_to_num(0).round().clamp(-127, 127)  # 0 / 0 of empty rows
        return cls(codes.to(torch.int8), scale, weight.dtype)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer; in float16, where products with codes overflow, of the scaled matrix."""
        if self.dtype == torch.float16:
            return F.linear(x, self.codes.to(self.dtype) * self.scale[:, None], bias)
        product = F.linear(x, self.codes.to(self.dtype)) * self.scale
        return product if bias is None else product + bias


@dataclass(frozen=True, eq=False)
class Factored(Form):
    """A product of two thin matrices.

    Attributes:
        a: [rows, rank].
        b: [rank, columns].
    """

    endings: ClassVar[tuple[str, ...]] = ("_a", "_b")

    a: Tensor
    b: Tensor

    @classmethod
    def from_matrix(cls, weight: Tensor, rank: int, gram: Tensor | None = None) -> Self:
        """See :func:`truncated`."""
        a, b = truncated(weight.double().cpu(), rank, gram)
        return cls(a.to(weight.dtype), b.to(weight.dtype))

    @staticmethod
    def layout(name: str, shape: Sequence[int], rank: int, dtype: torch.dtype) -> Layout:
        """What a plan holds."""
        return {f"{name}_a": Expected(dtype, (shape[0], rank)), f"{name}_b": Expected(dtype, (rank, shape[1]))}

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin linear layers."""
        return multiply(multiply(x, self.b), self.a, bias)


@dataclass(frozen=True, eq=False)
class Masked(Form):
    """Some weights of a matrix.

    Attributes:
        kept: which, a bit each, [rows, packed columns], uint8.
        whole: the matrix with all of them.
    """

    kept: Tensor
    whole: Tensor

    @classmethod
    def from_matrix(cls, weight: Tensor, kept: Tensor) -> Self:
        """Keeps where a mask, [rows, columns], bool, says so."""
        return cls(pack(kept.byte(), 1), weight)

    @staticmethod
    def layout(name: str, shape: Sequence[int]) -> Layout:
        """What a plan holds."""
        return {name: Expected(torch.uint8, (shape[0], packed_bytes(shape[1], 1)))}

    @property
    def weight(self) -> Tensor:
        """The matrix with zeros in it."""
        mask = unpack(self.kept, 1, self.whole.shape[1]).bool()
        return torch.where(mask.to(self.whole.device), self.whole, 0).contiguous()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer with zeros in its matrix."""
        return F.linear(x, self.weight, bias)


def truncated(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors [rows, rank] and [rank, columns], the singular values split evenly between them.

    Args:
        weight: [rows, columns], float64.
        rank: of the product.
        gram: [columns, columns] of what the matrix multiplies; None looks at the weights alone.
    """
    lower = None if gram is None else factor(gram)
    u, s, vt = torch.linalg.svd(weight if lower is None else weight @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    if lower is not None:
        b = torch.linalg.solve_triangular(lower, b, upper=False, left=False)
    return a.contiguous(), b.contiguous()
