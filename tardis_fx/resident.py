"""What a process holds in memory, and which tensors lie in files that are mapped into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def resident_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that the process holds; None where the system does not tell.

    Pages of mapped files, which the system takes back when memory is short, do not count.

    Args:
        device: a CUDA device, of which PyTorch's allocator knows, or the CPU, of which Linux does.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if device.type != "cpu" or not statm.exists():
        return None
    _, resident, shared, *_ = map(int, statm.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class FileMappings:
    """The files that are mapped into the process, as of when this was made; none where the system does not tell."""

    def __init__(self) -> None:
        """Reads them."""
        maps = Path("/proc/self/maps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        self._files: list[tuple[int, int, str]] = []
        for line in lines:
            span, *_, path = line.split(None, 5)
            if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")):  # on a disk, no shared memory
                start, end = span.split("-")
                self._files.append((int(start, 16), int(end, 16), path))

    def file_of(self, tensor: Tensor) -> str | None:
        """The file that a tensor's values lie in, or None."""
        if tensor.device.type != "cpu":
            return None
        address = tensor.data_ptr()
        return next((path for start, end, path in self._files if start <= address < end), None)
