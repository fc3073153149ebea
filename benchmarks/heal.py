"""What healing gives the demo's model: perplexity on held-out text before and after.

python benchmarks/heal.py                 the model cast to bfloat16, 4-bit fold and rows, at several budgets
python benchmarks/heal.py 0.15            at this budget only
python benchmarks/heal.py float32 0.2     in float32, with fold and rows in the model's own dtype
python benchmarks/heal.py 0.15 windows=256 steps=300    healed on more of the calibration text, and for longer

Plans are fitted to 64 windows of 256 tokens of the calibration split, and healed on the same ones, two windows a step,
the last eighth held back. The test split is read for the table alone. Every token takes fold and correction; "touched"
is counted on the first quarter of the text.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from tardis_fx import Config, Plan, count_touched, heal
from tardis_fx.demo.model import load
from tardis_fx.measure import quality as measure
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.planning import plan_for

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOWS = 64


@torch.no_grad()
def row(model: nn.Module, plan: Plan, text: Tensor, dense: Tensor) -> str:
    """Cells of the table for one plan."""
    torch.compiler.reset()
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    compiled = torch.compile(model, backend="tardis", options=options)
    found = measure.quality(measure.logits(compiled, text).float(), dense, text)
    with count_touched() as touched:
        measure.logits(compiled, text[: len(text) // 4])
    rise = found.perplexity / measure.quality(dense, dense, text).perplexity - 1
    read = touched.per_token / sum(site.dense_bytes for site in plan.sites)
    return f"{rise:+.2%} | {found.agreement:.1%} | {read:.2%} | {plan.touched_fraction:.2%}"


def main() -> None:
    """Measures and prints a table as Markdown."""
    demo, arguments = load(), sys.argv[1:]
    whole = "float32" in arguments
    given = {name: int(value) for name, _, value in (a.partition("=") for a in arguments) if value}
    windows, steps = given.get("windows", WINDOWS), given.get("steps", 200)
    budgets = [float(a) for a in arguments if a[0].isdigit()] or ([0.2] if whole else [0.1, 0.12, 0.15, 0.2])
    bits = 16 if whole else 4
    if not whole:
        demo.model.bfloat16()
    text = demo.windows("test", WINDOWS)
    observation = BatchObservation(demo.model, demo.windows("calibration", WINDOWS).split(8), progress=False)
    batches = demo.windows("calibration", windows).split(2)
    dense = measure.logits(demo.model, text).float()
    print(f"healed on {windows * demo.context:,} tokens of the calibration split; {text.numel():,} held-out tokens\n")
    print("| plan | rise | agreement | touched | plan says | time |\n|---|---|---|---|---|---|", flush=True)
    for budget in budgets:
        config = Config(budget=budget, options={"fold_bits": bits, "row_bits": bits}, progress=False)
        started = time.perf_counter()
        plan = plan_for(observation, config)
        fitted = time.perf_counter()
        print(f"| {budget:.0%} | {row(demo.model, plan, text, dense)} | {fitted - started:.0f} s |", flush=True)
        started = time.perf_counter()
        better = heal(demo.model, plan, batches, steps=steps, progress=False)
        healed = time.perf_counter()
        print(
            f"| {budget:.0%}, healed | {row(demo.model, better, text, dense)} | {healed - started:.0f} s |", flush=True
        )


if __name__ == "__main__":
    main()
