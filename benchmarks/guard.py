"""What the weight guard costs on a model of 48 layers, beside a decode step, and how its budget is kept.

python benchmarks/guard.py
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf

import tardis_fx
from tardis_fx import backend
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.runtime.guard import GuardedGraph

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, WIDTH, VOCABULARY, CONTEXT = 48, 256, 1024, 128


class Recorded(GuardedGraph):
    """Keeps what it was made of and was last called with."""

    made: tuple[Any, ...] = ()
    inputs: tuple[Any, ...] = ()

    def __init__(self, *parts: Any) -> None:
        """As the guarded graph itself."""
        super().__init__(*parts)
        Recorded.made = parts

    def __call__(self, *inputs: Any) -> Any:
        """As the guarded graph itself."""
        Recorded.inputs = inputs
        return super().__call__(*inputs)


def median(run: Callable[[], Any], times: int) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = hf.GPT2LMHeadModel(config).eval()
    batches = [torch.randint(0, VOCABULARY, (4, CONTEXT)) for _ in range(4)]
    plan = tardis_fx.calibrate(
        model, batches, config=tardis_fx.Config(budget=0.3, options={"fold_bits": 4, "row_bits": 4})
    )
    backend.GuardedGraph = Recorded  # type: ignore[misc]
    fast = torch.compile(model, backend="tardis", options={"plan": plan})
    token, cache = torch.tensor([[1]]), {cache_argument(model): hf.StaticCache(config=config, max_cache_len=CONTEXT)}
    positions = iter(range(CONTEXT))

    def step() -> None:
        fast(token, **cache, position_ids=torch.tensor([[next(positions)]]))

    for _ in range(8):
        step()
    _, guards, other, inputs = Recorded.made
    guard = GuardedGraph(lambda *_: None, guards, other, inputs)
    steps, guarded = median(step, 100), median(lambda: guard(*Recorded.inputs), 2000)
    (known,) = guard._known.values()
    compared = median(known.weights._sample.next_lines_match, 2000)
    torch.compiler.reset()
    options: Any = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    whole = torch.compile(model, backend="tardis", options=options)
    with tardis_fx.count_touched() as touched:
        whole(torch.randint(0, VOCABULARY, (4, CONTEXT)), use_cache=False)
    counted = touched.per_token / sum(site.dense_bytes for site in plan.sites)
    print(f"budget {plan.config.budget:.0%}: {counted:.2%} of the FFN bytes touched by other random tokens")
    print(
        f"{LAYERS} layers, d = {WIDTH}, float32; {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\ndecode step {steps * 1e3:.2f} ms; guard {guarded * 1e6:.1f} us per call, "
        f"{guarded / steps:.2%} of the step; {guarded / LAYERS * 1e9:.0f} ns a site; comparing contents alone "
        f"{compared * 1e6:.1f} us, {compared / steps:.2%} of the step"
    )


if __name__ == "__main__":
    main()
