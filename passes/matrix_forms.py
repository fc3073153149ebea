"""Forms of a matrix, [rows, columns]: the tensors that a plan stores, and the linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.feed_forward import Matrix, multiply
from tardis_fx.passes.layout import Expected, Layout
from tardis_fx.passes.layout import codes as coded_layout
from tardis_fx.quantisation import factor, quantise
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import pack, packed_bytes, unpack


@dataclass(frozen=True, eq=False)
class Form(Matrix):
    """Base class of forms; the first fields are the tensors, in the order of :attr:`endings`."""

    #: Suffixes of the tensors' names, after the name of the matrix.
    endings: ClassVar[tuple[str, ...]] = ("",)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the matrix, named after ``name``."""
        return dict(zip(self._names(name), (getattr(self, f.name) for f in fields(self)), strict=False))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, *rest: Any) -> Self:
        """Reads the matrix of this name from tensors; other fields follow as ``rest``."""
        return cls(*(tensors[each] for each in cls._names(name)), *rest)

    @classmethod
    def _names(cls, name: str) -> list[str]:
        return [f"{name}{ending}" for ending in cls.endings]


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """A dense matrix, unchanged."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the matrix as a linear layer."""
        return multiply(x, self.weight, bias)


@dataclass(frozen=True, eq=False)
class Coded(Form):
    """A matrix in a few bits, in the layout of :mod:`tardis_fx.quantisation`.

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
        """Quantises by GPTQ with the operand's Gram matrix, [columns, columns], or to nearest without one."""
        found = quantise(weight.float(), gram, bits, group_size)
        return cls(found.codes, found.scale, found.zero, bits, found.columns, weight.dtype)

    @staticmethod
    def layout(name: str, shape: Sequence[int], bits: int, group_size: int) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return coded_layout(f"{name}_", tuple(shape[:1]), shape[1], bits, group_size)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Dequantises the matrix and applies it as a linear layer."""
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
        """Quantises a matrix by rounding to nearest."""
        scale = (weight.float().abs().amax(1) / 127).to(weight.dtype)
        codes = (weight.float() / scale.float()[:, None]).nan_to_num(0).round().clamp(-127, 127)  # 0 / 0 of empty rows
        return cls(codes.to(torch.int8), scale, weight.dtype)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the matrix as a linear layer; scales it first in float16, where products with codes overflow."""
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
        """Factors a matrix by :func:`truncated`."""
        a, b = truncated(weight.double().cpu(), rank, gram)
        return cls(a.to(weight.dtype), b.to(weight.dtype))

    @staticmethod
    def layout(name: str, shape: Sequence[int], rank: int, dtype: torch.dtype) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return {f"{name}_a": Expected(dtype, (shape[0], rank)), f"{name}_b": Expected(dtype, (rank, shape[1]))}

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies two thin linear layers."""
        return multiply(multiply(x, self.b), self.a, bias)


@dataclass(frozen=True, eq=False)
class Masked(Form):
    """A pruned matrix: the original and a mask of the kept weights.

    Attributes:
        kept: mask with one bit per weight, [rows, packed columns], uint8.
        whole: the original matrix.
    """

    kept: Tensor
    whole: Tensor

    @classmethod
    def from_matrix(cls, weight: Tensor, kept: Tensor) -> Self:
        """Prunes a matrix by a mask of kept weights, [rows, columns], bool."""
        return cls(pack(kept.byte(), 1), weight)

    @staticmethod
    def layout(name: str, shape: Sequence[int]) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return {name: Expected(torch.uint8, (shape[0], packed_bytes(shape[1], 1)))}

    @property
    def weight(self) -> Tensor:
        """The pruned matrix, with zeros."""
        mask = unpack(self.kept, 1, self.whole.shape[1]).bool()
        return torch.where(mask.to(self.whole.device), self.whole, 0).contiguous()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the pruned matrix as a linear layer."""
        return F.linear(x, self.weight, bias)


def truncated(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Low-rank factors [rows, rank] and [rank, columns], with the singular values split evenly between them.

    Args:
        weight: [rows, columns], float64.
        rank: of the product.
        gram: [columns, columns], of the matrix's operand; None minimises the error of the weights.
    """
    lower = None if gram is None else factor(gram)
    u, s, vt = torch.linalg.svd(weight if lower is None else weight @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    if lower is not None:
        b = torch.linalg.solve_triangular(lower, b, upper=False, left=False)
    return a.contiguous(), b.contiguous()
