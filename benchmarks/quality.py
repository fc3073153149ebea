"""Quality of the demo's model under one plan a row, on text that no plan was made from.

python benchmarks/quality.py                        the methods at several budgets
python benchmarks/quality.py allocation=per_site    a field of tardis_fx.Config changed, beside the default
python benchmarks/quality.py bfloat16 ...           the model cast to bfloat16, losses in float32

Every token takes fold and correction. "touched" is counted on the first quarter of the text,
the plan's own figure beside it.
"""

from __future__ import annotations

import ast
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from tardis_fx import Config, count_touched
from tardis_fx.calibrate import plan_for
from tardis_fx.calibration.observe import BatchObservation
from tardis_fx.demo import measure
from tardis_fx.demo.model import load

WINDOWS = 64
BASE = Config(progress=False)


def configs(changes: list[str]) -> dict[str, Config]:
    """By label: what is compared."""
    if not changes:
        budgets = (0.16, 0.2, 0.25, 0.3)
        found = {f"ours, {budget:.0%}": replace(BASE, budget=budget) for budget in budgets}
        return found | {f"paper, {b:.0%}": replace(BASE, budget=b, method="paper") for b in budgets[1:]}
    found = {"default": BASE}
    for change in changes:
        given: dict[str, Any] = {}
        for part in change.split(","):
            name, _, value = part.partition("=")
            given[name] = ast.literal_eval(value) if value[:1] in "0123456789TF" else value
        found[change] = replace(BASE, **given)
    return found


@torch.no_grad()
def main() -> None:
    """Measures and prints a table as Markdown."""
    demo = load()
    changes = [argument for argument in sys.argv[1:] if argument != "bfloat16"]
    if len(changes) < len(sys.argv[1:]):
        demo.model.bfloat16()
    text = demo.windows("test", WINDOWS)
    observation = BatchObservation(demo.model, demo.windows("calibration", WINDOWS).split(8), progress=False)
    dense = measure.logits(demo.model, text).float()
    base = measure.quality(dense, dense, text).perplexity
    print(f"dense perplexity {base:.3f}; {text.numel():,} held-out tokens\n")
    print("| plan | perplexity | rise | agreement | touched | plan says | fitted in |\n|---|---|---|---|---|---|---|")
    for label, config in configs(changes).items():
        started = time.perf_counter()
        plan = plan_for(observation, config)
        fitted = time.perf_counter() - started
        torch.compiler.reset()
        options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
        found = measure.logits(torch.compile(demo.model, backend="tardis", options=options), text).float()
        with count_touched() as touched:
            measure.logits(torch.compile(demo.model, backend="tardis", options=options), text[:16])
        quality = measure.quality(found, dense, text)
        total = sum(site.dense_bytes for site in plan.sites)
        print(
            f"| {label} | {quality.perplexity:.3f} | {quality.perplexity / base - 1:+.2%} | {quality.agreement:.1%} | "
            f"{touched.per_token / total:.2%} | {plan.touched_fraction:.2%} | {fitted:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
