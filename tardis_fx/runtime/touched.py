"""Counts the weight bytes that rewritten sites touch while a model runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tardis_fx.calibration.ranges import Costs
from tardis_fx.runtime import reference

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
        size = folded.element_size()
        costs = Costs.of(x.shape[-1], folded.shape[-1], bits, size, fold_bits, row_bits, bias=b1 is not None)
        fixed = costs.fold + costs.predictor * int(counts[1])
        site = codes.data_ptr()
        self._tokens[site] = self._tokens.get(site, 0) + len(tokens)
        self._bytes[site] = self._bytes.get(site, 0) + fixed * len(tokens) + costs.row * int(outlier.sum())
        self._corrected += int(outlier.sum())
        self._pairs += len(tokens) * len(w1)


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


def counted(correct: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation of the op that also shows its calls to whatever is counting."""

    def run(*args: object) -> Tensor:
        for touched in _COUNTING:
            touched.add(*args)  # type: ignore[arg-type]
        return correct(*args)

    return run
