"""``tardis demo``: calibrates and compiles an embedded model, and measures it on unseen modules."""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.demo.model import DemoModel, load
from tardis_fx.errors import DemoError
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.extras import needed_by
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.plots import draw_pareto
from tardis_fx.measure.quality import DenseReference, Quality, rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.measure.timing import Ratio, interleave
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.plan import Plan
from tardis_fx.planning import plan_for

#: Number of 256-token windows: 16,384 tokens to calibrate on, and as many held-out tokens to measure on.
WINDOWS = 64
METHODS = {"paper": "TARDIS (paper)", "partial_linear": "TARDIS (ours)"}
PARETO = {"paper": (0.2, 0.25, 0.3), "partial_linear": (0.06, 0.075, 0.1, 0.2)}
#: Plans in the table that also decode: a method and one of its budgets.
SHOWN = [("paper", 0.2), ("partial_linear", 0.2), ("partial_linear", 0.075)]
PROMPT, NEW_TOKENS, ROUNDS = 64, 65, 9


@dataclass
class Results:
    """Quality, decoding times and texts measured by the demo.

    Attributes:
        dense: quality of the original.
        plans: by method and budget, with the quality of each.
        seconds: per token, round by round, of the dense model and of each plan shown, by label.
        texts: continuation by each model, by label.
    """

    dense: Quality
    plans: dict[tuple[str, float], tuple[Plan, Quality]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def run_demo(picture: Path, console: Console) -> Results:
    """Calibrates, compiles and measures the demo's plans, and prints the results.

    Args:
        picture: path of the plot, as PNG.
        console: for the table.

    Raises:
        DemoError: a library or the standard library's source is missing, or the picture cannot be written.
    """
    with needed_by("the demo", DemoError):  # before spending minutes
        for library in ("cpuinfo", "matplotlib", "tabulate"):
            importlib.import_module(library)
    if not os.access(picture.absolute().parent, os.W_OK):
        raise DemoError(f"cannot write the picture to {picture}")
    demo = load()
    text = demo.windows("test", WINDOWS)
    with Progress(console=console, transient=True) as progress:
        total = 2 + sum(len(budgets) for budgets in PARETO.values()) + len(SHOWN) + 1
        task = progress.add_task("calibrating", total=total)
        done = partial(progress.update, task, advance=1)
        observation = BatchObservation(demo.model, demo.windows("calibration", WINDOWS).split(8), progress=False)
        reference = DenseReference(demo.model, text)
        results = Results(reference.dense)
        done(description="dense model measured")
        for method, budgets in PARETO.items():
            for budget in budgets:
                plan = plan_for(observation, Config(budget=budget, method=method, progress=False))
                results.plans[method, budget] = plan, reference.quality(rewrite_every_token(demo.model, plan))
                done(description=f"{_label(method, budget)} measured")
        _decode(demo, results, text[0, :PROMPT], done)
    _print(demo, results, console)
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for (method, _), (plan, quality) in results.plans.items():
        lines.setdefault(METHODS[method], []).append((plan.touched_fraction, [100 * quality.rise]))
    title = "GPT-2 shape, float32, held-out modules of the standard library"
    draw_pareto(lines, picture, title=title, loss="perplexity rise, %", least=0.01)
    console.print(f"Picture: {picture}")
    return results


def _label(method: str, budget: float) -> str:
    return f"{METHODS[method]}, {budget:.1%}"


def _decode(demo: DemoModel, results: Results, prompt: Tensor, done: Callable[..., None]) -> None:
    options: dict[str, dict[str, Any]] = {"dense (Inductor)": {}}
    for case in SHOWN:
        options[_label(*case)] = {"backend": "tardis", "options": {"plan": results.plans[case][0]}}
    runs = {}
    for label, chosen in options.items():
        decoder = Decoder(demo.model, demo.context, **chosen)
        results.texts[label] = demo.tokenizer.decode(decoder.continue_text(prompt, NEW_TOKENS)[0].tolist())
        runs[label] = lambda decoder=decoder: decoder.continue_text(prompt, NEW_TOKENS)[1]
        done(description=f"{label} compiled")
    results.seconds = interleave(runs, ROUNDS)
    done(description="decoded")


def _print(demo: DemoModel, results: Results, console: Console) -> None:
    plan = next(iter(results.plans.values()))[0]
    dense_bytes = sum(site.dense_bytes for site in plan.sites)
    dense = next(iter(results.seconds))
    shown = [(dense, 1.0, results.dense)]
    for case in SHOWN:
        plan, quality = results.plans[case]
        shown.append((_label(*case), plan.touched_fraction, quality))
    rows = [
        [
            label,
            f"{quality.perplexity:.3f} ({quality.rise:+.2%})",
            f"{quality.agreement:.1%}",
            f"{touched * dense_bytes / 1e6:.2f} MB ({touched:.1%})",
            f"{1 / statistics.median(results.seconds[label]):.0f}",
            str(Ratio.between(results.seconds[dense], results.seconds[label])),
        ]
        for label, touched, quality in shown
    ]
    heads = ["", "perplexity", "next token as dense", "FFN bytes / token", "tokens/s", "against Inductor (min to max)"]
    parameters, tokens = sum(p.numel() for p in demo.model.parameters()), WINDOWS * demo.context
    console.print(
        f"{markdown(heads, rows)}\n\n"
        f"GPT-2 shape, {parameters / 1e6:.1f}M parameters, float32, trained on {demo.training['tokens'] / 1e6:.1f}M "
        f"tokens. Calibrated on {tokens:,} tokens of modules kept from training; perplexity and agreement over "
        f"{tokens:,} tokens of other such modules, every token through fold and correction. Bytes are the plan's, "
        f"expected corrections included.\n"
        f"Decoding: batch 1, static cache, {PROMPT} tokens of prompt, {NEW_TOKENS - 1} steps, median of {ROUNDS} "
        f"interleaved rounds; {conditions()}.",
        markup=False,
        highlight=False,
    )
    for label, text in results.texts.items():
        console.print(f"\n{label} goes on:", style="bold")
        console.print("\n".join(text.splitlines()[:6]), markup=False, highlight=False)
