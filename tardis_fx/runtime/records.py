"""Small records of numbers in the cache folder, one file each, which processes share."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tardis_fx.runtime.cache import cache_folder, is_trusted

_log = logging.getLogger("tardis_fx")


def read(name: str, fields: Sequence[str]) -> dict[str, float] | None:
    """A record with exactly these fields, each a positive number; None if there is none, or it is damaged."""
    try:
        path = cache_folder() / f"{name}.json"
        content = json.loads(path.read_text()) if is_trusted(path) else None
    except (OSError, RuntimeError, ValueError):  # the caller makes the record, and writing it tells why it is not kept
        return None
    if not isinstance(content, dict) or content.keys() != set(fields):
        return None
    valid = all(isinstance(value, float) and 0 < value < math.inf for value in content.values())
    return content if valid else None


def write(name: str, record: Mapping[str, float]) -> None:
    """Writes a record, which other processes see whole or not at all; warns if the cache folder cannot be written."""
    try:
        folder = cache_folder()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch, "record.json")
            path.write_text(json.dumps(record))
            path.replace(folder / f"{name}.json")
    except (OSError, RuntimeError) as error:
        _log.warning("%s; FFNs are timed again: set TARDIS_FX_CACHE to a folder that only you can write", error)
