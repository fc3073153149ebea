"""Writes safetensors files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import TYPE_CHECKING

from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a file; an existing one is replaced.

    Args:
        path: where to.
        tensors: contiguous, no two of one storage.
        header: kept as the file's metadata.

    Raises:
        OSError: the file cannot be written.
        SafetensorError: likewise.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask has it; save_file would make it private
        save_file(dict(tensors), temporary, metadata=dict(header))
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
