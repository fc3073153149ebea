"""What can be said of the Triton kernels without a GPU: right in the interpreter, compiled for one, traced for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted already")
def test_the_kernels_are_right_in_the_interpreter() -> None:
    suite = Path(__file__).with_name("test_triton.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=suite.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
