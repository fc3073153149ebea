"""The identity of a site: a hash of its weights, whatever module holds them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Hash of dtypes, shapes and contents of a site's weights, in order.

    Args:
        weights: of any shapes, on any device.
    """
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{weight.dtype}{tuple(weight.shape)}".encode())
        contents = weight.detach().cpu().contiguous()
        digest.update(contents.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
