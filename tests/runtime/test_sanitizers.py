"""The kernels under AddressSanitizer and UBSan, for every instruction set that this machine has: ``pytest -m sanitizer``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tardis_fx.runtime.cpu import build as cpu_build

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads the sanitizer's library"),
]

CALLS = 3_000
PLAIN = ("-std=c++17", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
SANITIZED = (*PLAIN, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
#: Vectors of 16, 32 and 64 bytes, the last without and with products of bfloat16 and of bytes.
INSTRUCTION_SETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "native")


def runs(compiler: list[str], target: str, folder: Path) -> bool:
    """Whether this machine runs what is compiled for a target."""
    program = "int main() { return !(%s); }" % (
        "1" if target == "native" else f'__builtin_cpu_supports("{target}")'
    )  # fmt: skip
    command = [*compiler, "-x", "c++", "-", "-o", str(folder / "runs")]
    built = subprocess.run(command, input=program.encode(), capture_output=True)
    return built.returncode == 0 and subprocess.run([folder / "runs"]).returncode == 0


@pytest.mark.parametrize("target", INSTRUCTION_SETS)
def test_no_call_reads_or_writes_where_it_should_not(target: str, tmp_path: Path) -> None:
    try:
        compiler = cpu_build._compiler()
        preloaded = cpu_build._run([*compiler, "-print-file-name=libasan.so"]).strip()
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no C++ compiler")
    if not Path(preloaded).is_absolute():
        pytest.skip("the compiler brings no library of AddressSanitizer")
    if not runs(compiler, target, tmp_path):
        pytest.skip(f"this processor is no {target}")
    library = tmp_path / "kernel.so"
    cpu_build.compile_kernel(library, compiler, (*SANITIZED, f"-march={target}"))
    environment = os.environ | {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    for op in ("correct", "coded_ffn"):
        command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(library), op]
        run = subprocess.run([*command, str(CALLS)], env=environment, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, f"{CALLS} calls\n"), run.stderr[-5000:]
        wrong = subprocess.run([*command, "100", "wrong"], env=environment, capture_output=True, text=True)
        assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr
