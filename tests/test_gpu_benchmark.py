"""The parts of benchmarks/gpu.py that run without a GPU."""

import re
import sys
import time
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
from builders.scripts import load_script

from tardis_fx.bench.timings import Timing
from tardis_fx.measure.machine import Machine

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
HERE = Machine("A Device 80GB", 132, 50 << 20, 2500.0, 3000.0, "cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("benchmarks/gpu.py")
    monkeypatch.setattr(module, "FFNS", [(64, 0.05, [1])])
    monkeypatch.setattr(module, "MODELS", ())
    monkeypatch.setattr(module.ffn, "last_level_cache", lambda _: 1 << 16)  # a few copies
    monkeypatch.setattr(module.ffn, "ROUND", 1e-3)
    return module


def test_without_a_device_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures on a CUDA device"):
        gpu.main()


def test_every_case_has_its_rows_and_a_ratio_to_the_floor(gpu: ModuleType) -> None:
    rows, remarks = gpu.measured("cpu", time.monotonic() + 1000)
    assert remarks == []
    assert [row.name for row in rows] == ["Inductor", "guarded_fold, 2 bits, rows whole"]
    text = gpu.report(rows, remarks, HERE, "9 passed")
    assert "over the copy." in text
    assert text.count("×") - text.count("; of medians") == 2 * 2
    fast = rows[1]
    assert fast.figures(HERE)["floor_ms"] == pytest.approx(fast.touched / 2500e9 * 1e3)


@needs_none
def test_it_says_how_the_gpu_tests_ended(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TESTS", gpu.TESTS[:1])
    assert re.fullmatch(r"\d+ skipped in .*", gpu.tested(300))


def test_a_case_that_time_does_not_allow_or_that_fails_is_a_remark(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, remarks = gpu.measured("cpu", time.monotonic())
    assert rows == []
    assert remarks == ["Not reached in time: FFN of 64, 1 tokens, 5%."]

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(gpu.ffn, "bench_ffn", fails)
    rows, remarks = gpu.measured("cpu", time.monotonic() + 1000)
    assert remarks[0] == "Failed: FFN of 64, 1 tokens, 5%: RuntimeError: out of memory"


def test_the_newest_report_is_on_top(gpu: ModuleType, tmp_path: Path) -> None:
    row = Timing("a case", "a contender", [1.0], [1.0], 1.0)
    for tests in ("1 passed", "2 passed"):
        path = gpu.record(gpu.report([row], [], HERE, tests), HERE.name, tmp_path)
    assert path == tmp_path / "a-device-80gb.md"
    text = path.read_text()
    assert text.startswith("# A Device 80GB\n\n## ")
    assert text.index("2 passed") < text.index("1 passed")
    assert text.count("# A Device 80GB") == 1


def test_a_checkout_that_was_never_installed_gets_its_entry_points(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = tomllib.loads((gpu.ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    monkeypatch.setattr(gpu, "entry_points", lambda group: [])
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PYTHONPATH", "")
    gpu.register_checkout()
    assert sys.path == [str(tmp_path)]
    for group in ("torch_dynamo_backends", "tardis_fx.passes"):
        assert {entry.name: entry.value for entry in entry_points(group=group)} == declared[group]
