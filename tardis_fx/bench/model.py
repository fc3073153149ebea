"""Decoding with a whole model of random weights: rewritten, beside Inductor and beside torchao's int8 and int4."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.bench import shapes, weight_only
from tardis_fx.bench.ffn import COLD
from tardis_fx.bench.machine import last_level_cache, wait
from tardis_fx.bench.plans import random_plans
from tardis_fx.bench.table import Row, in_turn
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.graph.capture import own_code
from tardis_fx.runtime.touched import count_touched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.plan import Plan
    from tardis_fx.runtime.touched import Touched

#: Tokens that thresholds are set on, in sequences as long as what is decoded: an FFN's inputs change with position.
SAMPLES = 1024


class _Decoder:
    """Steps of one token each from an empty static cache; the tokens are given, so that all contenders do one job."""

    def __init__(self, model: Any, tokens: Tensor, context: int, **options: Any) -> None:
        from transformers import StaticCache

        self._step: Callable[..., Any] = torch.compile(own_code(_call), fullgraph=True, **options)
        self._model = model
        self.cache, self._tokens = StaticCache(config=model.config, max_cache_len=context), tokens
        self._positions = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1)
        if tokens.is_cuda:  # memory of the cache that is there before a graph is compiled may be part of a CUDA graph
            with torch.no_grad():
                _call(model, tokens[:1, None], past_key_values=self.cache, position_ids=self._positions[0])

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds a step."""
        self.cache.reset()
        steps = list(zip(self._tokens.view(-1, 1, 1), self._positions, strict=True))
        wait(self._tokens.device)
        started = time.perf_counter()
        for token, position in steps:
            self._step(self._model, token, past_key_values=self.cache, position_ids=position)
        wait(self._tokens.device)
        return (time.perf_counter() - started) / len(steps)


def _call(model: Callable[..., Any], tokens: Tensor, **rest: Any) -> Any:
    return model(tokens, **rest).logits


@torch.no_grad()
def _counted(model: Any, plan: Plan, tokens: Tensor) -> Touched:
    """What the steps read: all at once, for counting computes every estimate once more."""
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    with count_touched() as touched:
        torch.compile(own_code(_call), backend="tardis", options=options)(model, tokens[None], use_cache=False)
    return touched


def compare(
    shape: str,
    dtype: torch.dtype,
    bits: Sequence[int],
    rate: float,
    rounds: int,
    steps: int = 32,
    context: int = 128,
    layers: int | None = None,
    device: str = "cpu",
    mode: str | None = None,
    weight_bits: Sequence[int] = (8,),
) -> tuple[list[Row], list[str]]:
    """Times decoding at batch 1, every contender with a static cache of its own.

    Args:
        shape: of the model, a key of :data:`tardis_fx.bench.shapes.SHAPES`.
        dtype: of weights and cache.
        bits: of the predictor, one contender each.
        rate: share of (token, neuron) pairs that are outliers, at the thresholds' setting.
        rounds: timed, after one that is not.
        steps: tokens decoded in a round.
        context: length of the cache, of which attention reads all at every step.
        layers: as many of the shape's; all when None.
        device: "cpu" or "cuda".
        mode: of torch.compile, for every contender.
        weight_bits: of torchao's contenders, 8 or 4.

    Returns:
        The rows, and remarks: among them why there is no row for one of torchao's.

    Raises:
        ConfigError: no such shape, or an argument is out of its range.
        BenchError: transformers is not installed, or the memory is not there.
    """
    if not 2 <= steps <= context:
        raise ConfigError(f"steps must lie between 2 and the context of {context}, not {steps}")
    config = shapes.config_of(shape, layers)
    quantisers = {b: weight_only.quantiser(b) for b in weight_bits}
    possible = any(callable(quantise) for quantise in quantisers.values())
    # Beside the weights: of each plan the folds, codes and a copy of one matrix; of int8 a whole copy while it is made.
    room = max(1 + 0.75 * len(bits), 2.0) + 0.5 * len(weight_bits) if possible else 1 + 0.75 * len(bits)
    model: Any = shapes.build(config, dtype, room, device)
    base_bytes, tokens = shapes.step_bytes(model), torch.randint(config.vocab_size, (steps,), device=device)
    decoders = {"Inductor": _Decoder(model, tokens, context, mode=mode)}
    touched, remarks, rates = {"Inductor": float(base_bytes)}, [], {}
    for b, quantise in quantisers.items():
        try:
            if isinstance(quantise, str):
                raise BenchError(quantise)
            quantised, saved = weight_only.quantised(model, quantise, b)
        except Exception as error:  # of what torchao needs beside itself, and says in ways of its own
            remarks.append(f"No row for torchao's int{b} weights: {error}.")
            continue
        name = f"torchao int{b} + Inductor"
        decoders[name], touched[name] = _Decoder(quantised, tokens, context, mode=mode), float(base_bytes - saved)
    batch = torch.randint(config.vocab_size, (-(-SAMPLES // steps), steps), device=device)
    for b, plan in random_plans(model, batch, bits, rate).items():
        name = f"tardis, {b} bits"
        decoders[name] = _Decoder(model, tokens, context, backend="tardis", options={"plan": plan, "mode": mode})
        counted = _counted(model, plan, tokens)
        dense = sum(site.dense_bytes for site in plan.sites)
        touched[name], rates[name] = base_bytes - dense + counted.per_token, counted.outlier_rate
    seconds = in_turn(decoders, rounds)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoders["Inductor"].cache.layers)
    if base_bytes < COLD * last_level_cache(device):
        remarks.append("The weights do not fill the last-level cache several times: in part this is its speed.")
    depth = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    case = f"{shape}, {depth}, {str(dtype).removeprefix('torch.')}, {steps} steps, cache of {context}"
    rows = [
        Row(case, name, seconds[name], seconds["Inductor"], touched[name] + cache, rates.get(name)) for name in decoders
    ]
    return rows, remarks
