"""Measures the time that a saved plan adds to the start of a GPT-2 of 124M parameters, with a process per start.

    python benchmarks/startup.py [rounds]

Each process builds the same model of random weights, compiles it and decodes one token with a static cache; timed are
the compilation and that token, including reading and checking the plan's file. Inductor's and the kernel's caches are
warm after the warm-up round, as for a restarted service.
"""

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tardis_fx.bench import shapes
from tardis_fx.bench.folds import FoldRecipe
from tardis_fx.bench.plans import random_plans
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.timing import interleave

CONTEXT = 128
RECIPE = FoldRecipe(2, 4, 4)


def build() -> nn.Module:
    return shapes.build(shapes.config_of("gpt2"), torch.float32, 1)


def started(*arguments: str) -> float:
    """Seconds to the first token in a new process."""
    command = [sys.executable, __file__, "start", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["start"]:
        decoder = Decoder(build(), CONTEXT, *map(Path, sys.argv[2:]))
        print(decoder.follow(torch.zeros(1, dtype=torch.long)))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.tardis.safetensors")
        random_plans(build(), torch.randint(50257, (8, CONTEXT)), [RECIPE])[RECIPE].save(path)
        seconds = interleave({"Inductor": started, "tardis": partial(started, str(path))}, rounds)
        size = path.stat().st_size / 1e6
    print(f"GPT-2 of 124M, float32, {RECIPE}; {rounds} interleaved rounds after one warm-up round; {conditions()}")
    seconds["added by the plan"] = [t - i for t, i in zip(seconds["tardis"], seconds["Inductor"], strict=True)]
    for kind, taken in seconds.items():
        print(f"{kind}: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})")
    print(f"the plan's file: {size:.0f} MB")


if __name__ == "__main__":
    main()
