"""A hash of whatever a file is keyed by: weights, text, settings."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def digest(*parts: Any) -> str:
    """Hash of tensors, mappings, sequences and plain values, contents and all."""
    sha = hashlib.sha256()
    _feed(sha, parts)
    return sha.hexdigest()[:32]


def contents(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order; of a contiguous one on a CPU, its memory.

    A NumPy view of that would leave the tensor's storage unable to be resized.
    """
    own = tensor.detach().cpu().contiguous()
    buffer: Any = (ctypes.c_char * own.nbytes).from_address(own.data_ptr())
    buffer.owner = own  # lives as long as the view
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
