"""``tardis demo``: calibrates and compiles an embedded model, and measures it on unseen modules."""

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jaxtyping import Int64
from rich.console import Console
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.demo.model import NEW_TOKENS, PROMPT, WINDOWS, DemoModel, load
from tardis_fx.errors import DemoError
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.plots import draw_pareto
from tardis_fx.measure.progress import steps
from tardis_fx.measure.quality import DenseReference, Quality, rewrite_every_token
from tardis_fx.measure.requirements import check_writable, needed_by
from tardis_fx.measure.tables import markdown
from tardis_fx.measure.timing import Ratio, interleave
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.plan import Plan
from tardis_fx.planning import plan_for

METHODS = {"paper": "TARDIS (paper)", "guarded_fold": "guarded fold", "partial_linear": "TARDIS (ours)"}
PARETO = {"paper": (0.2, 0.3), "guarded_fold": (0.06, 0.075), "partial_linear": (0.06, 0.075, 0.1)}
#: Plans in the table that also decode: a method and one of its budgets.
SHOWN = [("paper", 0.2), ("guarded_fold", 0.075), ("partial_linear", 0.075)]
DENSE = "dense (Inductor)"
ROUNDS = 9


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
    """Calibrates, compiles and measures the demo's plans, prints the results, and draws them as PNG.

    Raises:
        DemoError: a library or the standard library's source is missing, or the picture cannot be written.
    """
    with needed_by("the demo", DemoError):  # before spending minutes
        for library in ("cpuinfo", "matplotlib", "tabulate"):
            importlib.import_module(library)
    check_writable(picture, DemoError)
    demo = load()
    text = demo.windows("test", WINDOWS)
    lines: dict[str, list[tuple[float, list[float]]]] = {METHODS[method]: [] for method in PARETO}
    with steps(console, 2 + sum(len(budgets) for budgets in PARETO.values()) + len(SHOWN) + 1) as done:
        observation = BatchObservation(demo.model, demo.windows("calibration", WINDOWS).split(2), progress=False)
        reference = DenseReference(demo.model, text)
        results = Results(reference.dense)
        done("dense model measured")
        for method, budgets in PARETO.items():
            for budget in budgets:
                plan = plan_for(observation, Config(budget=budget, method=method, progress=False))
                quality = reference.quality(rewrite_every_token(demo.model, plan))
                results.plans[method, budget] = plan, quality
                lines[METHODS[method]].append((plan.touched_fraction, [100 * quality.rise]))
                done(f"{_label(method, budget)} calibrated and measured")
        _decode(demo, results, text[0, :PROMPT], done)
    _print(demo, results, console)
    title = "GPT-2 shape, float32, held-out modules of the standard library"
    draw_pareto(lines, picture, title=title, loss="perplexity rise, %", minimum=0.01)
    console.print(f"Picture: {picture}")
    return results


def _label(method: str, budget: float) -> str:
    return f"{METHODS[method]}, {budget:.1%}"


def _decode(demo: DemoModel, results: Results, prompt: Int64[Tensor, " length"], done: Callable[[str], None]) -> None:
    plans = {DENSE: None} | {_label(*case): results.plans[case][0] for case in SHOWN}
    runs = {}
    for label, plan in plans.items():
        continue_text = partial(Decoder(demo.model, demo.context, plan).continue_text, prompt, NEW_TOKENS)
        results.texts[label] = demo.tokenizer.decode(continue_text()[0].tolist())
        runs[label] = lambda run=continue_text: run()[1]
        done(f"{label} compiled")
    results.seconds = interleave(runs, ROUNDS)
    done("decoded")


def _print(demo: DemoModel, results: Results, console: Console) -> None:
    dense_bytes = sum(site.dense_bytes for site in next(iter(results.plans.values()))[0].sites)
    shown = [(DENSE, 1.0, results.dense)]
    for case in SHOWN:
        plan, quality = results.plans[case]
        shown.append((_label(*case), plan.touched_fraction, quality))
    rows = [
        {
            "": label,
            "perplexity": f"{quality.perplexity:.3f} ({quality.rise:+.2%})",
            "next token as dense": f"{quality.agreement:.1%}",
            "FFN bytes / token": f"{touched * dense_bytes / 1e6:.2f} MB ({touched:.1%})",
            "tokens/s": f"{1 / statistics.median(results.seconds[label]):.0f}",
            "against Inductor (min to max)": str(Ratio.between(results.seconds[DENSE], results.seconds[label])),
        }
        for label, touched, quality in shown
    ]
    parameters, tokens = sum(p.numel() for p in demo.model.parameters()), WINDOWS * demo.context
    console.print(
        f"{markdown(rows)}\n\n"
        f"GPT-2 shape, {parameters / 1e6:.1f}M parameters, float32, trained on {demo.training['tokens'] / 1e6:.1f}M "
        f"tokens. Calibrated on {tokens:,} tokens of modules kept from training; perplexity and agreement over "
        f"{tokens:,} tokens of other such modules, every token rewritten. Bytes are those that the plan expects.\n"
        f"Decoding: batch 1, static cache, {PROMPT} tokens of prompt, {NEW_TOKENS - 1} steps, median of {ROUNDS} "
        f"interleaved rounds; {conditions()}.",
        markup=False,
        highlight=False,
        soft_wrap=True,  # a file gets the table in whole lines
    )
    for label, text in results.texts.items():
        console.print(f"\n{label} continues:", style="bold")
        console.print("\n".join(text.splitlines()[:6]), markup=False, highlight=False)
