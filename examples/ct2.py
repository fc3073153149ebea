"""Reads the tensors of a ``model.bin`` in which CTranslate2 keeps a Whisper."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tardis_fx.errors import BenchError

#: Version of the binary format, name of the model, and its revision.
HEADER = 6, "WhisperSpec", 3
#: Types of numbers, by their code in the file.
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read(path: Path) -> dict[str, Tensor]:
    """Reads all tensors by name; an alias is the same tensor under another name.

    Raises:
        BenchError: the file is of another kind, or cut short.
    """
    content = _Content(path)
    header = content.number("I"), content.text(), content.number("I")
    if header != HEADER:
        raise BenchError(f"{path} is no Whisper of CTranslate2: it begins with {header}, not with {HEADER}")
    tensors = {}
    for _ in range(content.number("I")):
        name = content.text()
        shape = [content.number("I") for _ in range(content.number("B"))]
        kind = content.number("B")
        values = content.take(content.number("I"))
        try:
            numbers = np.frombuffer(values, TYPES[kind]).reshape(shape)
        except (KeyError, ValueError) as error:
            raise BenchError(f"{path}: {name}, of type {kind}, does not hold numbers {shape}") from error
        tensors[name] = torch.from_numpy(numbers.copy())
    for _ in range(content.number("I")):
        alias, name = content.text(), content.text()
        tensors[alias] = tensors[name]
    return tensors


class _Content:
    """The content of a binary file that has not been read yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, memoryview(path.read_bytes())

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        if size > len(self._rest):
            raise BenchError(f"{self._path} is cut short: {size} more bytes are due, and {len(self._rest)} are there")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def number(self, form: str) -> int:
        """An unsigned integer in the notation of ``struct``: B, H or I."""
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        """A text, whose length includes a final zero."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode(errors="replace")
