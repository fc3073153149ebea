"""Hashes the values that a file is keyed by: weights, text, settings."""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def digest(*parts: Any) -> str:
    """Hash of the contents of tensors, mappings, sequences and plain values."""
    sha = hashlib.sha256()
    _feed(sha, parts)
    return sha.hexdigest()[:32]


def contents(tensor: Tensor) -> memoryview:
    """Bytes of a tensor's elements in order, without a copy where the tensor is contiguous and on a CPU.

    A NumPy view of this memory would make the tensor's storage impossible to resize.
    """
    elements = tensor.detach().cpu().contiguous()
    buffer: Any = (ctypes.c_char * elements.nbytes).from_address(elements.data_ptr())
    buffer.owner = elements  # lives as long as the view
    return memoryview(buffer).cast("B")


def _feed(sha: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        sha.update(f"tensor {part.dtype} {tuple(part.shape)}".encode())
        sha.update(contents(part))
    elif isinstance(part, Mapping):
        _feed(sha, [item for name in sorted(part) for item in (name, part[name])])
    elif isinstance(part, Sequence) and not isinstance(part, str):
        sha.update(f"sequence {len(part)}".encode())
        for item in part:
            _feed(sha, item)
    else:
        sha.update(f"value {part!r}".encode())
