"""Ways in which a plan file can be damaged, by accident or by intent: each makes bytes of bytes."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from builders.plan_files import put_together, take_apart

_EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 128, 2**31, 2**63, -(2**63), 10**400, 0.0,
    -0.5, 0.5, 4.0, 1e308, float("nan"), float("inf"), "", "0", "gelu", "relu", "plain", "gated", "torch.float16",
    "guarded_fold", "low_rank", "exact_fold", "wanda+int8_ffn", "finetuned", "drop_bias+hot_fold", "\ud800", [], {},
    [[]], [[1, 2], [3]], {"inner": {}}, {"first": {}, "second": {}},
)  # fmt: skip
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F3", "")


def flip(content: bytes, draw: random.Random) -> bytes:
    """Changes up to eight bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
    return bytes(changed)


def fill(content: bytes, draw: random.Random) -> bytes:
    """Sets a run of bytes to zeros or ones."""
    start, size = draw.randrange(len(content)), draw.choice((4, 64, 4096))
    stop = min(len(content), start + size)
    return content[:start] + draw.choice((b"\0", b"\xff")) * (stop - start) + content[stop:]


def copy(content: bytes, draw: random.Random) -> bytes:
    """Copies a run of bytes to another place."""
    size = min(draw.choice((4, 64, 1024)), len(content))
    source, target = (draw.randrange(len(content) - size + 1) for _ in range(2))
    return content[:target] + content[source : source + size] + content[target + size :]


def cut(content: bytes, draw: random.Random) -> bytes:
    """Ends the file before its end, or takes bytes out of it."""
    start = draw.randrange(len(content))
    return content[:start] + (content[start + draw.choice((1, 8, 64)) :] if draw.random() < 0.5 else b"")


def extend(content: bytes, draw: random.Random) -> bytes:
    """Puts bytes into the file, or behind it."""
    at = draw.choice((len(content), draw.randrange(len(content))))
    return content[:at] + draw.randbytes(draw.choice((1, 8, 4096))) + content[at:]


def length(content: bytes, draw: random.Random) -> bytes:
    """Claims another length of the header."""
    own = int.from_bytes(content[:8], "little")
    claimed = draw.choice((0, 1, 7, own - 1, own + 1, own * 2, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1))
    return max(0, claimed).to_bytes(8, "little") + content[8:]


def layout(content: bytes, draw: random.Random) -> bytes:
    """Changes what the header says of a tensor."""
    header, data = take_apart(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    tensor, how = header[name], draw.randrange(6)
    if how == 0:
        tensor["dtype"] = draw.choice(_DTYPES)
    elif how == 1 and tensor["shape"]:
        tensor["shape"][draw.randrange(len(tensor["shape"]))] += draw.choice((-1, 1, 2**40))
    elif how == 2:
        tensor["shape"] = draw.choice((tensor["shape"][::-1], [*tensor["shape"], 1], [], [0], [1, *tensor["shape"]]))
    elif how == 3:
        tensor["data_offsets"][draw.randrange(2)] += draw.choice((-8, -1, 1, 4, 2**40))
    elif how == 4:
        key = draw.choice([key for key in header if key != "__metadata__"])
        header[name], header[key] = header[key], header[name]
    else:
        index, _, rest = name.partition(".")
        other = draw.choice((f"{int(index) + 1}.{rest}", f"{index}.{rest}x", f"9{rest}", f"-1.{rest}", rest, "0.", "."))
        header[other] = header.pop(name)
    return put_together(header, data)


def same_bytes(content: bytes, draw: random.Random) -> bytes:
    """Reads a tensor's bytes as another dtype or shape of as many bytes, or leaves the tensor away with its bytes."""
    header, data = take_apart(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    tensor = header[name]
    begin, end = tensor["data_offsets"]
    if draw.random() < 0.3:
        del header[name]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
        return put_together(header, data[:begin] + data[end:])
    dtype, size = draw.choice((("U8", 1), ("I32", 4), ("F16", 2), ("BF16", 2), ("F32", 4), ("I64", 8)))
    rows = draw.choice((1, *tensor["shape"], 2))
    if rows and (end - begin) % (size * rows) == 0:
        header[name] = {"dtype": dtype, "shape": [rows, (end - begin) // size // rows], "data_offsets": [begin, end]}
        if draw.random() < 0.5:
            header[name]["shape"] = [(end - begin) // size]
    return put_together(header, data)


def values(content: bytes, draw: random.Random) -> bytes:
    """Sets elements of a tensor to extreme ones."""
    header, data = take_apart(content)
    name = draw.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    extremes = {
        "F32": torch.tensor([0, -1, 1e38, torch.inf, -torch.inf, torch.nan], dtype=torch.float32, device="cpu"),
        "F16": torch.tensor([0, -1, 65504, torch.inf, torch.nan], dtype=torch.float16, device="cpu"),
        "I32": torch.tensor([0, -1, 31, 32, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cpu"),
    }.get(header[name]["dtype"], torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8, device="cpu"))
    size, changed = extremes.element_size(), bytearray(data)
    if end - begin >= size:
        for _ in range(draw.choice((1, 4, 64))):
            at = begin + size * draw.randrange((end - begin) // size)
            changed[at : at + size] = (
                extremes[draw.randrange(len(extremes))].view(1).view(torch.uint8).numpy().tobytes()
            )
    return put_together(header, bytes(changed))


def content(content: bytes, draw: random.Random) -> bytes:
    """Changes a node of the plan's JSON."""
    header, data = take_apart(content)
    plan = json.loads(header["__metadata__"]["plan"])
    where, key = draw.choice(_nodes(plan))
    how = draw.randrange(5)
    if how == 0:
        del where[key]
    elif how == 1 and type(where[key]) in (int, float):
        where[key] += draw.choice((-1, 1, 64))
    elif how == 2 and isinstance(where, list):
        where.append(where[key])
    elif how == 3:
        other, its = draw.choice(_nodes(plan))
        where[key] = json.loads(json.dumps(other[its]))
    else:
        where[key] = draw.choice(_EXTREMES)
    header["__metadata__"]["plan"] = json.dumps(plan)
    return put_together(header, data)


def metadata(content: bytes, draw: random.Random) -> bytes:
    """Changes an item of the metadata."""
    header, data = take_apart(content)
    own, name = header["__metadata__"], draw.choice(("version", "format", "digest", "plan", "more"))
    text = draw.choice(
        ("", "0", "3", "9" * 5000, "{}", "[" * 10**5, '{"config": {}, "sites": [], "same": {}}', 3, None)
    )
    if draw.random() < 0.3:
        own.pop(name, None)
    else:
        own[name] = text
    return put_together(header, data)


#: By name; the first of them damage blindly, and the others know what a plan file is.
MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (flip, fill, copy, cut, extend, length, layout, same_bytes, values, content, metadata)
}
#: Those after which the numbers in a plan are still numbers that a calibration made.
HARMLESS_TO_NUMBERS = frozenset({"content", "metadata", "length"})


def _nodes(tree: Any) -> Sequence[tuple[Any, Any]]:
    """Every place in a JSON value, as container and key."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        pending += [node[key] for key in keys]
    return found
