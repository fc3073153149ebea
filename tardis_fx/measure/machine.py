"""What this machine is, and how fast it reads memory."""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: Taken for the last-level cache where the system does not tell its size.
UNKNOWN_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    """A machine as measured.

    Attributes:
        name: of the processor.
        threads: that PyTorch uses.
        cache: bytes of the last-level cache.
        copy: GB/s of a copy much larger than the cache, bytes read and bytes written.
        read: GB/s of a sum over as much.
    """

    name: str
    threads: int
    cache: int
    copy: float
    read: float

    @classmethod
    def measured(cls, rounds: int = 9) -> Machine:
        """This machine: the best of some rounds, since other work can only slow a copy down.

        Args:
            rounds: how many copies and sums.
        """
        cache = last_level_cache()
        source = torch.ones(4 * cache // 4, dtype=torch.float32, device="cpu")  # four caches of float32
        target = torch.empty_like(source)
        copy = min(_seconds(lambda: target.copy_(source)) for _ in range(rounds))
        read = min(_seconds(lambda: source.sum()) for _ in range(rounds))
        size = source.nbytes / 1e9
        return cls(_processor(), torch.get_num_threads(), cache, 2 * size / copy, size / read)

    #: What a floor is computed from; decoding mostly reads.
    roof: ClassVar[str] = "the faster of copy and sum"

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a floor is computed from."""
        return max(self.copy, self.read) * 1e9

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.name}, {self.threads} threads, last-level cache {self.cache / 2**20:.0f} MiB, torch "
            f"{torch.__version__}; copy {self.copy:.1f} GB/s (read and written), sum {self.read:.1f} GB/s"
        )


@dataclass(frozen=True)
class Gpu(Machine):
    """The current CUDA device as measured; ``threads`` are its multiprocessors."""

    roof: ClassVar[str] = "the copy"

    @classmethod
    def measured(cls, rounds: int = 9) -> Gpu:
        """This device; arguments as of a machine."""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")  # 1 GiB: many caches
        target = torch.empty_like(source)
        copy = min(_seconds(lambda: target.copy_(source), torch.cuda.synchronize) for _ in range(rounds))
        read = min(_seconds(lambda: source.sum(), torch.cuda.synchronize) for _ in range(rounds))
        size = source.nbytes / 1e9
        return cls(found.name, found.multi_processor_count, last_level_cache("cuda"), 2 * size / copy, size / read)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a floor is computed from."""
        return self.copy * 1e9

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.name}, {self.threads} multiprocessors, second-level cache {self.cache / 2**20:.0f} MiB, torch "
            f"{torch.__version__}; copy {self.copy:.0f} GB/s (read and written), sum {self.read:.0f} GB/s"
        )


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache of a device or that the first core sees; a usual size where the system is silent."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def _processor() -> str:
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.processor() or platform.machine()


def _seconds(run: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that can be had on a device, without swapping, or None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text() if info.exists() else "")
    return int(found[1]) << 10 if found else None


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
