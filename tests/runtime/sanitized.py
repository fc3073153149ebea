"""Calls a kernel that is compiled with AddressSanitizer and UBSan; test_sanitizers.py runs it in a process of its own.

``LD_PRELOAD=<libasan.so> python sanitized.py LIBRARY OP CALLS [wrong]``: random calls of ``correct`` or ``coded_ffn``, on
tensors of exactly the size that they need, so that a read or write past one of them is reported. PyTorch's memory comes
from malloc, which the sanitizer watches. With ``wrong``, calls read past their tokens, and a report must come.
"""

import random
import sys
from collections.abc import Callable
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
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import coded_op
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES

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
        shape=(draw.randint(1, MOST_TOKENS),),
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


def other_tokens(draw: random.Random, x: Tensor) -> Tensor:
    tokens = draw.randint(1, len(x))
    x = x[:tokens].clone()
    if draw.random() < 0.3:
        x[draw.randrange(tokens), draw.randrange(x.shape[1])] = draw.choice(EXTREMES)
    return x


def correct(draw: random.Random, op: Correction) -> None:
    x = other_tokens(draw, op.x)
    cpu.correct(op._replace(x=x, folded=op.folded if op.folded.ndim == 1 else op.folded[: len(x)].clone()))


def coded_ffn(draw: random.Random, call: CodedFFN) -> None:
    coded_op.coded_ffn(call._replace(x=other_tokens(draw, call.x)))


def one_token_more(pack: Callable[..., bytes], at: int, *numbers: int) -> bytes:
    """A call that tells of a token which is not there; ``at`` is the place of the number of tokens."""
    return pack(*numbers[:at], numbers[at] + 1, *numbers[at + 1 :])


#: By op: how a call is drawn, how it is called on some tokens, its module, and where it tells the number of tokens.
OPS: dict[str, tuple[Any, Any, Any, int]] = {
    "correct": (drawn, correct, cpu, 16),
    "coded_ffn": (drawn_in_codes, coded_ffn, coded_op, 19),
}


def main(library: str, op: str, calls: int, *, wrong: bool) -> None:
    kernel, draw = cpu_build._open(Path(library)), random.Random(0)
    cpu_build.load = lambda: kernel  # type: ignore[assignment]
    drawn, run, module, at = OPS[op]
    if wrong:
        module._CALL = mock.Mock(pack=partial(one_token_more, module._CALL.pack, at))
    for number in range(calls):
        if number % TOGETHER == 0:
            call = drawn(draw)
        torch.get_num_threads = partial(draw.choice, (1, 2, 3))  # type: ignore[misc]
        run(draw, call)
    sys.stdout.write(f"{calls} calls\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), wrong="wrong" in sys.argv)
