"""The kernel in codes on another processor: compiled by a cross compiler and run by an emulator, if both are there."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from builders.coded import arguments, exact
from builders.correction import FLOATS

from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu.coded_layout import prepare

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)

#: What gives a call its shape, by its number.
SIZES, OUTPUTS, LISTED = (200, 64, 300, 1100, 130), (130, 17, 256, 128), (40, 300, 1)
ACTIVATIONS = ("gelu", "silu", "gelu_tanh", "relu", "mish")


def written(path: Path, calls: int) -> None:
    """Writes calls with their outputs in the form that aarch64.cpp reads."""
    with path.open("wb") as file:
        for number in range(calls):
            bits = 1 + number % 8
            call = arguments(
                k=1 + number % 2, shape=(1 + 5 * number % 40,), d=SIZES[number % 5], d_out=OUTPUTS[number % 4],
                listed=LISTED[number % 3], widths=(bits, 9 - bits, (bits + 2) % 8 + 1, bits, 9 - bits),
                thresholds=("all", "mixed", "none")[number % 3], fold=number % 4 < 3, relative=number % 5 == 0,
                activation=ACTIVATIONS[number % 5], dtype=FLOATS[number % 3], seed=number,
            )  # fmt: skip
            site, dtype = prepare(call), [torch.float32, torch.bfloat16, torch.float16].index(call.x.dtype)
            file.write(struct.pack("6q", len(site), *call.x.shape, len(call.bias), dtype, 1 + number % 3))
            for tensor in (site, call.x, exact(call)):
                file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("capability", ["dotprod", "portable"])
def test_the_kernel_agrees_with_the_reference_on_an_arm_processor(capability: str, tmp_path: Path) -> None:
    written(tmp_path / "calls", 40)
    for name, source in cpu_build._generated().items():
        (tmp_path / name).write_text(source)
    flags = [*cpu_build.CAPABILITIES[capability].flags, *cpu_build._defined(), "-std=c++17", "-O2", "-static"]
    folders = [f"-I{tmp_path}", f"-I{cpu_build._FOLDER}"]
    sources = [cpu_build._FOLDER / "coded.cpp", Path(__file__).with_name("aarch64.cpp")]
    program = tmp_path / "program"
    subprocess.run([COMPILER, *flags, *folders, *map(str, sources), "-o", str(program)], check=True)
    run = subprocess.run([EMULATOR, str(program), str(tmp_path / "calls")], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 2e-4
