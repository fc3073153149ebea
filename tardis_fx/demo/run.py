"""``tardis demo``: the main job on an embedded model, measured on modules that it has never seen."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from rich.table import Table

from tardis_fx.config import Config
from tardis_fx.demo.model import DemoModel, load
from tardis_fx.errors import DemoError
from tardis_fx.measure import quality as measure
from tardis_fx.measure.table import in_turn, ratio
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.planning import plan_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from tardis_fx.plan import Plan

#: Windows of 256 tokens: 16,384 tokens to calibrate on, and as many held-out ones to measure on.
WINDOWS = 64
METHODS = {"paper": "TARDIS (paper)", "partial_linear": "TARDIS (ours)"}
PARETO = {"paper": (0.2, 0.25, 0.3), "partial_linear": (0.06, 0.075, 0.1, 0.2)}
#: What is shown in the table and decodes: a method and one of its budgets.
SHOWN = [("paper", 0.2), ("partial_linear", 0.2), ("partial_linear", 0.075)]
PROMPT, NEW_TOKENS, ROUNDS = 64, 65, 9


@dataclass
class Results:
    """What the demo found.

    Attributes:
        dense: quality of the original.
        plans: by method and budget, with the quality of each.
        seconds: per token, round by round, of the dense model and of each plan shown, by label.
        texts: what each wrote, by label.
    """

    dense: measure.Quality
    plans: dict[tuple[str, float], tuple[Plan, measure.Quality]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def run(picture: Path, console: Console) -> Results:
    """Calibrates, compiles, measures and prints.

    Args:
        picture: where the plot goes, as PNG.
        console: where the table goes.

    Raises:
        DemoError: a library or the standard library's source is missing, or the picture cannot be written.
    """
    try:
        import matplotlib as _  # noqa: F401 - asked for before minutes are spent
    except ImportError as error:
        raise DemoError(f"the demo needs {error.name}: pip install 'tardis-fx[demo]'") from error
    if not os.access(picture.absolute().parent, os.W_OK):
        raise DemoError(f"cannot write the picture to {picture}")
    demo = load()
    text = demo.windows("test", WINDOWS)
    with Progress(console=console, transient=True) as progress:
        total = 2 + sum(len(budgets) for budgets in PARETO.values()) + len(SHOWN) + 1
        task = progress.add_task("calibrating", total=total)

        def done(what: str) -> None:
            progress.update(task, advance=1, description=what)

        observation = BatchObservation(demo.model, demo.windows("calibration", WINDOWS).split(8), progress=False)
        dense = measure.logits(demo.model, text)
        results = Results(measure.quality(dense, dense, text))
        done("dense model measured")
        for method, budgets in PARETO.items():
            for budget in budgets:
                plan = plan_for(observation, Config(budget=budget, method=method, progress=False))
                found = measure.logits(_compiled(demo, plan, prefill="rewritten", inner="eager"), text)
                results.plans[method, budget] = plan, measure.quality(found, dense, text)
                done(f"{_label(method, budget)} measured")
        _decode(demo, results, text[0, :PROMPT], done)
    _print(demo, results, console)
    _draw(results, picture)
    console.print(f"Picture: {picture}")
    return results


def _compiled(demo: DemoModel, plan: Plan, **options: str) -> Callable[..., Any]:
    torch.compiler.reset()  # or Dynamo would count these measurements as recompilations of one model
    given: dict[str, Any] = {"plan": plan, **options}
    return torch.compile(demo.model, backend="tardis", options=given, fullgraph=True)


def _decode(demo: DemoModel, results: Results, prompt: Tensor, done: Callable[[str], None]) -> None:
    torch.compiler.reset()
    steps: dict[str, Callable[..., Any]] = {"dense": torch.compile(demo.model, fullgraph=True)}
    for case in SHOWN:
        options: dict[str, Any] = {"plan": results.plans[case][0]}
        steps[_label(*case)] = torch.compile(demo.model, backend="tardis", options=options, fullgraph=True)
    decoders = {}
    for name, step in steps.items():
        decoders[name] = measure.Decoder(demo, step)
        tokens, _ = decoders[name](prompt, NEW_TOKENS)
        results.texts[name] = demo.tokenizer.decode(tokens.tolist())
        done(f"{name} compiled")
    runs = {name: partial(_seconds, decoder, prompt) for name, decoder in decoders.items()}
    results.seconds = in_turn(runs, ROUNDS)
    done("decoded")


def _label(method: str, budget: float) -> str:
    return f"{METHODS[method]}, {budget:.1%}"


def _seconds(decoder: measure.Decoder, prompt: Tensor) -> float:
    return decoder(prompt, NEW_TOKENS)[1]


def _print(demo: DemoModel, results: Results, console: Console) -> None:
    first = next(iter(results.plans.values()))[0]
    dense_bytes = sum(site.dense_bytes for site in first.sites)
    table = Table(title="Held-out modules of the standard library")
    heads = ["", "perplexity", "next token as dense", "FFN bytes / token", "tokens/s", "against Inductor (min to max)"]
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    speed = 1 / statistics.median(results.seconds["dense"])
    table.add_row(
        "dense (Inductor)",
        f"{results.dense.perplexity:.3f}",
        "100.0%",
        f"{dense_bytes / 1e6:.2f} MB",
        f"{speed:.0f}",
        "1.00x",
    )
    for case in SHOWN:
        (plan, quality), label = results.plans[case], _label(*case)
        low, median, high = ratio(results.seconds["dense"], results.seconds[label])
        table.add_row(
            label,
            f"{quality.perplexity:.3f} ({quality.perplexity / results.dense.perplexity - 1:+.2%})",
            f"{quality.agreement:.1%}",
            f"{plan.touched_fraction * dense_bytes / 1e6:.2f} MB ({plan.touched_fraction:.1%})",
            f"{1 / statistics.median(results.seconds[label]):.0f}",
            f"{median:.2f}x ({low:.2f} to {high:.2f})",
        )
    console.print(table)
    parameters, tokens = sum(p.numel() for p in demo.model.parameters()), WINDOWS * demo.context
    console.print(
        f"GPT-2 shape, {parameters / 1e6:.1f}M parameters, float32, trained on {demo.training['tokens'] / 1e6:.1f}M "
        f"tokens. Calibrated on {tokens:,} tokens of modules kept from training; perplexity and agreement over "
        f"{tokens:,} tokens of other such modules, every token through fold and correction. Bytes are the plan's, "
        f"expected corrections included.\n"
        f"Decoding: batch 1, static cache, {PROMPT} tokens of prompt, {NEW_TOKENS - 1} steps, median of {ROUNDS} "
        f"rounds in turn; {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        highlight=False,
    )
    for name, text in results.texts.items():
        console.print(f"\n{name} goes on:", style="bold")
        console.print("\n".join(text.splitlines()[:6]), markup=False, highlight=False)


def _draw(results: Results, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(results.dense.perplexity, color="gray", linestyle="--", label="dense (100% of the bytes)")
    for method, label in METHODS.items():
        points = sorted(
            (p.touched_fraction * 100, q.perplexity) for (m, _), (p, q) in results.plans.items() if m == method
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xlabel("FFN weight bytes touched per token, % of dense (float32)")
    axes.set_ylabel("perplexity on held-out modules")
    axes.legend()
    try:
        figure.savefig(picture, dpi=150)
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot write the picture to {picture}: {error}") from error
