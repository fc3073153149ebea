"""Time and memory of calibrating a GPT-2 of 124M parameters with random weights on random tokens.

python benchmarks/calibration.py [tokens]
"""

from __future__ import annotations

import resource
import sys
import time

import torch
import transformers as hf

import tardis_fx


def peak() -> float:
    """Largest resident memory of the process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    torch.manual_seed(0)
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    model = hf.GPT2LMHeadModel(hf.GPT2Config()).eval()
    batches = [torch.randint(0, model.config.vocab_size, (4, 512)) for _ in range(tokens // 2048)]
    loaded = peak()
    model(batches[0])
    forward = peak()
    started = time.perf_counter()
    plan = tardis_fx.calibrate(model, batches)
    print(
        f"{plan}\n{tokens:,} tokens: {time.perf_counter() - started:.0f} s, {torch.get_num_threads()} threads; peak "
        f"memory {peak():.2f} GB, {loaded:.2f} when loaded, {forward:.2f} after a forward pass"
    )


if __name__ == "__main__":
    main()
