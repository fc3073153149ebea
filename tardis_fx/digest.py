"""A hash of whatever a file is keyed by: weights, text, settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """Hash of tensors, mappings, sequences and plain values, contents and all."""
    sha = hashlib.sha256()
    _feed(sha, parts)
    return sha.hexdigest()[:32]


def _feed(sha: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        sha.update(f"tensor {part.dtype} {tuple(part.shape)}".encode())
        sha.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        _feed(sha, [item for name in sorted(part) for item in (name, part[name])])
    elif isinstance(part, Sequence) and not isinstance(part, str):
        sha.update(f"sequence {len(part)}".encode())
        for item in part:
            _feed(sha, item)
    else:
        sha.update(f"value {part!r}".encode())
