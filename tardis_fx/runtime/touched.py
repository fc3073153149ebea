"""Counts the weight bytes that rewritten sites touch while a model runs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import Correction

_COUNTING: list["Touched"] = []


class Touched:
    """Weight bytes touched since counting began, by site."""

    def __init__(self) -> None:
        self._tokens, self._bytes = Counter[int](), Counter[int]()  # by site
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
    def tokens(self) -> int:
        """Number of tokens that rewritten sites computed, summed over the sites."""
        return self._tokens.total()

    @property
    def outlier_rate(self) -> float:
        """Share of (token, neuron) pairs that were corrected, over all sites."""
        return self._corrected / max(1, self._pairs)

    def add(self, call: Correction) -> None:
        """Adds the bytes of one call of the op."""
        outlier, d_out = reference.outliers(call), call.folded.shape[-1]
        corrected = [*call.projections, call.columns, call.surrogate, call.neurons]
        tested = [call.codes, call.scale, call.zero, call.guard]
        if call.biases is not None:
            corrected.append(call.biases)
            tested += [call.biases] * (len(call.projections) > 1)  # the bounds of a single estimate exclude its bias
        weight = d_out * call.x.shape[-1] * call.folded.element_size() if call.fold is None else call.fold.nbytes
        fixed = weight + d_out * call.folded.element_size() + _bytes_per_row(*tested) * int(call.counts[1])
        tokens, site = len(outlier), call.codes.data_ptr()
        self._tokens[site] += tokens
        self._bytes[site] += fixed * tokens + _bytes_per_row(*corrected) * int(outlier.sum())
        self._corrected += int(outlier.sum())
        self._pairs += tokens * len(call.columns)


@contextmanager
def count_touched() -> Iterator[Touched]:
    """Counts, for every token on the rewritten path, the bytes of fold, predictor and corrections.

    The reference computes the estimates again, so a model is slow while it is counted. On a CUDA device only models
    compiled with ``inner="eager"`` are counted, because Inductor's code contains the kernels and calls no op. A fold
    that ``int8_ffn`` has quantised counts as if it were in the model's dtype.
    """
    touched = Touched()
    _COUNTING.append(touched)
    try:
        yield touched
    finally:
        _COUNTING.remove(touched)


def counted(correct: Callable[[Correction], Tensor]) -> Callable[[Correction], Tensor]:
    """Wraps an implementation of the op to report its calls to active counters."""

    def run(call: Correction) -> Tensor:
        corrected = correct(call)  # first, because it checks the arguments
        for touched in _COUNTING:
            touched.add(call)
        return corrected

    return run


def _bytes_per_row(*tensors: Tensor) -> int:
    return sum(tensor.nbytes // len(tensor) for tensor in tensors)
