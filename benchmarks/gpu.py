"""Runs the GPU tests and times one FFN and whole models against Inductor and torchao, in less than 8 minutes.

python benchmarks/gpu.py

Prints one table and puts it on top of benchmarks/results/<device>.md. Runs from a checkout too, with ``PYTHONPATH=.``.
"""

import gc
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import torch

from tardis_fx.bench import ffn, model
from tardis_fx.bench.folds import FoldRecipe
from tardis_fx.bench.timings import Timing
from tardis_fx.bench.timings import report as table
from tardis_fx.errors import TardisError
from tardis_fx.measure.machine import Machine
from tardis_fx.measure.timing import LEAST_ROUNDS

ROOT = Path(__file__).resolve().parents[1]
#: Seconds in total, and seconds reserved for each case: a case that does not fit is not started.
TIME, ALL_TESTS, ONE_FFN, ONE_MODEL = 470, 120, 25, 70
#: The cases with goals come first, in case time runs out.
FFNS = [(d, rate, tokens) for d in (4096, 2048, 8192) for rate in (0.05, 0.02, 0.1) for tokens in ([1], [4], [16])]
MODELS = ("falcon-7b", "opt-6.7b", "gpt2-xl")
#: File and tests of each process.
TESTS = (
    ("tests/runtime/test_gpu.py", ""),
    ("tests/runtime/test_triton.py", "activation"),
    ("tests/runtime/test_triton.py", "width"),
    ("tests/runtime/test_triton.py", "not activation and not width"),
)
BITS = 2


def register_checkout() -> None:
    """Registers the entry points of a checkout that is not installed, for this process and its children."""
    if any(entry.name == "tardis" for entry in entry_points(group="torch_dynamo_backends")):
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = Path(tempfile.mkdtemp())
    info = folder / f"tardis_fx-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = ConfigParser(delimiters="=")
    groups.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w") as file:
        groups.write(file)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])


def tested(seconds: float) -> str:
    """Runs the GPU tests in parallel parts, since compiling takes most of the time; returns each part's last line."""

    def part(test: tuple[str, str]) -> str:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", test[0], "-k", test[1]]
        try:
            ended = subprocess.run(command, timeout=seconds, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired as error:
            print((error.output or b"").decode()[-4000:])
            return f"not finished in {seconds:.0f} s"
        output = ended.stdout.decode().strip()
        print(output[-4000:])
        return (output.splitlines() or [f"exit code {ended.returncode}"])[-1]

    with ThreadPoolExecutor(len(TESTS)) as pool:
        return "; ".join(pool.map(part, TESTS))


def cases(device: str) -> list[tuple[str, float, Callable[[], tuple[list[Timing], list[str]]]]]:
    """Name, seconds and run of every case."""

    def one_ffn(d: int, rate: float, tokens: Sequence[int]) -> tuple[list[Timing], list[str]]:
        shape, recipes = ffn.Shape("plain", d, 4 * d), [FoldRecipe(BITS, rate=rate)]
        timings, remarks = ffn.bench_ffn(shape, torch.bfloat16, tokens, recipes, LEAST_ROUNDS, device=device)
        return [replace(timing, case=f"FFN, {timing.case}, {rate:.0%}") for timing in timings], remarks

    one_model = partial(model.bench_model, dtype=torch.bfloat16, plans=[FoldRecipe(BITS)], rounds=LEAST_ROUNDS)
    ffns = [(f"FFN of {d}, {t[0]} tokens, {rate:.0%}", ONE_FFN, partial(one_ffn, d, rate, t)) for d, rate, t in FFNS]
    models = [(s, ONE_MODEL, partial(one_model, s, device=device, mode="max-autotune")) for s in MODELS]
    return [*ffns[:1], *models[:1], *ffns[1:9], *models[1:], *ffns[9:]]


def measured(device: str, until: float) -> tuple[list[Timing], list[str]]:
    """Runs cases until the time is over; returns their rows, and remarks on skipped and failed cases."""
    rows: list[Timing] = []
    remarks: list[str] = []
    for name, seconds, run in cases(device):
        if time.monotonic() + seconds > until:
            remarks.append(f"Not reached in time: {name}.")
            continue
        started = time.monotonic()
        try:
            timings, notes = run()
        except (TardisError, RuntimeError, ImportError) as error:  # a failing case does not stop the others
            remarks.append(f"Failed: {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        else:
            rows += timings
            remarks += [f"{name}: {note}" for note in notes]
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return sorted(rows, key=lambda row: not row.case.startswith("FFN")), remarks


def report(rows: Sequence[Timing], remarks: Sequence[str], machine: Machine, tests: str) -> str:
    """Formats the table with commit, command and conditions above it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    head = f"## {time.strftime('%Y-%m-%d')}, commit {commit}\n\n`python benchmarks/gpu.py`. GPU tests: {tests}."
    notes = "\n".join(f"- {remark}" for remark in remarks)
    return "\n\n".join(part for part in (head, table(rows, machine), notes) if part) + "\n"


def record(text: str, device: str, folder: Path) -> Path:
    """Inserts a report at the top of the device's file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"
    title, _, older = (path.read_text() if path.exists() else f"# {device}\n\n").partition("\n\n")
    path.write_text(f"{title}\n\n{text}" + (f"\n{older}" if older else ""))
    return path


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures on a CUDA device, and PyTorch finds none here: see docs/gpu.md")
    until = time.monotonic() + TIME
    register_checkout()
    tests = tested(ALL_TESTS)
    machine = Machine.measured("cuda")
    text = report(*measured("cuda", until), machine, tests)
    print(text)
    print(f"written to {record(text, machine.name, ROOT / 'benchmarks' / 'results')}", file=sys.stderr)


if __name__ == "__main__":
    main()
