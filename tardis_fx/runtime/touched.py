"""Counts the weight bytes that rewritten sites touch while a model runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tardis_fx.runtime import reference, reference_gated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_COUNTING: list[Touched] = []


class Touched:
    """What was touched since counting began, by site."""

    def __init__(self) -> None:
        """Starts at zero."""
        self._tokens: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._corrected, self._pairs = 0, 0

    @property
    def per_token(self) -> float:
        """Bytes per token: each site's mean, summed over the sites."""
        return sum(self._bytes[site] / tokens for site, tokens in self._tokens.items() if tokens)

    @property
    def sites(self) -> int:
        """Number of sites that were counted."""
        return len(self._tokens)

    @property
    def outlier_rate(self) -> float:
        """Share of (token, neuron) pairs that were corrected, over all sites."""
        return self._corrected / max(1, self._pairs)

    def add(
        self, folded: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2t: Tensor, counts: Tensor, neurons: Tensor,
        codes: Tensor, scale: Tensor, zero: Tensor, lower: Tensor, upper: Tensor, slope: Tensor, intercept: Tensor,
        bits: int, activation: str, fold: Tensor | None = None, fold_bits: int = 16, row_bits: int = 16,
    ) -> None:  # fmt: skip
        """Adds one call of the op, as :func:`tardis_fx.runtime.reference.correct` takes it."""
        tokens = x.reshape(-1, x.shape[-1]).to(reference.compute_dtype(x.dtype))
        outlier = reference.outliers(tokens, counts, codes, scale, zero, lower, upper, bits)
        corrected = [t for t in (w1, w2t, b1, slope, intercept, neurons) if t is not None]
        row, tested = _bytes_a_row(*corrected), _bytes_a_row(codes, scale, zero, lower, upper)
        weight = folded.shape[-1] * x.shape[-1] * folded.element_size() if fold is None else fold.nbytes
        fixed = weight + folded.shape[-1] * folded.element_size() + tested * int(counts[1])
        site = codes.data_ptr()
        self._tokens[site] = self._tokens.get(site, 0) + len(tokens)
        self._bytes[site] = self._bytes.get(site, 0) + fixed * len(tokens) + row * int(outlier.sum())
        self._corrected += int(outlier.sum())
        self._pairs += len(tokens) * len(w1)

    def add_gated(
        self, folded: Tensor, x: Tensor, gate: Tensor, up: Tensor, w2t: Tensor, counts: Tensor, neurons: Tensor,
        codes: Tensor, scale: Tensor, zero: Tensor, biases: Tensor | None, guard: Tensor, surrogate: Tensor,
        bits: int, activation: str, fold: Tensor | None = None, fold_bits: int = 16, row_bits: int = 16,
    ) -> None:  # fmt: skip
        """Adds one call of the op, as :func:`tardis_fx.runtime.reference_gated.correct` takes it."""
        tokens = x.reshape(-1, x.shape[-1]).to(reference.compute_dtype(x.dtype))
        outlier = reference_gated.outliers(tokens, counts, codes, scale, zero, biases, guard, bits, activation)
        own = () if biases is None else (biases,)
        weight = folded.shape[-1] * x.shape[-1] * folded.element_size() if fold is None else fold.nbytes
        fixed = weight + folded.shape[-1] * folded.element_size()
        fixed += _bytes_a_row(codes, scale, zero, guard, *own) * int(counts[1])
        row = _bytes_a_row(gate, up, w2t, neurons, surrogate, *own)
        site = codes.data_ptr()
        self._tokens[site] = self._tokens.get(site, 0) + len(tokens)
        self._bytes[site] = self._bytes.get(site, 0) + fixed * len(tokens) + row * int(outlier.sum())
        self._corrected += int(outlier.sum())
        self._pairs += len(tokens) * len(gate)


@contextmanager
def count_touched() -> Iterator[Touched]:
    """Counts, for every token on the rewritten path, the bytes of fold, predictor and corrections.

    The estimates are computed once more, by the reference: a model is slow while it is counted. On a CUDA device only
    models compiled with ``inner="eager"`` are counted: Inductor's code has the kernels in it, and calls no op. A fold
    that ``int8_ffn`` has put into integers counts as if it were in the model's dtype.
    """
    touched = Touched()
    _COUNTING.append(touched)
    try:
        yield touched
    finally:
        _COUNTING.remove(touched)


def counted(correct: Callable[..., Tensor], add: Callable[..., None]) -> Callable[..., Tensor]:
    """An implementation of an op that also shows its calls, by a method of Touched, to whatever is counting."""

    def run(*args: object) -> Tensor:
        corrected = correct(*args)  # first: it checks its arguments
        for touched in _COUNTING:
            add(touched, *args)
        return corrected

    return run


def _bytes_a_row(*tensors: Tensor) -> int:
    return sum(tensor.nbytes // len(tensor) for tensor in tensors)
