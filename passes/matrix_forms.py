"""Forms of a matrix, [rows, columns]: the tensors that a plan stores, and the linear layer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import jaxtyping
import torch
from jaxtyping import Bool, Float, Float16, Float64, UInt8
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.feed_forward import Matrix, multiply
from tardis_fx.passes.layout import Expected, Layout, Tensors, table_rows
from tardis_fx.passes.layout import codes as coded_layout
from tardis_fx.quantisation import Feedback, code_columns, code_rows, factor, quantise
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import pack, packed_bytes, unpack

Weight = Float[Tensor, "rows columns"]
#: Of a matrix's operand.
Gram = Float[Tensor, "columns columns"]


@dataclass(frozen=True, eq=False)
class Form(Matrix):
    """Base class of forms; the first fields are the tensors, in the order of :attr:`endings`."""

    #: Suffixes of the tensors' names, after the name of the matrix.
    endings: ClassVar[tuple[str, ...]] = ("",)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the matrix, named after ``name``."""
        return dict(zip(self._names(name), (getattr(self, f.name) for f in fields(self)), strict=False))

    @classmethod
    def from_tensors(cls, tensors: Tensors, name: str, *rest: Any) -> Self:
        """Reads the matrix of this name from tensors; other fields follow as ``rest``."""
        return cls(*(tensors[key] for key in cls._names(name)), *rest)

    @classmethod
    def _names(cls, name: str) -> list[str]:
        return [f"{name}{ending}" for ending in cls.endings]


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """A dense matrix, unchanged."""

    weight: Weight

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Applies the matrix as a linear layer."""
        return multiply(x, self.weight, bias)


@dataclass(frozen=True, eq=False)
class Coded(Form):
    """A matrix in a few bits, in the layout of :mod:`tardis_fx.quantisation`.

    Attributes:
        codes: in the layout of :mod:`tardis_fx.runtime.packing`.
        scale: of each group of columns.
        zero: point of each group of columns.
        bits: of a code.
        columns: of the matrix.
        dtype: of the matrix.
    """

    endings: ClassVar[tuple[str, ...]] = ("_codes", "_scale", "_zero")

    codes: UInt8[Tensor, "rows packed"]
    scale: Float16[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows groups"]
    bits: int
    columns: int
    dtype: torch.dtype

    @classmethod
    def from_matrix(cls, weight: Weight, gram: Gram | None, bits: int, group_size: int) -> Self:
        """Quantises by GPTQ with the operand's Gram matrix, or to nearest without one."""
        quantised = quantise(weight.float(), gram, bits, group_size)
        return cls(quantised.codes, quantised.scale, quantised.zero, bits, quantised.columns, weight.dtype)

    @staticmethod
    def layout(name: str, shape: Sequence[int], bits: int, group_size: int) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return coded_layout(f"{name}_", tuple(shape[:1]), shape[1], bits, group_size)

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Dequantises the matrix and applies it as a linear layer."""
        weight = torch.ops.tardis.dequantise(self.codes, self.scale, self.zero, self.bits, self.columns, self.dtype)
        return F.linear(x, weight, bias)


@dataclass(frozen=True, eq=False)
class CodedRows(Form):
    """A matrix in codes with one scale for each row, or for each column if its transpose is stored.

    Attributes:
        rows: of the matrix or its transpose, in the layout of :mod:`tardis_fx.runtime.tables`.
        bits: of a code.
        codes: in a row.
        transposed: whether the rows are those of the transpose.
        dtype: of the matrix.
    """

    endings: ClassVar[tuple[str, ...]] = ("_rows",)

    rows: UInt8[Tensor, "stored row_bytes"]
    bits: int
    codes: int
    transposed: bool
    dtype: torch.dtype

    @classmethod
    def from_matrix(cls, weight: Weight, feedback: Feedback | None, bits: int, *, transposed: bool) -> Self:
        """Quantises by GPTQ with the operand's feedback, or to nearest without one."""
        coded = code_columns(weight.mT, feedback, bits) if transposed else code_rows(weight, feedback, bits)
        return cls(coded.rows, bits, coded.columns, transposed, weight.dtype)

    @staticmethod
    def layout(name: str, shape: Sequence[int], bits: int, *, transposed: bool) -> Layout:
        """Tensors that a plan holds for the matrix."""
        stored, codes = reversed(shape) if transposed else shape
        return {f"{name}_rows": table_rows(stored, codes, bits)}

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Dequantises the matrix and applies it as a linear layer."""
        stored = torch.ops.tardis.dequantise_rows(self.rows, self.bits, self.codes, self.dtype)
        return F.linear(x, stored.mT if self.transposed else stored, bias)


@dataclass(frozen=True, eq=False)
class Int8(Form):
    """Symmetric codes of 8 bits, rounded to nearest.

    Attributes:
        codes: of the weights.
        scale: of each row, in the dtype of the matrix.
        dtype: of the matrix.
    """

    endings: ClassVar[tuple[str, ...]] = ("_codes", "_scale")

    codes: jaxtyping.Int8[Tensor, "rows columns"]
    scale: Float[Tensor, " rows"]
    dtype: torch.dtype

    @classmethod
    def from_matrix(cls, weight: Weight) -> Self:
        """Quantises a matrix by rounding to nearest."""
        scale = (weight.float().abs().amax(1) / 127).to(weight.dtype)
        codes = (weight.float() / scale.float()[:, None]).nan_to_num(0).round().clamp(-127, 127)  # 0 / 0 of empty rows
        return cls(codes.to(torch.int8), scale, weight.dtype)

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Applies the matrix as a linear layer; scales it first in float16, where products with codes overflow."""
        if self.dtype == torch.float16:
            return F.linear(x, self.codes.to(self.dtype) * self.scale[:, None], bias)
        product = F.linear(x, self.codes.to(self.dtype)) * self.scale
        return product if bias is None else product + bias


@dataclass(frozen=True, eq=False)
class Factored(Form):
    """A product of two thin matrices, ``a @ b``."""

    endings: ClassVar[tuple[str, ...]] = ("_a", "_b")

    a: Float[Tensor, "rows rank"] | Matrix
    b: Float[Tensor, "rank columns"] | Matrix

    @classmethod
    def from_matrix(cls, weight: Weight, rank: int, gram: Gram | None = None) -> Self:
        """Factors a matrix by :func:`truncated`."""
        a, b = truncated(weight.double().cpu(), rank, gram)
        return cls(a.to(weight.dtype), b.to(weight.dtype))

    @staticmethod
    def layout(name: str, shape: Sequence[int], rank: int, dtype: torch.dtype) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return {f"{name}_a": Expected(dtype, (shape[0], rank)), f"{name}_b": Expected(dtype, (rank, shape[1]))}

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Applies two thin linear layers."""
        return multiply(multiply(x, self.b), self.a, bias)


@dataclass(frozen=True, eq=False)
class Masked(Form):
    """A pruned matrix: the original and a mask of the kept weights.

    Attributes:
        kept: mask with one bit per weight.
        whole: the original matrix.
    """

    kept: UInt8[Tensor, "rows packed"]
    whole: Weight

    @classmethod
    def from_matrix(cls, weight: Weight, kept: Bool[Tensor, "rows columns"]) -> Self:
        """Prunes a matrix by a mask of kept weights."""
        return cls(pack(kept.byte(), 1), weight)

    @staticmethod
    def layout(name: str, shape: Sequence[int]) -> Layout:
        """Tensors that a plan holds for the matrix."""
        return {name: Expected(torch.uint8, (shape[0], packed_bytes(shape[1], 1)))}

    @property
    def weight(self) -> Weight:
        """The pruned matrix, with zeros."""
        mask = unpack(self.kept, 1, self.whole.shape[1]).bool()
        return torch.where(mask.to(self.whole.device), self.whole, 0).contiguous()

    def apply(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """Applies the pruned matrix as a linear layer."""
        return F.linear(x, self.weight, bias)


def truncated(
    weight: Float64[Tensor, "rows columns"], rank: int, gram: Gram | None = None
) -> tuple[Float64[Tensor, "rows rank"], Float64[Tensor, "rank columns"]]:
    """Low-rank factors, with the singular values split evenly between them.

    Args:
        weight: the matrix.
        rank: of the product.
        gram: weighs the errors; None minimises the error of the weights.
    """
    lower = None if gram is None else factor(gram)
    u, s, vt = torch.linalg.svd(weight if lower is None else weight @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    if lower is not None:
        b = torch.linalg.solve_triangular(lower, b, upper=False, left=False)
    return a.contiguous(), b.contiguous()
