"""Snapshots of weights, which detect whether tensors have changed since a value was derived from them.

PyTorch counts most writes in a tensor's version. It does not count fused optimisers, NumPy views, DLPack, collectives,
shared memory and ``untyped_storage().copy_``. Two checks find these writes: every optimiser's step increments the
versions of the weights that snapshots watch, and a few cache lines of each weight are compared with copies of them.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from tardis_fx.errors import StaleWeightError
from tardis_fx.graph.site import is_freed

#: Number of cache lines of each weight that are copied, and number that one call compares.
LINES, LINES_PER_CALL = 64, 2
_LINE = 64  # bytes
_CANDIDATES = 4  # number of candidates for each line

_version = attrgetter("_version")


class Snapshot:
    """State of tensors at one time: ids, storages, offsets, strides, sizes, versions, and samples of content.

    It keeps neither the tensors nor their storages alive. It identifies the tensors by their ids, because
    ``torch.utils.swap_tensors`` refuses tensors with weak references. A new tensor that gets the id of an old one has
    another storage or, with the same storage, another version.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Takes a snapshot of tensors; contents are sampled only on a CPU.

        Raises:
            StaleWeightError: a tensor is an inference tensor, which has no version, or its storage was freed.
        """
        if any(map(is_freed, tensors)):  # reading it would crash the process
            raise StaleWeightError("the storage of a weight was freed: restore it before the model is called")
        self.ids = tuple(map(id, tensors))
        # While a weak reference exists, no other storage takes the address.
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._state = _state(tensors)
        self._sample = _Sample([tensor for tensor in tensors if tensor.device.type == "cpu"])
        _WATCHED.update(dict.fromkeys(self.ids, self))

    @property
    def alive(self) -> bool:
        """Whether all storages still exist."""
        return not any(storage.expired() for storage in self._storages)  # type: ignore[no-untyped-call]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors with the same ids are unchanged; compares a few lines of each."""
        return self._state == _state(tensors) and self._sample.next_lines_match()

    def holds_throughout(self, tensors: Sequence[Tensor]) -> bool:
        """Like :meth:`holds`, but compares every copied line."""
        return self._state == _state(tensors) and self._sample.all_lines_match()


def _state(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    try:
        return (
            *map(_version, tensors),
            *map(Tensor.data_ptr, tensors),
            *map(_storage_address, tensors),
            *map(Tensor.size, tensors),
            *map(Tensor.stride, tensors),
        )
    except RuntimeError as error:
        raise StaleWeightError(
            "a weight is an inference tensor, whose changes cannot be detected: clone it outside inference mode"
        ) from error


_storage_address: Callable[[Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]

#: The last snapshot of each tensor, by id.
_WATCHED: weakref.WeakValueDictionary[int, Snapshot] = weakref.WeakValueDictionary()


def _count_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Counts an optimiser's step as a write to the watched weights, because fused optimisers do not."""
    parameters = (parameter for group in optimiser.param_groups for parameter in group["params"])
    torch.autograd.graph.increment_version([parameter for parameter in parameters if id(parameter) in _WATCHED])


register_optimizer_step_post_hook(_count_step)  # type: ignore[arg-type]


class _Sample:
    """Copies of cache lines of tensors, in rounds of one line per tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        lines = [_lines(tensor) for tensor in tensors if tensor.numel()]
        self._count, self._next = len(lines), 0
        # Addresses are [rounds, tensors], copies [rounds, tensors, bytes].
        self._addresses = np.array([addresses for addresses, _ in lines], dtype=np.int64).T.copy()
        self._sizes = np.array([[size] * LINES for _, size in lines], dtype=np.int64).T.copy()
        self._copies = np.zeros((LINES, self._count, _LINE), dtype=np.uint8)
        for line in np.ndindex(self._sizes.shape):
            ctypes.memmove(self._copies[line].ctypes.data, int(self._addresses[line]), int(self._sizes[line]))
        self._pointers = tuple(array.ctypes.data for array in (self._addresses, self._sizes, self._copies))

    def next_lines_match(self) -> bool:
        first, self._next = self._next, (self._next + LINES_PER_CALL) % LINES
        return not self._count or self._match(first, LINES_PER_CALL)

    def all_lines_match(self) -> bool:
        return not self._count or self._match(0, LINES)

    def _match(self, first: int, rounds: int) -> bool:
        start, (addresses, sizes, copies) = first * self._count, self._pointers
        lines = rounds * self._count
        return _comparison()(addresses + 8 * start, sizes + 8 * start, copies + _LINE * start, lines) == 0


@cache
def _comparison() -> Callable[[int, int, int, int], int]:
    """The function that counts the lines that differ from their copies, in C++ if the kernel is available."""
    from tardis_fx.runtime.cpu import build as cpu_build

    library = cpu_build.load()
    if library is None:
        return _differing_lines
    function: Any = library.tardis_differing_lines
    function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64], ctypes.c_int64
    return function  # type: ignore[no-any-return]


def _differing_lines(addresses: int, sizes: int, copies: int, lines: int) -> int:
    at = (ctypes.c_int64 * lines).from_address(addresses)
    size = (ctypes.c_int64 * lines).from_address(sizes)
    return sum(ctypes.string_at(at[i], size[i]) != ctypes.string_at(copies + _LINE * i, size[i]) for i in range(lines))


def _lines(tensor: Tensor) -> tuple[list[int], int]:
    """Addresses of ``LINES`` runs of adjacent elements, spread evenly over a tensor, and the bytes of each run.

    Each run is the first of a few candidates that has a bit set, because a scaled zero would look unchanged.
    """
    axes = sorted(range(tensor.dim()), key=tensor.stride)
    sizes, strides = [tensor.size(axis) for axis in axes], [tensor.stride(axis) for axis in axes]
    width = tensor.element_size()
    run = min(sizes[0], _LINE // width) if strides and strides[0] == 1 else 1
    places = np.arange(LINES)[:, None] + np.random.default_rng(LINES).random((LINES, _CANDIDATES))
    rest = (places * (tensor.numel() // run) / LINES).astype(np.int64) * run  # positions, axis by axis
    offsets = np.zeros_like(rest)
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        rest, index = np.divmod(rest, size)
        offsets += stride * (np.minimum(index, size - run) if axis == 0 else index)
    candidates, size = (tensor.data_ptr() + width * offsets).tolist(), run * width
    return [next((a for a in row if any(ctypes.string_at(a, size))), row[0]) for row in candidates], size
