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

CALLS = 1_000
PLAIN = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
SANITIZED = (*(flag for flag in cpu_build._FLAGS if flag != "-O3"), *PLAIN)


@pytest.mark.parametrize("target", cpu_build.capabilities())
def test_no_call_reads_or_writes_where_it_should_not(target: str, tmp_path: Path) -> None:
    try:
        compiler = cpu_build._compiler()
        preloaded = cpu_build._run([*compiler, "-print-file-name=libasan.so"]).strip()
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no C++ compiler")
    if not Path(preloaded).is_absolute():
        pytest.skip("the compiler brings no library of AddressSanitizer")
    library = tmp_path / "kernel.so"
    cpu_build.compile_kernel(library, compiler, (*cpu_build.CAPABILITIES[target].flags, *SANITIZED))
    environment = os.environ | {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    for op in ("correct", "coded_ffn", "coded_linear"):
        command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(library), op]
        run = subprocess.run([*command, str(CALLS)], env=environment, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, f"{CALLS} calls\n"), run.stderr[-5000:]
        wrong = subprocess.run([*command, "100", "wrong"], env=environment, capture_output=True, text=True)
        assert "AddressSanitizer: heap-buffer-overflow" in wrong.stderr
