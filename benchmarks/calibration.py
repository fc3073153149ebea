"""Measures time and memory of calibrating a GPT-2 of 124M parameters with random weights on random tokens.

python benchmarks/calibration.py [tokens]
"""

import resource
import sys

import torch

import tardis_fx
from tardis_fx.bench import shapes
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.timing import seconds


def peak() -> float:
    """Largest resident memory of the process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def main() -> None:
    """Calibrates the model, and prints time and peak memory."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    model = shapes.build(shapes.config_of("gpt2"), torch.float32, 1)
    batches = [torch.randint(0, 50257, (4, 512)) for _ in range(tokens // 2048)]
    loaded = peak()
    model(batches[0])
    forward = peak()
    taken = seconds(lambda: print(tardis_fx.calibrate(model, batches)))
    print(
        f"{tokens:,} tokens: {taken:.0f} s; peak memory {peak():.2f} GB, {loaded:.2f} when loaded, {forward:.2f} after "
        f"a forward pass; GPT-2 of 124M, float32; {conditions()}"
    )


if __name__ == "__main__":
    main()
