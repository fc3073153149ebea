"""Calls a kernel that is compiled with AddressSanitizer and UBSan; test_sanitizers.py runs it in a process of its own.

``LD_PRELOAD=<libasan.so> python sanitized.py LIBRARY OP CALLS [wrong]``: random calls of an op, on
tensors of exactly the size that they need, so that a read or write past one of them is reported. PyTorch's memory comes
from malloc, which the sanitizer watches. With ``wrong``, calls read past their tokens, and a report must come.
"""

import ctypes
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `builders`

import torch
from builders import coded
from builders.correction import FLOATS, arguments
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.quantisation import code_rows
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.cpu.coded_layout import _DTYPES, prepare, prepare_linear
from tardis_fx.runtime.packing import GROUP_SIZES
from tardis_fx.runtime.rotation import random_signs

#: Calls on one set of weights; what differs is their tokens.
TOGETHER = 10
#: What a token may have in it.
EXTREMES = (0.0, 1e-45, 1e-38, 1e30, 3e38, torch.inf, -torch.inf, torch.nan)


def drawn(draw: random.Random) -> Correction:
    return arguments(
        k=draw.choice((1, 2)),
        shape=(draw.randint(1, MOST_TOKENS),),
        d=draw.randint(1, 300),
        d_out=draw.randint(1, 200),
        h=draw.randint(1, 40),
        always=draw.choice((0, 1, 10)),
        outliers=draw.choice((0, 1)),
        dtype=draw.choice(FLOATS),
        bits=draw.randint(1, 8),
        activation=draw.choice(sorted(ACTIVATIONS)),
        bias=draw.random() < 0.5,
        fold=draw.random() < 0.5,
        fold_bits=draw.choice((16, *range(1, 9))),
        row_bits=draw.choice((16, *range(1, 9))),
        group_size=draw.choice(GROUP_SIZES),
        seed=draw.randrange(2**32),
    )


def drawn_in_codes(draw: random.Random) -> CodedFFN:
    return coded.arguments(
        k=draw.choice((1, 2)),
        shape=(draw.randint(1, 40),),
        d=draw.randint(1, 300),
        d_out=draw.randint(1, 200),
        listed=draw.randint(0, 40),
        spare=0,
        dtype=draw.choice(FLOATS),
        widths=(draw.randint(1, 8), draw.randint(1, 8), draw.randint(1, 8), draw.randint(1, 8), draw.randint(1, 8)),
        activation=draw.choice(sorted(ACTIVATIONS)),
        bias=draw.random() < 0.5,
        fold=draw.random() < 0.5,
        relative=draw.random() < 0.5,
        seed=draw.randrange(2**32),
    )


def drawn_linear(draw: random.Random) -> CodedLinear:
    d, d_out, bits = draw.randint(1, 300), draw.randint(1, 200), draw.randint(1, 8)
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    x = torch.randn(draw.randint(1, 40), d, generator=generator).to(draw.choice(FLOATS))
    rows = code_rows(torch.randn(d_out, d, generator=generator), None, bits).rows
    bias = torch.randn(d_out, generator=generator).to(x.dtype) if draw.random() < 0.5 else None
    return CodedLinear(x, rows, random_signs(d, 0), bias, bits)


def other_tokens(draw: random.Random, x: Tensor) -> Tensor:
    tokens = draw.randint(1, len(x))
    x = x[:tokens].clone()
    if draw.random() < 0.3:
        x[draw.randrange(tokens), draw.randrange(x.shape[1])] = draw.choice(EXTREMES)
    return x


def correct(kernel: ctypes.CDLL, draw: random.Random, op: Correction, more: int) -> None:
    """Calls the op on some tokens; the kernel is told of ``more`` than there are."""
    del kernel

    def pack(*numbers: int) -> bytes:
        return _CALL.pack(*numbers[:16], numbers[16] + more, *numbers[17:])

    x = other_tokens(draw, op.x)
    with mock.patch.object(cpu, "_CALL", mock.Mock(pack=pack)):
        cpu.correct(op._replace(x=x, folded=op.folded if op.folded.ndim == 1 else op.folded[: len(x)].clone()))


def coded_ffn(kernel: ctypes.CDLL, draw: random.Random, call: CodedFFN, more: int) -> None:
    in_codes(kernel.tardis_coded_ffn, other_tokens(draw, call.x), prepare(call), len(call.bias), more)


def coded_linear(kernel: ctypes.CDLL, draw: random.Random, call: CodedLinear, more: int) -> None:
    in_codes(kernel.tardis_coded_linear, other_tokens(draw, call.x), prepare_linear(call), len(call.rows), more)


def in_codes(op: Any, x: Tensor, site: Tensor, d_out: int, more: int) -> None:
    out = x.new_empty(len(x), d_out)
    pointers = (
        ctypes.c_void_p(site.data_ptr()),
        len(site),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    assert op(*pointers, len(x) + more, x.shape[1], d_out, _DTYPES.index(x.dtype), torch.get_num_threads()) == 0


#: By op: how a call is drawn, and how it is called on some tokens.
OPS: dict[str, tuple[Any, Any]] = {
    "correct": (drawn, correct),
    "coded_ffn": (drawn_in_codes, coded_ffn),
    "coded_linear": (drawn_linear, coded_linear),
}
#: How calls of ``correct`` are packed.
_CALL = cpu._CALL


def main(library: str, op: str, calls: int, *, wrong: bool) -> None:
    kernel, draw = cpu_build._open(Path(library)), random.Random(0)
    cpu_build.load = lambda: kernel  # type: ignore[assignment]
    for of in (kernel.tardis_coded_ffn, kernel.tardis_coded_linear):
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        of.argtypes, of.restype = [pointer, integer, pointer, pointer, *[integer] * 5], integer
    drawn, run = OPS[op]
    for number in range(calls):
        if number % TOGETHER == 0:
            call = drawn(draw)
        torch.get_num_threads = partial(draw.choice, (1, 2, 3))  # type: ignore[misc]
        run(kernel, draw, call, int(wrong))
    sys.stdout.write(f"{calls} calls\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), wrong="wrong" in sys.argv)
