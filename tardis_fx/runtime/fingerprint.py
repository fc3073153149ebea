"""The identity of a site: a hash of its weights and activation, independent of the module that holds them."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tardis_fx.digest import contents
from tardis_fx.runtime.snapshot import Snapshot

_KNOWN: dict[tuple[Any, ...], tuple[Snapshot, str]] = {}


def fingerprint(weights: Sequence[Tensor], function: str | None) -> str:
    """Hash of dtypes, shapes and contents of a site's weights, in order; remembered until one of them changes.

    It includes the site's :attr:`tardis_fx.graph.site.Site.function`, because the same weights may be used with another
    activation.
    """
    if any(weight.is_inference() for weight in weights):
        return content_hash(weights, function)
    snapshot, identity = _KNOWN.get((function, *map(id, weights)), (None, ""))
    if snapshot is None or not snapshot.holds_throughout(weights):
        snapshot = Snapshot(weights)  # before the contents are read
        remember(weights, function, identity := content_hash(weights, function), snapshot)
    return identity


def remember(weights: Sequence[Tensor], function: str | None, identity: str, snapshot: Snapshot | None = None) -> None:
    """Remembers a hash as the :func:`fingerprint` of weights until one of them changes.

    A change counts from the snapshot on, or from now on.
    """
    snapshot = snapshot or Snapshot(weights)
    for key in [key for key, (known, _) in list(_KNOWN.items()) if not known.alive]:
        _KNOWN.pop(key, None)
    _KNOWN[function, *map(id, weights)] = snapshot, identity


def content_hash(weights: Sequence[Tensor], function: str | None) -> str:
    """Computes the hash that :func:`fingerprint` remembers from the current weights."""
    digest = hashlib.sha256(str(function).encode())
    for weight in weights:
        digest.update(f"{weight.dtype}{tuple(weight.shape)}".encode())
        digest.update(contents(weight))
    return digest.hexdigest()[:32]
