"""Measures the cost of the weight guard relative to a decode step, on 48 layers, and how well a budget is kept.

python benchmarks/guard.py
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

import tardis_fx
from tardis_fx import backend
from tardis_fx.bench import shapes
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.quality import rewrite_every_token
from tardis_fx.measure.timing import seconds
from tardis_fx.passes.weight_guard import GuardedGraph

LAYERS, WIDTH, VOCABULARY, CONTEXT = 48, 256, 1024, 128


class Recorded(GuardedGraph):
    """A guarded graph that records its parts and its last inputs."""

    parts: tuple[Any, ...] = ()
    inputs: tuple[Any, ...] = ()

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        Recorded.parts = parts

    def __call__(self, *inputs: Any) -> Any:
        """Runs the guarded graph and records its inputs."""
        Recorded.inputs = inputs
        return super().__call__(*inputs)


def median(run: Callable[[], float], times: int) -> float:
    return statistics.median(run() for _ in range(times))


@torch.no_grad()
def main() -> None:
    """Measures decode step and guard, and prints the results."""
    config = hf.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = shapes.build(config, torch.float32, 1)
    *batches, tokens = (torch.randint(0, VOCABULARY, (4, CONTEXT)) for _ in range(5))
    widths = {"fold_bits": 4, "row_bits": 4}
    chosen = tardis_fx.Config(method="guarded_fold", budget=0.3, options=widths)
    plan = tardis_fx.calibrate(model, batches, config=chosen)
    backend.GuardedGraph = Recorded  # type: ignore[misc, attr-defined, assignment]
    decoder = Decoder(model, CONTEXT, plan)
    decoder.follow(tokens[0, :8])
    step = median(partial(decoder.follow, tokens[0, :100]), 9)
    guard = GuardedGraph(lambda *_: None, *Recorded.parts[1:])
    guarded = median(lambda: seconds(lambda: guard(*Recorded.inputs)), 2000)
    (snapshot,) = guard._known.values()
    compared = median(lambda: seconds(snapshot.weights._sample.next_lines_match), 2000)
    with tardis_fx.count_touched() as touched:
        rewrite_every_token(model, plan)(tokens, use_cache=False)
    counted = touched.per_token / sum(site.dense_bytes for site in plan.sites)
    print(
        f"{LAYERS} layers, d = {WIDTH}, float32; {conditions()}\n"
        f"budget {plan.config.budget:.0%}: {counted:.2%} of the FFN bytes touched by other random tokens\n"
        f"decode step {step * 1e3:.2f} ms; guard {guarded * 1e6:.1f} us per call, {guarded / step:.2%} of the step; "
        f"{guarded / LAYERS * 1e9:.0f} ns a site; comparing contents alone {compared * 1e6:.1f} us, "
        f"{compared / step:.2%} of the step"
    )


if __name__ == "__main__":
    main()
