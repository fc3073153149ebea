"""Calls a kernel that is compiled with AddressSanitizer and UBSan; test_sanitizers.py runs it in a process of its own.

``LD_PRELOAD=<libasan.so> python sanitized.py LIBRARY CALLS [wrong]``: random calls of the op, on tensors of exactly the size
that they need, so that a read or write past one of them is reported. PyTorch's memory comes from malloc, which the
sanitizer watches. With ``wrong``, calls read past their tokens, and a report must come.
"""

import random
import sys
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `builders`

import torch
from builders.correction import FLOATS, arguments

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES

PACK = cpu._CALL.pack
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


def with_other_tokens(draw: random.Random, op: Correction) -> Correction:
    tokens = draw.randint(1, len(op.x))
    x = op.x[:tokens].clone()
    if draw.random() < 0.3:
        x[draw.randrange(tokens), draw.randrange(x.shape[1])] = draw.choice(EXTREMES)
    return op._replace(x=x, folded=op.folded if op.folded.ndim == 1 else op.folded[:tokens].clone())


def one_token_more(*numbers: int) -> bytes:
    """A call that tells of a token which is not there."""
    return PACK(*numbers[:16], numbers[16] + 1, *numbers[17:])  # behind fifteen pointers and k


def main(library: str, calls: int, *, wrong: bool) -> None:
    kernel, draw = cpu_build._open(Path(library)), random.Random(0)
    cpu_build.load = lambda: kernel  # type: ignore[assignment]
    if wrong:
        cpu._CALL = mock.Mock(pack=one_token_more)
    for call in range(calls):
        if call % TOGETHER == 0:
            op = drawn(draw)
        torch.get_num_threads = partial(draw.choice, (1, 2, 3))  # type: ignore[misc]
        cpu.correct(with_other_tokens(draw, op))
    sys.stdout.write(f"{calls} calls\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), wrong="wrong" in sys.argv)
