"""Memory that a process holds, and the files that tensors are mapped from."""

import os
from pathlib import Path

import torch
from torch import Tensor


def resident_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that the process holds; None if the system does not report it.

    PyTorch's allocator reports the memory of CUDA devices, Linux that of the CPU. Pages of mapped files do not count,
    because the system can reclaim them when memory is short.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if device.type != "cpu" or not statm.exists():
        return None
    _, resident, shared, *_ = map(int, statm.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def mapped_file(tensor: Tensor) -> str | None:
    """Path of the file that a tensor is mapped from; None if there is none, or if the system does not report it."""
    maps = Path("/proc/self/maps")
    if tensor.device.type == "cpu" and maps.exists():
        for line in maps.read_text().splitlines():
            span, *_, path = line.split(None, 5)
            start, end = (int(bound, 16) for bound in span.split("-"))
            if start <= tensor.data_ptr() < end:
                return path if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")) else None
    return None
