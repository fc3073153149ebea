"""Memory layout of FFNs and linear layers in codes for ``coded.cpp``, in which codes are read at the speed of memory.

What is prepared is one tensor of bytes: a header, then every other argument but the input, each from a multiple of 64
bytes on. Codes of a matrix that is read as a whole lie in tiles of 32 rows, those of rows that are read alone in rows.
A cell holds eight codes of each of some positions: in each of its ``bits`` lines, one byte a position. In a cell of a
tile, positions are four columns of each row, and code ``j`` of column ``c`` is column ``4 j + c`` of 32. In a cell of a
row, positions are 16 columns, and code ``j`` of column ``c`` is column ``16 j + c`` of 128.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_arguments import check, check_listed
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.coded_linear import check as check_linear
from tardis_fx.runtime.cpu import build
from tardis_fx.runtime.packing import unpack

#: First integer of a header, of an FFN and of a linear layer; and number of integers.
SITE_MAGIC, LINEAR_MAGIC, HEADER = 0x31736964726174, 0x316C6964726174, 24
#: Rows of a tile, and columns of its cells and of those of rows.
TILE, TILE_CELL, ROW_CELL = 32, 32, 128
#: Sections start at multiples of so many bytes.
ALIGNMENT = 64
#: The numbers of a call in a header, behind the magic.
_NUMBERS = (
    "k", "d", "d_out", "capacity", "listed", "bits", "low_bits", "column_bits", "column_low_bits", "fold_bits",
    "activation", "relative", "biased", "dtype",
)  # fmt: skip


#: Bytes of a huge page.
_HUGE_PAGE = 2**21
#: Floating-point types by their number in a header.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare(call: CodedFFN) -> UInt8[Tensor, " bytes"]:
    """The prepared site of a call, of whose input only the size is used; loads the kernel.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    check(call)
    check_listed(call)
    (d, d_out), k, capacity = (call.x.shape[-1], len(call.bias)), len(call.projections), len(call.columns)
    fold_bits = 0 if call.fold is None else call.fold_bits
    numbers = {
        "k": k, "d": d, "d_out": d_out, "capacity": capacity, "listed": int(call.listed),
        "bits": call.bits, "low_bits": call.low_bits, "column_bits": call.column_bits,
        "column_low_bits": call.column_low_bits, "fold_bits": fold_bits,
        "activation": list(ACTIVATIONS).index(call.activation), "relative": int(call.relative),
        "biased": int(call.biases is not None), "dtype": _DTYPES.index(call.bias.dtype),
    }  # fmt: skip
    parts = [_header(SITE_MAGIC, [numbers[name] for name in _NUMBERS])]
    parts += [call.signs, call.out_signs, call.bias, call.noise, call.thresholds]
    parts += [] if call.biases is None else [_padded(call.biases.T)]
    parts += [_padded(call.norms.T)]
    parts += [] if call.surrogate is None else [_padded(call.surrogate.T)]
    rows = [call.projections, call.refinements, [call.columns], [call.column_refinements]]
    parts += [_padded(torch.stack([tables.scales(matrix) for matrix in matrices])) for matrices in rows]
    parts += [] if call.fold is None else [_padded(tables.scales(call.fold)[None])]
    parts += [tiles(call.projections[0], call.bits, d)]
    parts += [lines(matrix, call.bits, d) for matrix in call.projections[1:]]
    parts += [lines(matrix, call.low_bits, d) for matrix in call.refinements]
    parts += [lines(call.columns, call.column_bits, d_out)]
    parts += [lines(call.column_refinements, call.column_low_bits, d_out)]
    parts += [] if call.fold is None else [tiles(call.fold, call.fold_bits, d)]
    return _joined(parts)


def prepare_linear(call: CodedLinear) -> UInt8[Tensor, " bytes"]:
    """The prepared layer of a call, of whose input only size and dtype are used; loads the kernel.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    check_linear(call)
    d, biased = call.x.shape[-1], call.bias is not None
    parts = [
        _header(LINEAR_MAGIC, [d, len(call.rows), call.bits, int(biased), _DTYPES.index(call.x.dtype)]),
        call.signs,
    ]
    parts += [] if call.bias is None else [call.bias]
    return _joined([*parts, _padded(tables.scales(call.rows)[None]), tiles(call.rows, call.bits, d)])


def _header(magic: int, numbers: Sequence[int]) -> Int64[Tensor, " integers"]:
    rest = [0] * (HEADER - 1 - len(numbers))
    return torch.tensor([magic, *numbers, *rest], dtype=torch.int64, device="cpu")


def _joined(parts: Sequence[Tensor]) -> UInt8[Tensor, " bytes"]:
    sections = [part.contiguous().reshape(-1).view(torch.uint8) for part in parts]
    prepared = _zeros(sum(map(_aligned, map(len, sections))))
    at = 0
    for section in sections:
        prepared[at : at + len(section)] = section
        at += _aligned(len(section))
    return prepared


def _zeros(size: int) -> UInt8[Tensor, " {size}"]:
    """Zeros, in huge pages if they fill some and the system has any: rows that are far apart are found faster."""
    if size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pages.data_ptr() % _HUGE_PAGE
    zeros: Tensor = pages[start : start + size]
    return zeros


class _Sections:
    """Takes apart what is prepared, section after section."""

    def __init__(self, prepared: UInt8[Tensor, " bytes"], magic: int) -> None:
        start = 8 * HEADER
        header: list[int] = prepared[:start].view(torch.int64).tolist() if len(prepared) >= start else [0]
        found, *self.numbers = header
        if found != magic:
            raise PlanMismatchError("an op of tardis was given bytes that are not a prepared site")
        self._prepared, self._at = prepared, start

    def take(self, of: torch.dtype, *shape: int) -> Tensor:
        """The next section."""
        size = math.prod(shape) * of.itemsize
        start, self._at = self._at, self._at + _aligned(size)
        values: Tensor = self._prepared[start : start + size].view(of).view(shape)
        return values

    def tiled(self, rows: int, columns: int, bits: int) -> UInt8[Tensor, "{rows} {columns}"]:
        """Codes in tiles."""
        cells = self.take(torch.uint8, -(-rows // TILE), -(-columns // TILE_CELL), bits, 4 * TILE)
        codes: Tensor = _codes_of(cells, bits).unflatten(-1, (TILE, 4)).permute(0, 3, 1, 2, 4)
        return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()

    def lined(self, rows: int, columns: int, bits: int) -> UInt8[Tensor, "{rows} {columns}"]:
        """Codes in rows."""
        cells = self.take(torch.uint8, _whole(rows), -(-columns // ROW_CELL), bits, 16)
        return _codes_of(cells, bits).flatten(1)[:rows, :columns].contiguous()


def restore(x: Float[Tensor, "*tokens d"], site: UInt8[Tensor, " bytes"]) -> CodedFFN:
    """The call that a site was prepared from, with tokens; the inverse of :func:`prepare`.

    Raises:
        PlanMismatchError: the bytes are not a prepared site, or the tokens have another dtype or size.
    """
    sections = _Sections(site, SITE_MAGIC)
    n = dict(zip(_NUMBERS, sections.numbers, strict=False))
    k, d, d_out, capacity = n["k"], n["d"], n["d_out"], n["capacity"]
    dtype, room, folded = _DTYPES[n["dtype"]], _whole(capacity), n["fold_bits"] > 0
    _check_tokens(x, d, dtype)
    take = sections.take
    signs, out_signs = take(torch.int8, d), take(torch.int8, d_out)
    bias, noise, thresholds = take(dtype, d_out), take(torch.float32, k), take(torch.float32, k + 2)
    biases = take(dtype, k, room)[:, :capacity].T if n["biased"] else None
    norms = take(torch.bfloat16, k, room)[:, :capacity].T
    surrogate = take(torch.bfloat16, k + 1, room)[:, :capacity].T if folded else None
    scales, low_scales = take(torch.float16, k, room)[:, :capacity], take(torch.float16, k, room)[:, :capacity]
    column_scales, column_low_scales = take(torch.float16, room)[:capacity], take(torch.float16, room)[:capacity]
    fold_scales = take(torch.float16, _whole(d_out))[:d_out] if folded else None
    bits, low_bits, column_bits, column_low_bits = (n[name] for name in _NUMBERS[5:9])
    codes = [sections.tiled(capacity, d, bits), *(sections.lined(capacity, d, bits) for _ in range(k - 1))]
    low_codes = [sections.lined(capacity, d, low_bits) for _ in range(k)]
    columns = tables.join(sections.lined(capacity, d_out, column_bits), column_scales, column_bits)
    low_columns = tables.join(sections.lined(capacity, d_out, column_low_bits), column_low_scales, column_low_bits)
    fold = None
    if fold_scales is not None:
        fold = tables.join(sections.tiled(d_out, d, n["fold_bits"]), fold_scales, n["fold_bits"])
    return CodedFFN(
        x=x, bias=bias, signs=signs, out_signs=out_signs,
        listed=torch.tensor([n["listed"]], dtype=torch.int64, device=site.device),
        projections=[tables.join(*of, bits) for of in zip(codes, scales, strict=True)],
        refinements=[tables.join(*of, low_bits) for of in zip(low_codes, low_scales, strict=True)],
        columns=columns, column_refinements=low_columns, biases=biases, norms=norms, noise=noise,
        thresholds=thresholds, surrogate=surrogate, fold=fold,
        bits=bits, low_bits=low_bits, column_bits=column_bits, column_low_bits=column_low_bits,
        fold_bits=n["fold_bits"] or 8, activation=list(ACTIVATIONS)[n["activation"]], relative=bool(n["relative"]),
    )  # fmt: skip


def restore_linear(x: Float[Tensor, "*tokens d"], layer: UInt8[Tensor, " bytes"]) -> CodedLinear:
    """The call that a layer was prepared from, with tokens; the inverse of :func:`prepare_linear`.

    Raises:
        PlanMismatchError: the bytes are not a prepared layer, or the tokens have another dtype or size.
    """
    sections = _Sections(layer, LINEAR_MAGIC)
    d, d_out, bits, biased, dtype = sections.numbers[:5]
    _check_tokens(x, d, _DTYPES[dtype])
    signs = sections.take(torch.int8, d)
    bias = sections.take(_DTYPES[dtype], d_out) if biased else None
    scales = sections.take(torch.float16, _whole(d_out))[:d_out]
    return CodedLinear(x, tables.join(sections.tiled(d_out, d, bits), scales, bits), signs, bias, bits)


def _check_tokens(x: Float[Tensor, "*tokens d"], d: int, dtype: torch.dtype) -> None:
    if x.shape[-1:] != (d,) or x.dtype is not dtype:
        raise PlanMismatchError(
            f"an op of tardis was given x of {x.dtype} and shape {tuple(x.shape)}, but its site takes {d} columns of"
            f" {dtype}"
        )


def tiles(rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int) -> UInt8[Tensor, "tiles cells {bits} 128"]:
    """The codes of a matrix in tiles."""
    shape = (-(-len(rows) // TILE), -(-columns // TILE_CELL), bits, 4 * TILE)
    if (placed := _placed(rows, bits, columns, TILE, TILE_CELL, shape)) is not None:
        return placed
    codes = _codes(rows, bits, columns, TILE, TILE_CELL)
    return _lines(codes.unflatten(0, (-1, TILE)).unflatten(2, (-1, 8, 4)).permute(0, 2, 3, 1, 4).flatten(3), bits)


def lines(rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int) -> UInt8[Tensor, "padded cells {bits} 16"]:
    """The codes of a matrix in rows."""
    shape = (_whole(len(rows)), -(-columns // ROW_CELL), bits, 16)
    if (placed := _placed(rows, bits, columns, 1, ROW_CELL, shape)) is not None:
        return placed
    return _lines(_codes(rows, bits, columns, TILE, ROW_CELL).unflatten(1, (-1, 8, 16)), bits)


def _placed(
    rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int, tile: int, cell: int, shape: tuple[int, ...]
) -> UInt8[Tensor, "..."] | None:
    """The codes as ``layout.cpp`` places them, or None without a compiler."""
    library = build.load()
    if library is None:
        return None
    rows, out = rows.contiguous(), rows.new_zeros(shape)
    numbers = (len(rows), rows.shape[1], columns, bits, tile, cell)
    library.tardis_place(rows.data_ptr(), *numbers, out.data_ptr(), torch.get_num_threads())
    return out


def _codes(
    rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int, of_rows: int, of_columns: int
) -> UInt8[Tensor, "padded_rows padded_columns"]:
    """The codes of a matrix, padded with zeros to multiples of rows and columns."""
    codes = rows.new_zeros(len(rows) + -len(rows) % of_rows, columns + -columns % of_columns)
    codes[: len(rows), :columns] = unpack(rows[:, :-2].contiguous(), bits, columns)
    return codes


def _lines(codes: UInt8[Tensor, "*cells 8 positions"], bits: int) -> UInt8[Tensor, "*cells {bits} positions"]:
    """The lines of cells of eight codes; see ``codes_of_cell`` in ``tiles.h``, which takes them apart."""
    c = codes.unbind(-2)
    if bits == 8:
        return codes.contiguous()
    if bits >= 4:
        low = bits - 4
        both = torch.stack([c[2 * i] >> low | c[2 * i + 1] >> low << 4 for i in range(4)], -2)
        return both if low == 0 else torch.cat([both, _lines(codes & 2**low - 1, low)], -2)
    if bits == 3:
        first = c[0] | c[1] << 3 | (c[6] & 3) << 6
        second = c[2] | c[3] << 3 | (c[6] >> 2) << 6 | (c[7] >> 2) << 7
        return torch.stack([first, second, c[4] | c[5] << 3 | (c[7] & 3) << 6], -2)
    count = 8 // bits
    return torch.stack(
        [sum((c[count * i + j] << bits * j for j in range(1, count)), c[count * i]) for i in range(bits)], -2
    )


def _codes_of(lines: UInt8[Tensor, "*cells {bits} positions"], bits: int) -> UInt8[Tensor, "*cells 8 positions"]:
    """The inverse of :func:`_lines`."""
    if bits == 8:
        return lines
    of = lines.unbind(-2)
    if bits >= 4:
        high = torch.stack([part for line in of[:4] for part in (line & 15, line >> 4)], -2)
        return high if bits == 4 else high << bits - 4 | _codes_of(lines[..., 4:, :], bits - 4)
    if bits == 3:
        a, b, c = of
        last = [a >> 6 | (b >> 6 & 1) << 2, c >> 6 | b >> 7 << 2]
        return torch.stack([a & 7, a >> 3 & 7, b & 7, b >> 3 & 7, c & 7, c >> 3 & 7, *last], -2)
    return torch.stack([line >> bits * j & 2**bits - 1 for line in of for j in range(8 // bits)], -2)


def _padded(values: Shaped[Tensor, "parts rows"]) -> Shaped[Tensor, "parts padded"]:
    """Numbers of rows, padded with zeros to whole tiles."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % TILE))


def _whole(rows: int) -> int:
    """Rows of whole tiles."""
    return rows + -rows % TILE


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT
