"""Writes and checks the metadata of a plan file; nothing in a file is trusted.

The digest detects damage, but anybody who writes a file can compute it. So every field is checked here, and every
entry is checked by its rewrite before it is used (:mod:`tardis_fx.passes.entry`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tardis_fx.errors import PlanFileError, reasons
from tardis_fx.tensorfile import check_digest, unique_pairs

FORMAT = "tardis_fx.plan"
#: Incremented whenever older code would misread a new plan.
VERSION = 6
#: Maximum nesting of lists and mappings in an entry's settings.
_DEEPEST = 32


def header_of(
    config: Mapping[str, Any], sites: Sequence[Mapping[str, Any]], same: Mapping[str, str], kl: float | None
) -> dict[str, str]:
    """Makes the metadata of a plan file.

    Args:
        config: fields of the plan's config.
        sites: fields of each entry except its tensors.
        same: name of the stored tensor for each tensor that the file holds under another name.
        kl: of the plan.

    Raises:
        ValueError: :func:`content_of` would reject a field.
        TypeError: a field has a type that JSON cannot hold.
    """
    for site in sites:
        _check_fields(site)
    text = json.dumps({"config": config, "sites": sites, "same": same, "kl": kl})
    return {"format": FORMAT, "version": str(VERSION), "plan": text}


def content_of(
    header: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[dict[str, Any]], float | None]:
    """Reads the fields of the config and of each entry, including tensors, and the divergence.

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
    kl = content.get("kl")
    if kl is not None and not (isinstance(kl, float) and 0 <= kl < math.inf):
        raise ValueError(f"its KL divergence is {kl!r:.80}")
    return dict(config), entries, kl


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Checks that the fields of an entry have their declared types and ranges.

    Raises:
        ValueError: a field is invalid, missing or unknown.
    """
    try:
        (_KeptFields if "reason" in fields else _RewrittenFields)(**fields)
    except ValidationError as error:
        raise ValueError(f"an entry has invalid fields: {reasons(error)}") from None


def _plain(value: Any, depth: int = _DEEPEST) -> Any:
    """Checks that a value is a mapping, list, number, string, bool or None that JSON can hold; numbers are finite."""
    if isinstance(value, (dict, list, tuple)):
        if depth == 0:
            raise ValueError(f"is nested in more than {_DEEPEST} levels")
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            _plain(part, depth - 1)
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            raise ValueError("has a name that is not a string")
    elif isinstance(value, str):
        _encodable(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("has a number that is not finite")
    elif not isinstance(value, (int, float, type(None))) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError("has a value that JSON cannot hold, or a huge number")
    return value


def _encodable(text: str) -> str:
    """Checks that UTF-8 can encode a text, which unpaired surrogates prevent; JSON can hold them."""
    text.encode()  # raises a ValueError
    return text


_Text = Annotated[str, AfterValidator(_encodable)]
_Size = Annotated[int, Field(ge=0, lt=2**63)]
_Amount = Annotated[float, Field(ge=0, lt=math.inf)]


class _Fields(BaseModel):
    """Fields of every entry."""

    model_config = ConfigDict(strict=True, extra="forbid")
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{1,128}$")]
    name: _Text
    kind: Literal["plain", "gated", "linear"]
    activation: _Text | None
    dtype: _Text
    shapes: Sequence[Sequence[Annotated[int, Field(gt=0, lt=2**63)]]]
    dense_bytes: _Size


class _KeptFields(_Fields):
    """Fields of a site that is not rewritten."""

    reason: _Text


class _RewrittenFields(_Fields):
    """Fields of a rewritten site, except its tensors."""

    method: _Text
    stored_bytes: _Size
    touched_bytes: _Amount
    outlier_rate: _Amount
    error: Annotated[float, Field(ge=0)]
    settings: Annotated[dict[str, Any], AfterValidator(_plain)]
