"""What applying a saved plan adds to the start of a GPT-2 of 124M parameters: processes of each kind in turn.

    python benchmarks/startup.py [rounds]

Each process builds the same model of random weights, compiles it and decodes one token with a static cache; what is
timed is compiling and that token, the plan's file read and checked in it. Inductor's and the kernel's caches are warm
after the first round, which does not count, as they are where a service starts again.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tardis_fx.bench import shapes
from tardis_fx.bench.plans import Widths, random_plans
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.observation.capture import own_code

CONTEXT = 128
WIDTHS = Widths(2, 4, 4)


def model() -> Any:
    return shapes.build(shapes.config_of("gpt2"), torch.float32, 1)


def call(model: Any, token: torch.Tensor, cache: dict[str, Any]) -> Any:
    return model(token, **cache).logits


@torch.no_grad()
def started(plan: str | None) -> float:
    """Seconds to the first token."""
    from transformers import StaticCache

    gpt2 = model()
    cache = {cache_argument(gpt2): StaticCache(config=gpt2.config, max_cache_len=CONTEXT)}
    begun = time.perf_counter()
    how: dict[str, Any] = {} if plan is None else {"backend": "tardis", "options": {"plan": plan}}
    torch.compile(own_code(call), **how)(gpt2, torch.zeros(1, 1, dtype=torch.long), cache)
    return time.perf_counter() - begun


def main() -> None:
    if sys.argv[1:2] == ["start"]:
        print(started(sys.argv[2] if len(sys.argv) > 2 else None))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "plan.tardis.safetensors"))
        random_plans(model(), torch.randint(50257, (8, CONTEXT)), [WIDTHS], 0.05)[WIDTHS].save(path)
        kinds: dict[str, list[str]] = {"Inductor": [], "tardis": [path]}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind, arguments in kinds.items():
                command = [sys.executable, __file__, "start", *arguments]
                found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
                if turn:
                    seconds[kind].append(found)
        size = Path(path).stat().st_size / 1e6
    for kind, found in seconds.items():
        print(f"{kind}: {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
    added = [t - i for t, i in zip(seconds["tardis"], seconds["Inductor"], strict=True)]
    print(f"added by a plan of {size:.0f} MB: {statistics.median(added):.2f} s ({min(added):.2f} to {max(added):.2f})")


if __name__ == "__main__":
    main()
