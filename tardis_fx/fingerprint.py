"""The identity of a site: a hash of its weights and activation, whatever module holds them."""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# By the identities of a site's tensors, for as long as they all live; the aliases keep an address from another's use.
_KNOWN: dict[tuple[Any, ...], tuple[list[int], str, list[Tensor], list[weakref.ref[Tensor]]]] = {}


def fingerprint(weights: Sequence[Tensor], function: str | None) -> str:
    """Hash of dtypes, shapes and contents of a site's weights, in order; remembered until one of them changes.

    Args:
        weights: of any shapes, on any device.
        function: what the site computes of them (:attr:`tardis_fx.graph.site.Site.function`), for the same weights may
            serve with another activation.
    """
    if any(weight.is_inference() for weight in weights):
        return _hash(weights, function)
    known = _KNOWN.get((function, *map(id, weights)))
    if known is None or known[0] != _state(weights):
        remember(weights, function, found := _hash(weights, function))
        return found
    return known[1]


def remember(weights: Sequence[Tensor], function: str | None, identity: str) -> None:
    """Takes a hash for that of a site's weights, until one of them changes.

    Args:
        weights: as of :func:`fingerprint`.
        function: likewise.
        identity: the hash of what the weights were.
    """
    key = (function, *map(id, weights))
    aliases = [weight.detach() for weight in weights]
    ends = [weakref.ref(weight, lambda _: _KNOWN.pop(key, None)) for weight in weights]
    _KNOWN[key] = _state(weights), identity, aliases, ends


def _state(weights: Sequence[Tensor]) -> list[int]:
    return [v for w in weights for v in (w.data_ptr(), w._version)]


def _hash(weights: Sequence[Tensor], function: str | None) -> str:
    digest = hashlib.sha256(str(function).encode())
    for weight in weights:
        digest.update(f"{weight.dtype}{tuple(weight.shape)}".encode())
        contents = weight.detach().cpu().contiguous()
        digest.update(contents.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
