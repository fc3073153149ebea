"""The correction op on a CPU: builds, caches and calls ``cpu_kernel.cpp``.

The kernel is compiled on the first call, with ``$CXX``, ``g++`` or ``clang++``, into ``$TARDIS_FX_CACHE`` (else
``$XDG_CACHE_HOME/tardis_fx``, else ``~/.cache/tardis_fx``). It shares PyTorch's OpenMP runtime, because PyTorch is
loaded first and both ask for a library of the same name. Without a compiler the eager reference runs, after a warning.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import groups_of_row, low_bits

logger = logging.getLogger("tardis_fx")

#: More tokens than this are a prefill, for which the kernel's row by row work is not made; its arrays are this long.
DECODE_TOKENS = 16

_SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
# No -ffast-math: NaN and infinity must compare as they should. The two that are safe let conversions be vectorised.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
#: How the kernel numbers activations and dtypes.
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CALL = struct.Struct("30q")  # of the kernel: sixteen pointers and fourteen integers


def correct(
    folded: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    lower: Tensor,
    upper: Tensor,
    slope: Tensor,
    intercept: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers: :func:`tardis_fx.runtime.reference.correct`, fast.

    The kernel takes up to ``DECODE_TOKENS`` tokens of float32, bfloat16 or float16; the reference does the rest. Sums
    are taken in float32 and rounded once. Rows of ``w1`` and ``w2t`` should be contiguous: others are copied, whole, at
    every call. Gradients do not flow through it. Arguments and result are those of the reference.
    """
    plan = (counts, neurons, codes, scale, zero, lower, upper, slope, intercept)
    dtype, tokens = x.dtype, x.shape[:-1].numel()
    whole = (folded, b1, *((w1, w2t) if row_bits == 16 else ()), fold if fold_bits == 16 else None)
    kernel = kernel_for(x, activation, whole)
    if kernel is None:
        return reference.correct(folded, x, w1, b1, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    w1, w2t = (weight if weight.stride(1) == 1 else weight.contiguous() for weight in (w1, w2t))
    folded, x = folded.contiguous(), x.contiguous()
    b1, fold = (None if tensor is None else tensor.contiguous() for tensor in (b1, fold))
    own = [tensor.contiguous() for tensor in plan]  # by name, since the copies must outlive the call
    out = folded.new_empty((*x.shape[:-1], folded.shape[-1]))
    call = _CALL.pack(
        out.data_ptr(),
        folded.data_ptr(),
        x.data_ptr(),
        w1.data_ptr(),
        0 if b1 is None else b1.data_ptr(),
        w2t.data_ptr(),
        *[tensor.data_ptr() for tensor in own],
        0 if fold is None else fold.data_ptr(),
        tokens,
        x.shape[-1],
        folded.shape[-1],
        scale.shape[1],
        0 if row_bits == 16 else groups_of_row(w2t.shape[1], row_bits, folded.shape[-1]),
        w1.stride(0),
        w2t.stride(0),
        bits,
        ACTIVATION_NUMBERS[activation],
        fold_bits,
        row_bits,
        low_bits(bits, row_bits),
        DTYPE_NUMBERS[dtype],
        torch.get_num_threads(),
    )
    kernel.tardis_correct(call)
    return out


def take_fold(output: fx.Node) -> None:
    """Makes the op at a rewritten site multiply with the folded weight, too, where a linear layer does it before.

    Inductor has a product of few rows done by a library that reads the weight at half the speed.
    """
    corrected = output.args[0] if output.target is torch.reshape else output
    assert isinstance(corrected, fx.Node)
    if corrected.target not in (torch.ops.tardis.correct, torch.ops.tardis.correct_gated):
        return
    folded, *rest = corrected.args
    at = [argument.name for argument in corrected.target.default._schema.arguments].index("fold")
    if isinstance(folded, fx.Node) and folded.target is F.linear and rest[at - 1] is None and len(folded.users) == 1:
        _, weight, bias = folded.args
        corrected.args = (bias, *rest[: at - 1], weight, *rest[at:])
        corrected.graph.erase_node(folded)


def kernel_for(x: Tensor, activation: str, whole: Sequence[Tensor | None]) -> ctypes.CDLL | None:
    """The compiled functions, or None where they do not take such a call.

    Args:
        x: the tokens.
        activation: name in the registry.
        whole: the tensors that must be of its dtype.
    """
    few = x.numel() > 0 and x.shape[:-1].numel() <= DECODE_TOKENS
    alike = all(tensor is None or tensor.dtype == x.dtype for tensor in whole)
    known = x.dtype in DTYPE_NUMBERS and activation in ACTIVATION_NUMBERS
    return _kernel() if few and alike and known else None


@cache
def _kernel() -> ctypes.CDLL | None:
    """The compiled functions, or None (with one warning) where they cannot be had."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        logger.warning("no CPU kernel, the (slow) eager implementation runs instead: %s\n%s", error, said)
        return None
    for function in (library.tardis_correct, library.tardis_correct_gated):
        function.argtypes = [ctypes.c_char_p]
        function.restype = None
    return library


def _build() -> Path:
    """The path of the shared library, compiled now unless the cache has it."""
    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    cases = "".join(
        f"case {ACTIVATION_NUMBERS[name]}: return {ACTIVATIONS[name].cxx};\n" for name in ACTIVATION_NUMBERS
    )
    sources = [path.read_text() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h")))]
    parts = [*sources, cases, *compiler, version, *_FLAGS, _processor()]
    folder = _cache_folder()
    library = folder / f"cpu_kernel-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, library.name)
            Path(scratch, "activations.inc").write_text(cases)
            command = [*compiler, *_FLAGS, f"-I{scratch}", str(_SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(built, library)  # atomic: of processes that build at the same time, each finds a whole file
    return library


def _compiler() -> list[str]:
    """The command of the C++ compiler."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    for name in ("g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("no C++ compiler: neither g++ nor clang++ on PATH, and CXX is not set")


def _processor() -> str:
    """What -march=native depends on, so that machines may share a cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])


def _cache_folder() -> Path:
    if named := os.environ.get("TARDIS_FX_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tardis_fx"
