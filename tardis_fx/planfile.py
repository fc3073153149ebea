"""What a plan file holds beside its tensors, and the checks of it: nothing in a file is trusted.

The digest shows damage, but whoever writes a file can compute it. So every field is checked here, and every entry by
its rewrite before it is used (:mod:`tardis_fx.passes.entry`).
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from tardis_fx.errors import PlanFileError
from tardis_fx.tensorfile import check_digest, unique_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

FORMAT = "tardis_fx.plan"
#: Raised whenever a plan written now would be misread by older code.
VERSION = 5
#: Levels of lists and mappings in an entry's settings.
_DEEPEST = 32


def header_of(config: Mapping[str, Any], sites: Sequence[Mapping[str, Any]], same: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a plan file.

    Args:
        config: fields of the plan's config.
        sites: fields of each entry but its tensors.
        same: for each tensor that is in the file under another one's name, that name.

    Raises:
        ValueError: a field is not what :func:`content_of` would read.
        TypeError: likewise.
    """
    for site in sites:
        _check_fields(dict(site))
    text = json.dumps({"config": config, "sites": sites, "same": same})
    return {"format": FORMAT, "version": str(VERSION), "plan": text}


def content_of(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config's fields and each entry's, tensors included.

    Args:
        header: metadata of the file.
        tensors: all of the file's.

    Raises:
        PlanFileError: it is no plan, of another version, or damaged.
        Exception: it is damaged; of any kind that a lookup or a conversion raises.
    """
    if header.get("format") != FORMAT:
        raise PlanFileError("it is a safetensors file but no tardis_fx plan")
    version = int(header["version"])
    if version != VERSION:
        advice = "calibrate again" if version < VERSION else "upgrade tardis_fx"
        raise PlanFileError(f"it is a plan of version {version}, this tardis_fx reads {VERSION}: {advice}")
    check_digest(tensors, header)
    content = json.loads(header["plan"], object_pairs_hook=unique_pairs)
    config, sites, same = content["config"], content["sites"], content["same"]
    entries: list[dict[str, Any]] = [dict(site) for site in sites]
    for fields in entries:
        _check_fields(fields)
        fields |= {"shapes": tuple(map(tuple, fields["shapes"])), "tensors": {}}
    if both := sorted(same.keys() & tensors.keys()):
        raise KeyError(f"{both[0]} is in the file twice")
    for key, tensor in {**tensors, **{name: tensors[of] for name, of in same.items()}}.items():
        index, _, name = key.partition(".")
        if not re.fullmatch("0|[1-9][0-9]{0,8}", index):
            raise KeyError(f"tensor {key!r} is of no site")
        entries[int(index)]["tensors"][name] = tensor
    return dict(config), entries


def _check_fields(fields: dict[str, Any]) -> None:
    """Whether the fields of an entry are of the types and within the ranges that they are declared to be.

    Raises:
        ValueError: one is not, one is missing, or there are others.
    """
    if missing := _FIELDS.keys() ^ fields.keys():
        raise ValueError(f"an entry lacks fields or has others: {', '.join(sorted(missing))[:200]}")
    for name, (is_valid, wanted) in _FIELDS.items():
        if not is_valid(fields[name]):
            raise ValueError(f"{name} of an entry must be {wanted}, not {_shortened(fields[name])}")


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_text(value: Any) -> bool:
    """A string that can be printed: JSON can spell halves of characters."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return _is_size(value) or (isinstance(value, float) and 0 <= value < math.inf)


def _is_error(value: Any) -> bool:
    return _is_amount(value) or value == math.inf


def _are_shapes(value: Any) -> bool:
    listed = (list, tuple)
    return isinstance(value, listed) and all(isinstance(s, listed) and all(_is_size(n) and n for n in s) for s in value)


def _are_settings(value: Any) -> bool:
    return isinstance(value, dict) and _is_plain(value, _DEEPEST)


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_is_text(k) and _is_plain(v, depth - 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or _is_text(value)


def _optional(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


_SIZE, _AMOUNT = (_is_size, "a number of bytes"), (_is_amount, "a finite number, zero or more")
#: Of an entry, all but its tensors.
_FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fingerprint": (lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{1,128}", v), "a hexadecimal string"),
    "name": (_is_text, "a string"),
    "kind": (lambda v: v in ("plain", "gated"), "'plain' or 'gated'"),
    "activation": (_optional(_is_text), "a string or null"),
    "dtype": (_is_text, "a string"),
    "shapes": (_are_shapes, "a list of lists of positive sizes"),
    "dense_bytes": _SIZE,
    "method": (_optional(_is_text), "a string or null"),
    "reason": (_optional(_is_text), "a string or null"),
    "stored_bytes": _SIZE,
    "touched_bytes": _AMOUNT,
    "outlier_rate": _AMOUNT,
    "error": (_is_error, "a number, zero or more"),
    "settings": (_are_settings, "a mapping of plain, finite values"),
}
