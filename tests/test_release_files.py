"""Released weights can be mapped from files, and the memory that the process returns is measured."""

import copy
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.ffns import config, ffn, inputs
from builders.release import HIDDEN, D, compiled, planned

import tardis_fx


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = ffn(D, HIDDEN).to(dtype), inputs(32, D).to(dtype)
    plan = tardis_fx.calibrate(model, [inputs(512, D).to(dtype)], config=config(budget=0.6))
    before = model(x)
    assert tardis_fx.release(model, plan, x, folder=tmp_path) == dtype.itemsize * 2 * D * HIDDEN
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == dtype.itemsize * 2 * D * HIDDEN
    assert torch.equal(model(x), before)
    assert torch.equal(compiled(model, plan, prefill="original")(x), before)
    assert (compiled(model, plan, prefill="rewritten")(x) - before).norm() < 0.3 * before.norm()


@torch.no_grad()
def test_mapping_twice_and_in_two_models_keeps_both_whole_and_apart(tmp_path: Path) -> None:
    model, twin, x = ffn(D, HIDDEN), ffn(D, HIDDEN), inputs(32, D)
    plan, before = planned(model), model(x)
    old = weakref.ref(model[0].weight.untyped_storage())  # type: ignore[index,operator,union-attr]
    for released in (model, model, twin):
        tardis_fx.release(released, plan, x, folder=tmp_path)
    gc.collect()
    assert old() is None  # or nothing was freed
    assert torch.equal(model(x), before)
    model[0].weight.mul_(2)  # type: ignore[index,operator,union-attr]
    assert torch.equal(twin(x), before)


@torch.no_grad()
@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b + b[:4], lambda b: bytes(len(b)), lambda _: b""])
def test_a_file_that_does_not_hold_the_matrix_is_written_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    model, x = ffn(D, HIDDEN), inputs(32, D)
    plan, before = planned(model), model(x)
    tardis_fx.release(copy.deepcopy(model), plan, x, folder=tmp_path)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for file, content in contents.items():
        file.unlink()  # the model above has mapped it
        file.write_bytes(damage(content))
    tardis_fx.release(model, plan, x, folder=tmp_path)
    assert torch.equal(model(x), before)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == contents


_MEMORY = """
import logging, sys, torch
from builders.ffns import config, inputs
import tardis_fx
from tardis_fx.resident import resident_bytes

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
how, path = sys.argv[1:]
model = torch.nn.Sequential(torch.nn.Linear(512, 20_000), torch.nn.ReLU(), torch.nn.Linear(20_000, 512)).eval()
plan = tardis_fx.calibrate(model, [inputs(64, 512)], config=config(method="drop_ffn", budget=0.5))
if how == "mapped":
    torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, mmap=True), assign=True)
held = [parameter.detach() for parameter in model.parameters()] if how == "held" else []
tardis_fx.explain(model, plan, inputs(8, 512))  # loads what a capture needs, which would count against release
before = resident_bytes(torch.device("cpu"))
print("freed", tardis_fx.release(model, plan, inputs(8, 512), folder=path if how == "folder" else None))
print("measured", before - resident_bytes(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is measured there")
@pytest.mark.parametrize("how", ["gone", "folder", "held", "mapped"])
def test_what_the_process_gave_back_is_measured(how: str, tmp_path: Path) -> None:
    path, tests = tmp_path / "file", Path(__file__).parent
    output = subprocess.run(
        [sys.executable, "-c", _MEMORY, how, str(path)],
        capture_output=True,
        text=True,
        check=True,
        # glibc would keep freed blocks of half a matrix for later, some of the time, if it did not map each
        env=os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "MALLOC_MMAP_THRESHOLD_": "1000000"},
    ).stdout
    freed, measured = (
        int(re.findall(rf"^{label} (-?\d+)$", output, re.MULTILINE)[0]) for label in ("freed", "measured")
    )
    size = 2 * 4 * 512 * 20_000
    assert freed == (0 if how == "mapped" else size)
    (logged,) = (int(number.replace(",", "")) for number in re.findall("as measured: (-?[0-9,]+) bytes", output))
    if how in ("gone", "folder"):
        assert 0.9 * size < logged < 1.1 * size
        assert measured > size / 2, "from outside"
    assert ("something else holds them" in output) == (how == "held")
    assert (f"were mapped from {path}" in output) == (how == "mapped")
