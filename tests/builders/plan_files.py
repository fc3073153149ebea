"""Plan files taken apart and put together again, whatever is in them."""

import io
import json
from typing import Any

from safetensors import SafetensorError

from tardis_fx.tensorfile import DIGEST, content_digest, read_from


def take_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a whole file, and the bytes behind it."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def put_together(header: Any, data: bytes) -> bytes:
    """The inverse of :func:`take_apart`."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def signed(content: bytes) -> bytes:
    """A file with the digest of its content, as somebody would write it who means harm; as it is where none fits."""
    try:
        tensors, header = read_from(io.BytesIO(content), len(content))
    except SafetensorError:
        return content
    whole, data = take_apart(content)
    whole.setdefault("__metadata__", {})[DIGEST] = content_digest(tensors, header)
    return put_together(whole, data)
