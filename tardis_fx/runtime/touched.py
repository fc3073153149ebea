"""Counts the weight bytes that rewritten sites touch while a model runs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor

from tardis_fx.runtime import coded_reference, reference
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.correction import Correction

_COUNTING: list["Touched"] = []
#: Replace implementations that do not run Python by some that count, for as long as anything is counted.
_COUNTED: list[Callable[[], AbstractContextManager[None]]] = []
_REPLACED = ExitStack()


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

    def add(
        self, call: Correction | CodedFFN | CodedLinear, parts: coded_reference.Levels | None = None, site: int = 0
    ) -> None:
        """Adds the bytes of a call; in codes with the site's number, and of an FFN with the parts that it reads."""
        if isinstance(call, CodedLinear):
            read = _of_coded_linear(call, site)
        else:
            read = _of_correction(call) if isinstance(call, Correction) else _of_coded_ffn(call, parts, site)
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


def _of_coded_ffn(call: CodedFFN, parts: coded_reference.Levels | None, site: int) -> _Read:
    tokens, k, neuron = call.x.shape[:-1].numel(), len(call.projections), call.neuron
    up, value, row, column = (int(read.sum()) for read in parts or coded_reference.parts_read(call))
    touched = tokens * call.fixed_bytes + (k - 1) * up * neuron.projection + k * row * neuron.refinement
    touched += value * neuron.column + column * neuron.column_refinement
    return _Read(site, tokens, touched, value, tokens * len(call.columns))


def _of_coded_linear(call: CodedLinear, site: int) -> _Read:
    tokens = call.x.shape[:-1].numel()
    return _Read(site, tokens, tokens * call.bytes, 0, 0)


@contextmanager
def count_touched() -> Iterator[Touched]:
    """Counts, for every token on the rewritten path, the bytes of codes, fold, predictor and corrections.

    The reference computes the estimates again, so a model is slow while it is counted. On a CUDA device only models
    compiled with ``inner="eager"`` are counted, because Inductor's code contains the kernels and calls no op. A fold
    that ``int8_ffn`` has quantised counts as if it were in the model's dtype.
    """
    touched = Touched()
    if not _COUNTING:
        _replace()
    _COUNTING.append(touched)
    try:
        yield touched
    finally:
        _COUNTING.remove(touched)
        if not _COUNTING:
            _REPLACED.close()


def replace_again() -> None:
    """Replaces implementations that were registered while calls are counted."""
    if _COUNTING:
        _REPLACED.close()
        _replace()


def _replace() -> None:
    for implement in _COUNTED:
        _REPLACED.enter_context(implement())


@contextmanager
def uncounted() -> Iterator[None]:
    """Hides calls from the counters that are active outside of this context."""
    active = _COUNTING[:]
    _COUNTING.clear()
    _REPLACED.close()
    try:
        yield
    finally:
        if active:
            _replace()
        _COUNTING[:] = active


def count(call: CodedFFN | CodedLinear, parts: coded_reference.Levels | None, site: int) -> None:
    """Reports a call in codes, and the parts of an FFN that it reads, to active counters."""
    for touched in _COUNTING:
        touched.add(call, parts, site)


def counted_by(implement: Callable[[], AbstractContextManager[None]]) -> None:
    """Adds a context in which an op calls an implementation that counts."""
    _COUNTED.append(implement)


def counted(op: Callable[[Correction], Tensor]) -> Callable[[Correction], Tensor]:
    """Wraps an implementation of an op to report its calls to active counters."""

    def run(call: Correction) -> Tensor:
        output = op(call)  # first, because it checks the arguments
        for touched in _COUNTING:
            touched.add(call)
        return output

    return run


def _bytes_per_row(*tensors: Tensor) -> int:
    return sum(tensor.nbytes // len(tensor) for tensor in tensors)
