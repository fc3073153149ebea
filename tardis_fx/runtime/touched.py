"""Counts the weight bytes that rewritten sites touch while a model runs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import Tensor

from tardis_fx.runtime import coded_reference, reference
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.correction import Correction

#: The call of an op.
Call = TypeVar("Call", Correction, CodedFFN)

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

    def add(self, call: Correction | CodedFFN, parts: coded_reference.Levels | None = None) -> None:
        """Adds the bytes of one call of an op; of :class:`CodedFFN` with the parts that it reads, if they are known."""
        read = _of_correction(call) if isinstance(call, Correction) else _of_coded_ffn(call, parts)
        self._tokens[read.site] += read.tokens
        self._bytes[read.site] += read.bytes
        self._corrected += read.corrected
        self._pairs += read.pairs


class _Read(NamedTuple):
    """What one call read.

    Attributes:
        site: a number of the site.
        tokens: number of tokens.
        bytes: weight bytes, as if each token read its own.
        corrected: number of (token, neuron) pairs that were corrected, or whose column was read.
        pairs: number of (token, neuron) pairs.
    """

    site: int
    tokens: int
    bytes: int
    corrected: int
    pairs: int


def _of_correction(call: Correction) -> _Read:
    outlier, d_out = reference.outliers(call), call.folded.shape[-1]
    corrected = [*call.projections, call.columns, call.surrogate, call.neurons]
    tested = [call.codes, call.scale, call.zero, call.guard]
    if call.biases is not None:
        corrected.append(call.biases)
        tested += [call.biases] * (len(call.projections) > 1)  # the bounds of a single estimate exclude its bias
    weight = d_out * call.x.shape[-1] * call.folded.element_size() if call.fold is None else call.fold.nbytes
    fixed = weight + d_out * call.folded.element_size() + _bytes_per_row(*tested) * int(call.counts[1])
    tokens, outliers = len(outlier), int(outlier.sum())
    touched = fixed * tokens + _bytes_per_row(*corrected) * outliers
    return _Read(call.codes.data_ptr(), tokens, touched, outliers, tokens * len(call.columns))


def _of_coded_ffn(call: CodedFFN, parts: coded_reference.Levels | None) -> _Read:
    tokens, k, neuron = call.x.shape[:-1].numel(), len(call.projections), call.neuron
    up, value, row, column = (int(read.sum()) for read in parts or coded_reference.parts_read(call))
    touched = tokens * call.fixed_bytes + (k - 1) * up * neuron.projection + k * row * neuron.refinement
    touched += value * neuron.column + column * neuron.column_refinement
    return _Read(call.columns.data_ptr(), tokens, touched, value, tokens * len(call.columns))


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


@contextmanager
def uncounted() -> Iterator[None]:
    """Hides calls from the counters that are active outside of this context."""
    active = _COUNTING[:]
    _COUNTING.clear()
    try:
        yield
    finally:
        _COUNTING[:] = active


def counted(op: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
    """Wraps an implementation of an op to report its calls to active counters."""

    def run(call: Call) -> Tensor:
        output = op(call)  # first, because it checks the arguments
        for touched in _COUNTING:
            touched.add(call)
        return output

    return run


def _bytes_per_row(*tensors: Tensor) -> int:
    return sum(tensor.nbytes // len(tensor) for tensor in tensors)
