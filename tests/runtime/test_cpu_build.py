"""How the CPU kernel is compiled, kept, and trusted."""

import ctypes
import errno
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from builders.activations import ELU
from builders.correction import arguments

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="modes, owners and /proc of Linux")


@pytest.fixture(scope="module")
def kernel() -> ctypes.CDLL:
    if (library := cpu_build.load()) is None:
        pytest.skip("no C++ compiler")
    return library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet."""
    monkeypatch.setenv("TARDIS_FX_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def compilations(kernel: object, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is compiled, in a moment: a kernel that refuses every call."""
    compiled: list[Path] = []

    def compile_kernel(library: Path, *_: object) -> None:
        compile_program(STUB, library)
        compiled.append(library)

    monkeypatch.setattr(cpu_build, "compile_kernel", compile_kernel)
    return compiled


STUB = """extern "C" long tardis_correct(void*) { return 1; }
extern "C" void tardis_register() {}
extern "C" void tardis_unregister() {}
extern "C" void tardis_place() {}
"""


def compile_program(text: str, library: Path) -> None:
    command = [*cpu_build._compiler(), "-x", "c++", "-shared", "-fPIC", "-", "-o", str(library)]
    subprocess.run(command, input=text.encode(), check=True)


def forget() -> None:
    cpu_build._library.cache_clear()
    cpu_build._loaded.cache_clear()


def loaded() -> bool:
    """Whether a process that starts now gets a kernel."""
    forget()
    return cpu_build.load() is not None


def run(op: Correction) -> torch.Tensor:
    return cpu.correct(op)


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # which nobody else can do: so this process is another user
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


#: What may stand in the place of a compiler, and a word of the warning. A script runs if it is asked for more than its
#: version.
COMPILERS: dict[str, tuple[str | dict[str, str], str]] = {
    "none": ({"PATH": ""}, "no C++ compiler"),
    "not there": ({"CXX": "no-such-compiler"}, "no-such-compiler"),
    "not even a version": ({"CXX": "false"}, "false"),
    "a folder": ({"CXX": "/"}, "denied"),
    "no command line": ({"CXX": "'unbalanced"}, "quotation"),
    "writes nothing": ({"CXX": "true"}, "wrote no library"),
    "fails": ("echo no such flag >&2; exit 1", "no such flag"),
    "writes nonsense": ('for last; do :; done; echo nonsense > "$last"', "file too short"),
    "hangs": ("exec sleep 100", "timed out"),
}


@pytest.mark.parametrize("case", COMPILERS)
def test_without_a_kernel_the_reference_runs_after_one_warning(
    case: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment, word = COMPILERS[case]
    if isinstance(environment, str):
        script = tmp_path / "c++"
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{environment}\n')
        script.chmod(0o755)
        environment = {"CXX": str(script)}
        monkeypatch.setattr(cpu_build, "_PATIENCE", 2)
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    op = arguments()
    for _ in range(2):
        assert torch.equal(run(op), reference.correct(op))
    (record,) = caplog.records
    assert "eager implementation" in record.getMessage()
    assert word in record.getMessage()


@pytest.mark.usefixtures("cache")
def test_threads_that_call_at_the_same_time_build_once_and_warn_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cpu_build.load(), range(8))) == [None] * 8
    assert len(caplog.records) == 1


def test_a_kernel_is_compiled_once_and_only_its_user_can_read_or_change_it(
    cache: Path, compilations: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded()
    assert loaded()
    assert len(compilations) == 1
    (library,) = cache.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, library)] == [0o700, 0o700]
    assert not caplog.records


def test_an_activation_registered_after_the_first_call_gets_a_kernel_of_its_own(
    cache: Path, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, numbers = cpu_build.load(), [cpu_build.activation_number(name) for name in ACTIVATIONS]
    assert numbers == list(range(len(ACTIVATIONS)))
    monkeypatch.setitem(ACTIVATIONS, "elu", ELU)
    assert cpu_build.activation_number("elu") == len(numbers)
    assert cpu_build.load() is cpu_build.load() is not first
    assert len(compilations) == len(list(cache.iterdir())) == 2
    monkeypatch.undo()
    assert cpu_build.load() is first


def test_a_library_is_on_the_disk_before_it_has_its_name(
    cache: Path, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        assert not list(cache.glob("*.so"))

    monkeypatch.setattr(os, "fsync", fsync)
    assert loaded()
    (library,) = cache.iterdir()
    assert synced == [library.stat().st_ino]
    assert compilations


@pytest.mark.parametrize("exposed", ["file to the group", "file to all", "file of another", "link", "folder to the group", "folder of another"])  # fmt: skip
def test_a_planted_library_does_not_run(
    exposed: str,
    cache: Path,
    compilations: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert loaded()
    (library,) = cache.iterdir()
    ran = tmp_path / "ran"
    program = f"""#include <cstdio>
    __attribute__((constructor)) static void run() {{ fclose(fopen("{ran}", "w")); }}
    {STUB}"""
    planted = tmp_path / "planted.so"
    compile_program(program, planted)
    key = library.stem.rsplit("-", 1)[0]
    library.unlink()
    library = cache / f"{key}-{cpu_build._digest(planted)}.so"
    if exposed == "link":
        library.symlink_to(planted)
    else:
        planted.rename(library)
    assert "link" in exposed or stat.S_IMODE(library.stat().st_mode) & 0o22 == 0
    path = cache if exposed.startswith("folder") else library
    if exposed.endswith("another"):
        of_another_user(path, monkeypatch)
    elif exposed != "link":
        path.chmod(path.stat().st_mode | (stat.S_IWGRP if exposed.endswith("group") else stat.S_IWOTH))
    compilations.clear()
    assert loaded()
    assert not ran.exists()
    assert len(compilations) == 1
    if os.geteuid() == 0 or not exposed.endswith("another"):  # else the folder is another's, too
        assert len(caplog.records) == exposed.startswith("folder")


def test_a_library_of_root_is_trusted(cache: Path, compilations: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may bring it along."""
    if os.geteuid() != 0:
        pytest.skip("makes files of root")
    assert loaded()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", mock.Mock(side_effect=PermissionError))  # it is read-only
    assert loaded()
    assert len(compilations) == 1


@pytest.mark.parametrize("damage", ["empty", "one byte", "half", "all but a byte", "a byte changed", "nonsense"])
def test_a_damaged_library_is_compiled_again(
    damage: str, cache: Path, compilations: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded()
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    damaged = {
        "empty": b"",
        "one byte": whole[:1],
        "half": whole[: len(whole) // 2],  # whoever maps it dies of SIGBUS
        "all but a byte": whole[:-1],
        "a byte changed": whole[:4000] + bytes([whole[4000] ^ 1]) + whole[4001:],
        "nonsense": b"nonsense",
    }[damage]
    library.unlink()  # whose content is mapped
    library.write_bytes(damaged)
    library.chmod(0o700)
    if damage == "nonsense":  # under a name that says so
        library.rename(cache / f"{library.stem.rsplit('-', 1)[0]}-{cpu_build._digest(library)}.so")
    assert loaded()
    assert loaded()
    assert len(compilations) == 2
    assert whole in [path.read_bytes() for path in cache.iterdir()]
    assert not caplog.records


@pytest.mark.parametrize("home", ["none", "a file", "unwritable"])
def test_without_a_home_the_kernel_is_compiled_in_a_folder_that_goes_away(
    home: str,
    compilations: list[Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TARDIS_FX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if home == "none":
        monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
    elif home == "a file":
        (tmp_path / "home").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    assert loaded()
    (library,) = compilations
    assert not library.parent.exists()
    (record,) = caplog.records
    assert "TARDIS_FX_CACHE" in record.getMessage()
    assert not cache.exists()


def test_the_cache_may_lie_behind_a_link(
    cache: Path, compilations: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    assert loaded()
    assert loaded()
    assert len(compilations) == 1
    assert not caplog.records


@pytest.mark.usefixtures("kernel")
def test_two_processes_that_build_at_the_same_time_both_work(tmp_path: Path) -> None:
    program = """
import os, torch
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.cpu import build as cpu_build
assert not os.path.exists(os.environ["TARDIS_FX_CACHE"]), "built on import"
input(print("ready", flush=True) or "")
codes, groups = torch.zeros(8, 1, 16, dtype=torch.uint8), torch.zeros(8, 1, 1, dtype=torch.uint8)
pairs, neurons = torch.ones(8, 2), torch.arange(8, dtype=torch.int32)
op = Correction(
    torch.ones(1, 4), torch.ones(1, 64), [torch.ones(8, 64)], torch.ones(8, 4), torch.tensor([8, 8]), neurons,
    codes, groups.half(), groups, None, pairs, pairs, 2, "relu",
)
expected = reference.correct(op)
reference.correct = None
assert torch.equal(cpu.correct(op), expected)
"""
    environment = os.environ | {"TARDIS_FX_CACHE": str(tmp_path / "cache")}
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    command = [sys.executable, "-c", program]
    processes = [
        subprocess.Popen(command, env=environment, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (library,) = (tmp_path / "cache").iterdir()
    assert library.suffix == ".so"
