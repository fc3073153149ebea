"""Writes and checks the metadata of a plan file; nothing in a file is trusted.

The digest detects damage, but anybody who writes a file can compute it. So every field is checked here, and every
entry is checked by its rewrite before it is used (:mod:`tardis_fx.passes.entry`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tardis_fx.errors import PlanFileError
from tardis_fx.tensorfile import check_digest, unique_pairs

FORMAT = "tardis_fx.plan"
#: Incremented whenever older code would misread a new plan.
VERSION = 5
#: Maximum nesting of lists and mappings in an entry's settings.
_DEEPEST = 32


def header_of(config: Mapping[str, Any], sites: Sequence[Mapping[str, Any]], same: Mapping[str, str]) -> dict[str, str]:
    """Makes the metadata of a plan file.

    Args:
        config: fields of the plan's config.
        sites: fields of each entry except its tensors.
        same: name of the stored tensor for each tensor that the file holds under another name.

    Raises:
        ValueError: :func:`content_of` would reject a field.
        TypeError: a field has a type that JSON cannot hold.
    """
    for site in sites:
        _check_fields(dict(site))
    text = json.dumps({"config": config, "sites": sites, "same": same})
    return {"format": FORMAT, "version": str(VERSION), "plan": text}


def content_of(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads the fields of the config and of each entry, including tensors.

    Args:
        header: metadata of the file.
        tensors: all tensors of the file.

    Raises:
        PlanFileError: the file is not a plan, is of another version, or is damaged.
        Exception: the file is damaged; any exception that a lookup or a conversion raises.
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
        fields |= {"shapes": tuple(map(tuple, fields["shapes"]))}
        if "method" in fields:
            fields["tensors"] = {}
    if both := sorted(same.keys() & tensors.keys()):
        raise KeyError(f"{both[0]} is in the file twice")
    for key, tensor in {**tensors, **{name: tensors[of] for name, of in same.items()}}.items():
        index, _, name = key.partition(".")
        if not re.fullmatch("0|[1-9][0-9]{0,8}", index):
            raise KeyError(f"tensor {key!r} is of no site")
        entries[int(index)]["tensors"][name] = tensor
    return dict(config), entries


def _check_fields(fields: dict[str, Any]) -> None:
    """Checks that the fields of an entry have their declared types and ranges.

    Raises:
        ValueError: a field is invalid, missing or unknown.
    """
    known = _SITE | (_KEPT if "reason" in fields else _REWRITTEN)
    if missing := known.keys() ^ fields.keys():
        raise ValueError(f"an entry lacks fields or has others: {', '.join(sorted(missing))[:200]}")
    for name, (is_valid, wanted) in known.items():
        if not is_valid(fields[name]):
            raise ValueError(f"{name} of an entry must be {wanted}, not {_shortened(fields[name])}")


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_text(value: Any) -> bool:
    """Whether the value is a printable string; JSON can encode unpaired surrogates."""
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


_Fields = dict[str, tuple[Callable[[Any], Any], str]]
_SIZE, _AMOUNT = (_is_size, "a number of bytes"), (_is_amount, "a finite number, zero or more")
#: Fields of every entry.
_SITE: _Fields = {
    "fingerprint": (lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{1,128}", v), "a hexadecimal string"),
    "name": (_is_text, "a string"),
    "kind": (lambda v: v in ("plain", "gated"), "'plain' or 'gated'"),
    "activation": (_optional(_is_text), "a string or null"),
    "dtype": (_is_text, "a string"),
    "shapes": (_are_shapes, "a list of lists of positive sizes"),
    "dense_bytes": _SIZE,
}
#: Further fields of a site that is not rewritten.
_KEPT: _Fields = {"reason": (_is_text, "a string")}
#: Further fields of a rewritten site, except its tensors.
_REWRITTEN: _Fields = {
    "method": (_is_text, "a string"),
    "stored_bytes": _SIZE,
    "touched_bytes": _AMOUNT,
    "outlier_rate": _AMOUNT,
    "error": (_is_error, "a number, zero or more"),
    "settings": (_are_settings, "a mapping of plain, finite values"),
}
