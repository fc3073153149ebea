"""The machine of a measurement and its memory bandwidth."""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tardis_fx.measure.requirements import needed_by
from tardis_fx.measure.timing import seconds

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: Assumed last-level cache if the system does not report its size.
UNKNOWN_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    """A machine and its measured memory bandwidth.

    Attributes:
        name: of the processor or the CUDA device.
        threads: that PyTorch uses; multiprocessors of a CUDA device.
        cache: bytes of the last-level cache.
        copy: GB/s of a copy much larger than the cache, bytes read and bytes written.
        read: GB/s of a sum over the same size.
        device: "cpu" or "cuda".
    """

    name: str
    threads: int
    cache: int
    copy: float
    read: float
    device: str = "cpu"

    @classmethod
    def measured(cls, device: str = "cpu", rounds: int = 9) -> "Machine":
        """Measures this machine: the best of several rounds, because other work can only slow a copy down."""
        size = last_level_cache(device)
        if device == "cpu":
            count = min(size, available_memory() // 32)  # four caches of float32, or a quarter of the memory for both
            name, threads = processor(), torch.get_num_threads()
        else:
            properties = torch.cuda.get_device_properties()
            name, threads, count = properties.name, properties.multi_processor_count, 1 << 28  # 1 GiB: many caches
        source = torch.ones(count, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        copy = min(seconds(lambda: target.copy_(source), source.device) for _ in range(rounds))
        read = min(seconds(lambda: source.sum(), source.device) for _ in range(rounds))
        moved = source.nbytes / 1e9
        return cls(name, threads, size, 2 * moved / copy, moved / read, device)

    @property
    def roof(self) -> str:
        """Names the measurement that determines the bandwidth: decoding mostly reads."""
        return "the faster of copy and sum" if self.device == "cpu" else "the copy"

    @property
    def bandwidth(self) -> float:
        """Bytes per second for computing floors."""
        return (max(self.copy, self.read) if self.device == "cpu" else self.copy) * 1e9

    def __str__(self) -> str:
        units = "threads" if self.device == "cpu" else "multiprocessors"
        return (
            f"{self.name}, {self.threads} {units}, torch {torch.__version__}, last-level cache "
            f"{self.cache / 2**20:.0f} MiB; copy {self.copy:.4g} GB/s (read and written), sum {self.read:.4g} GB/s"
        )


def conditions() -> str:
    """Processor, threads and PyTorch's version, which a CPU benchmark prints with its results."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@cache  # takes a second
def processor() -> str:
    """Name of the CPU.

    Raises:
        BenchError: py-cpuinfo is not installed.
    """
    with needed_by("naming the processor"):
        import cpuinfo
    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine())


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of a CUDA device's largest cache, or of the largest cache of the first core.

    py-cpuinfo also reports caches, but takes the last level's size from a line of /proc/cpuinfo for the second level.
    """
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = [re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(
        (int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]] for size in sizes if size), default=UNKNOWN_CACHE
    )


def available_memory(device: str = "cpu") -> int:
    """Bytes available on a device without swapping.

    Raises:
        BenchError: psutil is not installed.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with needed_by("reading the free memory"):
        import psutil
    return int(psutil.virtual_memory().available)
