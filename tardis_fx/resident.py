"""Memory that a process holds, and the mapped files that tensors lie in."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def resident_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that the process holds; None if the system does not report it.

    Pages of mapped files do not count, because the system can reclaim them when memory is short.

    Args:
        device: a CUDA device, reported by PyTorch's allocator, or the CPU, reported by Linux.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if device.type != "cpu" or not statm.exists():
        return None
    _, resident, shared, *_ = map(int, statm.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class FileMappings:
    """The files mapped into the process when this object was made; none if the system does not report them."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        self._files: list[tuple[int, int, str]] = []
        for line in lines:
            span, *_, path = line.split(None, 5)
            if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")):  # on a disk, not shared memory
                start, end = span.split("-")
                self._files.append((int(start, 16), int(end, 16), path))

    def file_of(self, tensor: Tensor) -> str | None:
        """Path of the mapped file that holds a tensor's values, or None."""
        if tensor.device.type != "cpu":
            return None
        address = tensor.data_ptr()
        return next((path for start, end, path in self._files if start <= address < end), None)
