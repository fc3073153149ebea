"""Reads and writes safetensors files: writes are atomic, reads copy, and each file carries a digest.

``safetensors.safe_open`` maps a file into memory. A tensor that it returns changes when the file is overwritten, and
reading it ends the process when the file is truncated. This module therefore reads the bytes into new tensors.
"""

import contextlib
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tardis_fx.digest import digest

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: Name of the digest among the metadata.
DIGEST = "digest"
#: The limit that safetensors sets.
_LONGEST_HEADER = 100_000_000


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a file atomically, and replaces an existing one (see :func:`replacing`).

    Args:
        path: of the file.
        tensors: contiguous; no two share a storage.
        header: stored as the file's metadata, together with a digest of all content.

    Raises:
        OSError: the file cannot be written.
        SafetensorError: the file cannot be written, or :func:`read` does not know the dtype of a tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise SafetensorError(f"tensor {name!r} is {tensor.dtype}, which the file cannot hold")
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={**header, DIGEST: content_digest(tensors, header)})


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that replaces another file when the block ends without an error.

    It takes the mode of the file that it replaces. For a symbolic link, the target is replaced and the link stays.
    After an error the temporary file is removed and the other one is unchanged. File and folder are flushed.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # set by the umask
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(target).st_mode
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads copies of a file's tensors, and its metadata.

    Raises:
        OSError: there is no such file, or it cannot be read.
        SafetensorError: it is truncated or not a safetensors file.
    """
    with _opened(path) as file:
        return read_from(file, os.fstat(file.fileno()).st_size)


@torch.inference_mode(mode=False)
def read_from(file: BinaryIO, length: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata from an open file of ``length`` bytes."""
    layout = _parsed(_header(file, length))
    header = layout.pop("__metadata__", {})
    if not isinstance(header, dict) or not all(isinstance(value, str) for value in header.values()):
        raise SafetensorError("the metadata are not strings")
    tensors: dict[str, Tensor] = {}
    end = 0
    described = ((name, _described(name, value)) for name, value in layout.items())
    for name, (dtype, shape, begin, stop) in sorted(described, key=lambda item: item[1][2:]):
        if begin != end or stop > length:
            raise SafetensorError(f"tensor {name!r} does not lie between the previous tensor and the end of the file")
        tensors[name], end = _filled(file, name, torch.empty(shape, dtype=dtype, device="cpu")), stop
    if file.read(1):
        raise SafetensorError("there are bytes after the last tensor")
    return tensors, header


def content_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Hash of tensors and metadata, without the digest itself."""
    return digest({name: value for name, value in header.items() if name != DIGEST}, tensors)


def check_digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Checks the content that :func:`read` returns against the digest that :func:`write` stored.

    This detects damage but not tampering: anybody who changes a file can compute its digest.

    Raises:
        SafetensorError: the content is not what was saved.
    """
    if header.get(DIGEST) != content_digest(tensors, header):
        raise SafetensorError("its content is not what was saved: copy the file again, or make a new one")


def read_header(path: str | os.PathLike[str]) -> bytes:
    """Reads the unparsed header of a file: names, shapes and metadata.

    Raises:
        OSError: there is no such file, or it cannot be read.
        SafetensorError: it is truncated or not a safetensors file.
    """
    with _opened(path) as file:
        return _header(file, os.fstat(file.fileno()).st_size)


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for ``json.loads`` that rejects an object with duplicate names.

    Raises:
        ValueError: a name appears twice.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name appears twice in an object")
    return unique


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
        raise SafetensorError("it is not a regular file")
    return open(path, "rb")


def _header(file: BinaryIO, length: int) -> bytes:
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= min(length - 8, _LONGEST_HEADER):
        raise SafetensorError(f"a file of {length} bytes has no header of {size}")
    header = file.read(size)
    if len(header) < size:
        raise SafetensorError("it ends within its header")
    return header


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        layout = json.loads(header.decode(), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its header is not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(layout, dict):
        raise SafetensorError("its header is not a JSON object")
    return layout


def _described(name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorError(f"tensor {name!r} is not described by dtype, shape and offsets")
    dtype, shape, offsets = _DTYPES.get(str(value["dtype"])), value["shape"], value["data_offsets"]
    if dtype is None:
        raise SafetensorError(f"tensor {name!r} has the unknown dtype {value['dtype']!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise SafetensorError(f"shape or offsets of tensor {name!r} are not lists of sizes")
    if len(offsets) != 2 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise SafetensorError(f"tensor {name!r} does not have the bytes of its shape")
    if len(shape) > 16 or math.prod(max(1, n) for n in shape) >= 2**56:  # an empty one may claim any sizes
        raise SafetensorError(f"tensor {name!r} has the impossible shape {shape}")
    return dtype, tuple(shape), *offsets


def _filled(file: BinaryIO, name: str, tensor: Tensor) -> Tensor:
    bits = tensor.view(-1).view(torch.uint8).numpy()
    if file.readinto(bits.data) != bits.nbytes:  # type: ignore[attr-defined]  # buffered files have it
        raise SafetensorError(f"it ends within tensor {name!r}")
    if tensor.dtype == torch.bool and bits.max(initial=0) > 1:
        raise SafetensorError(f"tensor {name!r} holds a byte that is neither true nor false")
    return tensor
