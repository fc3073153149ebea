"""Judges a drawn program: rewritten it gives what it gives as it is, outputs and inputs alike, or a ``TardisError``."""

import traceback
from typing import NamedTuple

import torch
from torch import Tensor

from fuzz.cases import Blocks, Failure, Judged
from fuzz.programs import Program, Ran, program
from fuzz.runs import Rewriter, Truth, compiled, host_of
from tardis_fx.errors import TardisError
from tardis_fx.testing.assertions import TOLERANCES


def judge(blocks: Blocks, route: str = "backend") -> Judged:
    """Builds a case's program and runs it one way.

    The verdict is "rewritten", "original" (no site was rewritten), "refused" (a ``TardisError``), "invalid" (PyTorch
    itself does not run it, or goes wrong with it) or "failed".
    """
    try:
        drawn = program(blocks)
        expected = _as_it_is(drawn)
    except Exception:  # whatever PyTorch says to an op that it does not take
        return Judged("invalid")
    inner = "eager" if route in ("backend", "dynamo") else "inductor"
    rewriter = Rewriter(drawn, inner)

    def failed(fault: str, message: str) -> Judged:
        if route == "inductor":
            # What users run decides. Where all is left to PyTorch, which no user asks for, Inductor moves reads before
            # writes through a view, and does not take every getitem.
            return judge(blocks, "inductor_cpp")
        return Judged("failed", Failure("program", route, blocks, fault, message, drawn.code))

    try:
        found = compiled(drawn, route, rewriter)
    except TardisError:
        return Judged("refused")
    except Exception as error:
        if _foreign(drawn, route, expected):
            return Judged("invalid")
        return failed(f"untyped {type(error).__name__}", "".join(traceback.format_exception(error)[-6:]))
    wrong = difference(drawn, found, expected)
    if wrong is not None and not _foreign(drawn, route, expected):
        return failed("wrong answer", wrong)
    return Judged("rewritten" if rewriter.rewritten else "original")


def _as_it_is(drawn: Program) -> Ran:
    """What the program gives; without the second call where its shapes do not let it take more tokens."""
    if not drawn.again and drawn.benign is None:
        return drawn.expected
    try:
        return host_of(drawn, drawn.values).run(drawn.inference)
    except Exception:
        if not drawn.again:
            raise
        drawn.again = ""
        return _as_it_is(drawn)


def _foreign(drawn: Program, route: str, expected: Ran) -> bool:
    """Whether PyTorch goes wrong with the program by itself; tried twice, for not everything it does repeats."""
    if route == "backend":
        return False
    try:
        runs = [compiled(drawn, route, "eager" if route == "dynamo" else "inductor") for _ in range(2)]
    except Exception:
        return True
    return any(difference(drawn, run, expected) is not None for run in runs)


# ---- Comparison


def difference(drawn: Program, found: Ran, expected: Ran) -> str | None:
    """What differs between two runs of a program by more than rounding, or None."""
    pairs = [*zip(found.outputs, expected.outputs, strict=True), *zip(found.values, expected.values, strict=True)]
    for number, (one, other) in enumerate(pairs):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"result {number}: {one.dtype}{list(one.shape)}, not {other.dtype}{list(other.shape)}"
    aliases = [_aliases(run) for run in (found, expected)]
    if aliases[0] != aliases[1]:
        return f"outputs share storages differently: {aliases[0]}, not {aliases[1]}"
    if drawn.benign is None:
        clean = [torch.ones_like(other, dtype=torch.bool) for _, other in pairs]
    else:  # what a hostile value reaches is not judged, only that it reaches nothing else
        harmless = host_of(drawn, drawn.benign).run(drawn.inference)
        clean = [(b == e) for b, (_, e) in zip([*harmless.outputs, *harmless.values], pairs, strict=True)]
    judged = [_Pair(*pair, mask) for pair, mask in zip(pairs, clean, strict=True)]
    suspects = [number for number, pair in enumerate(judged) if not pair.close]
    if not suspects:
        return None
    truth = Truth(drawn)
    if not truth.representable:
        return None
    for number in suspects:
        if told := judged[number].wrong(truth.results[number], truth.largest):
            return f"result {number} of {len(found.outputs)} outputs and then the inputs: {told}"
    return None


def _aliases(run: Ran) -> list[int]:
    """Of every output the first of all results that shares its storage; of an empty one itself."""
    every = [*run.outputs, *run.values]
    storages = [t.untyped_storage()._cdata if t.numel() else -1 - i for i, t in enumerate(every)]
    return [storages.index(storages[i]) for i in range(len(run.outputs))]


class _Pair(NamedTuple):
    """A result of both runs, and which elements are judged."""

    found: Tensor
    expected: Tensor
    clean: Tensor

    @property
    def _finite(self) -> Tensor:
        return self.clean & self.expected.isfinite()

    @property
    def close(self) -> bool:
        """Whether they agree as two ways to compute the same thing do where nothing is cancelled."""
        if torch.equal(self.found, self.expected):
            return True
        if not self.expected.is_floating_point():
            return False
        finite = self._finite
        one, other = (t[finite].double() for t in (self.found, self.expected))
        allowed = TOLERANCES.get(self.expected.dtype, 0.1)
        return bool((one - other).norm() <= allowed * other.norm())  # False where one is NaN

    def wrong(self, truth: Tensor, largest: float) -> str | None:
        """What is wrong, in view of the result in float64 and of the largest value on the way to it."""
        finite = self._finite
        one, other, exact = (t[finite].double() for t in (self.found, self.expected, truth))
        error, rounding = float((one - exact).norm()), float((other - exact).norm())
        tolerance = TOLERANCES.get(self.expected.dtype, 0.1)
        allowed = tolerance * (float(exact.norm()) + largest) + 8 * rounding
        if error <= allowed:
            return None
        return f"off by {error:.3g}, eager PyTorch by {rounding:.3g}, of {float(exact.norm()):.3g}"
