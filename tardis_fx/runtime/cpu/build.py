"""Compiles the kernels for this processor and keeps the library in a folder, from which it loads only trusted files.

There is one source for all instruction sets (:data:`CAPABILITIES`). The best one that the processor has is chosen at
run time, so that a cache folder may move to other machines; ``$TARDIS_FX_CPU_CAPABILITY`` names another one.

The compiler is ``$CXX``, else ``g++`` or ``clang++``. Loading a library runs its code, so folder and library must be
trusted (:mod:`tardis_fx.runtime.cache`). A library's name ends in a digest of its content, so that a truncated or
damaged one is found before it is mapped. Without a trusted folder, each process compiles the kernel in a temporary
folder, which is removed once the library is loaded.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tardis_fx.errors import ConfigError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import tables
from tardis_fx.runtime.cache import cache_folder, is_trusted
from tardis_fx.runtime.correction import MOST_TOKENS
from tardis_fx.runtime.touched import replace_again

logger = logging.getLogger("tardis_fx")

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_TORCH = Path(torch.__file__).parent
# No -ffast-math, which breaks comparisons of NaN and infinity. Its two safe parts let conversions be vectorised.
_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC",
    f"-I{_TORCH / 'include'}",
)  # fmt: skip
_LIBRARIES = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu")
_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


class Capability(NamedTuple):
    """An instruction set: the compiler's flags, and the features that a processor has, as Linux names them."""

    flags: tuple[str, ...]
    machine: str
    features: frozenset[str]


#: Instruction sets by name, the best first.
CAPABILITIES = {
    "amx_int8": Capability(
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8"),
        "x86_64",
        _V4 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"},
    ),
    "avx512_bf16": Capability(
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), "x86_64", _V4 | {"avx512_vnni", "avx512_bf16"}
    ),
    "avx512_vnni": Capability(("-march=x86-64-v4", "-mavx512vnni"), "x86_64", _V4 | {"avx512_vnni"}),
    "avx512": Capability(("-march=x86-64-v4",), "x86_64", _V4),
    "avx2_vnni": Capability(("-march=x86-64-v3", "-mavxvnni"), "x86_64", _V3 | {"avx_vnni"}),
    "avx2": Capability(("-march=x86-64-v3",), "x86_64", _V3),
    "dotprod": Capability(("-march=armv8.2-a+dotprod+fp16",), "aarch64", frozenset({"asimddp", "asimdhp"})),
    "portable": Capability((), "", frozenset()),
}
#: Timeout of the compiler in seconds.
_PATIENCE = 600
_LOCK = threading.Lock()
#: The library that PyTorch calls.
_REGISTERED: list[ctypes.CDLL] = []


def load() -> ctypes.CDLL | None:
    """Loads the compiled functions for the registered activations; None, with one warning, if they are unavailable.

    From then on, PyTorch calls them for tensors on the CPU.

    Raises:
        ConfigError: ``$TARDIS_FX_CPU_CAPABILITY`` names no instruction set that this processor has.
    """
    return _library(tuple(ACTIVATIONS), capability())


def capability() -> str:
    """The instruction set to use: that of ``$TARDIS_FX_CPU_CAPABILITY``, or the best one that the processor has.

    Raises:
        ConfigError: the processor does not have the one that is asked for.
    """
    available = capabilities()
    name = os.environ.get("TARDIS_FX_CPU_CAPABILITY") or available[0]
    if name not in available:
        raise ConfigError(f"TARDIS_FX_CPU_CAPABILITY is {name!r}, but this processor has {', '.join(available)}")
    return name


@cache
def capabilities() -> tuple[str, ...]:
    """The instruction sets that the processor has, the best first."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    machine = platform.machine()
    return tuple(name for name, c in CAPABILITIES.items() if c.machine in ("", machine) and c.features <= found)


def kernel_name() -> str | None:
    """File name of the loaded library, which identifies its sources, compiler and processor; None without a kernel."""
    library = load()
    return None if library is None else Path(library._name).name


def activation_number(name: str) -> int:
    """The kernel's number of an activation: its position in the registry, which only grows at the end."""
    return list(ACTIVATIONS).index(name)


@cache
def _library(names: tuple[str, ...], target: str) -> ctypes.CDLL | None:
    with _LOCK:  # else concurrent threads would each compile and warn
        return _loaded(names, target)


@cache
def _loaded(names: tuple[str, ...], target: str) -> ctypes.CDLL | None:
    try:
        return _registered(_from_cache(target))
    except Exception as error:  # any failure of the system or the compiler: the reference can run instead
        output = getattr(error, "stderr", None) or ""
        logger.warning("no CPU kernel, the (slow) eager implementation runs instead: %s\n%s", error, output)
        return None


def _registered(library: ctypes.CDLL) -> ctypes.CDLL:
    """Makes PyTorch call a library, and no longer the one before it."""
    for before in _REGISTERED:
        before.tardis_unregister()
    _REGISTERED[:] = [library]
    library.tardis_register()
    replace_again()
    return library


def _from_cache(target: str) -> ctypes.CDLL:
    compiler, flags = _compiler(), (*CAPABILITIES[target].flags, *_FLAGS)
    version = _run([*compiler, "--version"])
    sources = [path.read_text() for path in (*_SOURCES, *sorted(_FOLDER.glob("*.h")))]
    parts = [*sources, *_generated().values(), *compiler, version, *flags, *_defined(), platform.machine()]
    parts.append(torch.__version__)
    name = f"kernel-{target}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    try:
        folder = cache_folder()
        for library in _libraries(folder, name):
            with suppress(OSError):  # for example, built for another C library
                return _open(library)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError) as error:
        logger.warning(
            "%s; each process compiles the CPU kernel again: set TARDIS_FX_CACHE to a folder that only you can write",
            error,
        )
        folder, scratch = None, tempfile.TemporaryDirectory(prefix="tardis_fx-")
    with scratch:
        library = Path(scratch.name, "kernel.so")
        compile_kernel(library, compiler, flags)
        return _open(library if folder is None else _store(library, folder, name))


def _libraries(folder: Path, name: str) -> Iterator[Path]:
    """Intact libraries of that name that only this user could have written; removes others of that name."""
    for library in sorted(folder.glob(f"{name}-*.so")):
        try:
            intact = is_trusted(library) and _digest(library) == library.stem.rsplit("-", 1)[1]
        except OSError:
            continue
        if intact:
            yield library
        else:
            library.unlink(missing_ok=True)


def _store(library: Path, folder: Path, name: str) -> Path:
    """Moves a library into the folder and returns its new path."""
    library.chmod(0o700)
    with library.open("rb") as file:
        os.fsync(file.fileno())  # else a system crash could leave the name without the content
    # Atomic, so that processes building at the same time each find a complete file.
    return library.replace(folder / f"{name}-{_digest(library)}.so")


def compile_kernel(library: Path, compiler: Sequence[str], flags: Sequence[str]) -> None:
    """Compiles the kernels to ``library``, and leaves the generated sources in the same folder."""
    for name, source in _generated().items():
        Path(library.parent, name).write_text(source)
    _run([*compiler, *flags, *_defined(), f"-I{library.parent}", *map(str, _SOURCES), *_LIBRARIES, "-o", str(library)])
    if not library.exists():
        raise FileNotFoundError(f"{shlex.join(compiler)} reported success but wrote no library")


def _defined() -> list[str]:
    """Compiler flags that define the sizes of the kernel's tables."""
    return [f"-DACTIVATIONS={len(ACTIVATIONS)}", f"-DTOKENS={MOST_TOKENS}"]


def _generated() -> dict[str, str]:
    """Sources that the kernels include, by file name."""
    return {"activations.inc": _cases(), "levels.inc": _levels()}


def _cases() -> str:
    """The activations, as cases of a C++ switch."""
    return "".join(
        f"case {activation_number(name)}: return lanes::as_vector({a.cxx.replace('std::', 'lanes::')}, z);\n"
        for name, a in ACTIVATIONS.items()
    )


def _levels() -> str:
    """The tables of levels with up to 16 entries, as rows of a C++ array."""
    tables_of_bytes = [(128 * tables.levels(bits) + 128).int().tolist() for bits in range(1, 5)]
    return ",\n".join("{" + ", ".join(map(str, table)) + "}" for table in tables_of_bytes)


def _run(command: Sequence[str]) -> str:
    """Runs a command and returns its standard output."""
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        timeout=_PATIENCE,
    )  # fmt: skip
    return run.stdout


def _compiler() -> list[str]:
    """The command of the C++ compiler."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    if path := shutil.which("g++") or shutil.which("clang++"):
        return [path]
    raise FileNotFoundError("no C++ compiler: neither g++ nor clang++ on PATH, and CXX is not set")


def processor() -> str:
    """Identity of the processor, for times, so that machines may share a cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(features)])


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.tardis_correct.argtypes = [ctypes.c_char_p]
    library.tardis_correct.restype = ctypes.c_int64
    library.tardis_place.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 6, ctypes.c_void_p, ctypes.c_int64]
    library.tardis_place.restype = None
    return library
