"""Decoding with a whole model: rewritten, beside Inductor, and beside and with torchao's integers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config as inductor_config

from tardis_fx.bench import shapes, weight_only
from tardis_fx.bench.ffn import COLD
from tardis_fx.bench.machine import available_memory, last_level_cache, wait
from tardis_fx.bench.plans import ffn_weights, random_plans
from tardis_fx.bench.table import Row, in_turn
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.graph.capture import own_code
from tardis_fx.plan import Plan
from tardis_fx.runtime.touched import count_touched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.bench.plans import Widths
    from tardis_fx.runtime.touched import Touched

#: Free memory over that which is asked for: compilers take some, too.
MARGIN = 1.2
#: Copies of the weights that there are while a graph is frozen: folded, transposed and packed.
FROZEN = 3
#: Tokens that thresholds are set on, in sequences as long as what is decoded: an FFN's inputs change with position.
SAMPLES = 1024


class _Decoder:
    """Steps of one token each from an empty static cache; the tokens are given, so that all contenders do one job.

    Freezing is no option of ``torch.compile``: Dynamo reads the setting, too, and at every compilation.
    """

    def __init__(self, model: Any, tokens: Tensor, context: int, freezing: bool = False, **options: Any) -> None:
        from transformers import StaticCache

        self._frozen: dict[str, Any] = {"freezing": True} if freezing else {}
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
        with inductor_config.patch(self._frozen):
            return self._seconds()

    def _seconds(self) -> float:
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


def _texts(model: Any, count: int, length: int, own: bool) -> Tensor:
    """Sequences of tokens, [count, length]: any, or what a trained model says by itself."""
    first = torch.randint(model.config.vocab_size, (count, 1 if own else length), device=model.device)
    if not own:
        return first
    new = length - 1
    found: Tensor = model.generate(first, do_sample=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return found


@dataclass(frozen=True)
class _Contender:
    """What is timed, the weight bytes that a step reads, and the share of outliers."""

    decoder: _Decoder
    touched: float
    outliers: float | None = None


@torch.no_grad()
def _counted(model: Any, plan: Plan, tokens: Tensor) -> Touched:
    """What the steps read: all at once, for counting computes every estimate once more."""
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    with count_touched() as touched:
        torch.compile(own_code(_call), backend="tardis", options=options)(model, tokens[None], use_cache=False)
    return touched


class _Memory:
    """What is free, less what contenders take once they are compiled."""

    def __init__(self, device: str) -> None:
        self._device, self._promised = device, 0.0

    def fits(self, size: float) -> bool:
        """Whether so many bytes are there."""
        free = available_memory(self._device)
        return free is None or free - self._promised >= MARGIN * size

    def promise(self, size: float) -> None:
        """Takes so many bytes for a contender that is compiled later."""
        self._promised += size


def _added(plan: Plan) -> float:
    """Bytes that a plan adds to the FFNs, over their own."""
    more = sum(site.stored_bytes - site.dense_bytes for site in plan.sites if site.method)
    return more / max(1, sum(site.dense_bytes for site in plan.sites))


def compare(
    shape: str | Path,
    dtype: torch.dtype,
    plans: Sequence[Widths] | Plan,
    rate: float,
    rounds: int,
    steps: int = 32,
    context: int = 128,
    layers: int | None = None,
    device: str = "cpu",
    mode: str | None = None,
    weight_bits: Sequence[int] = (8, 4),
) -> tuple[list[Row], list[str]]:
    """Times decoding at batch 1, every contender with a static cache of its own.

    Args:
        shape: of the model, a key of :data:`tardis_fx.bench.shapes.SHAPES`; or the folder of one.
        dtype: of weights and cache.
        plans: a plan, or widths of some; one contender each, and one more for each of torchao's, whose the other
            projections are.
        rate: share of (token, neuron) pairs that are outliers, at the setting of the thresholds; not of a plan's own.
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
        BenchError: transformers is not installed, the folder holds no language model, or the memory is not there.
        PlanMismatchError: the plan is one for another model.
    """
    if not 2 <= steps <= context:
        raise ConfigError(f"steps must lie between 2 and the context of {context}, not {steps}")
    config = shapes.config_of(shape, layers)
    size = torch.empty(0, dtype=dtype).element_size()
    added = {"plan": _added(plans)} if isinstance(plans, Plan) else {str(w): w.added(size) for w in plans}
    folder = shape if isinstance(shape, Path) else None
    model: Any = shapes.build(config, dtype, (1 + sum(added.values())) * MARGIN, device, folder)
    weights, memory = shapes.weight_bytes(model), _Memory(device)
    tokens, *batch = _texts(model, 1 + -(-SAMPLES // steps), steps, folder is not None)
    if isinstance(plans, Plan):
        named = {"plan": plans}
    else:
        named = {str(w): plan for w, plan in random_plans(model, torch.stack(batch), plans, rate).items()}
    ffns = ffn_weights(model, tokens[None, :2])
    base, remarks = float(shapes.step_bytes(model)), []

    def decoder(model: Any, **options: Any) -> _Decoder:
        return _Decoder(model, tokens, context, **options)

    contenders = {"Inductor": _Contender(decoder(model, mode=mode), base)}
    options = {w: {"backend": "tardis", "options": {"plan": plan, "mode": mode}} for w, plan in named.items()}
    for w, plan in named.items():
        memory.promise(weights * added[w])
        counted = _counted(model, plan, tokens)
        read = base - sum(site.dense_bytes for site in plan.sites) + counted.per_token
        contenders[f"tardis, {w}"] = _Contender(decoder(model, **options[w]), read, counted.outlier_rate)
    if device == "cpu":
        frozen = {"Inductor": {"mode": mode}} | {f"tardis, {w}": options[w] for w in named}
        for name, own in frozen.items():
            if not memory.fits(FROZEN * weights):
                remarks.append(f"No row for {name} with freezing: its copies of the weights do not fit in memory.")
                continue
            memory.promise(FROZEN * weights)
            contenders[f"{name}; freezing"] = replace(contenders[name], decoder=decoder(model, freezing=True, **own))
    for b in weight_bits:
        try:
            if not memory.fits(weights):
                raise BenchError("its copy of the weights does not fit in memory")
            quantise = weight_only.quantiser(b, device)
            whole, saved, left = weight_only.quantised(model, quantise, b)
            remarks += [f"torchao's int{b} does not take {name}, which stays as it is." for name in left]
            contenders[f"torchao int{b} + Inductor"] = _Contender(decoder(whole, mode=mode), base - saved)
            for w, plan in named.items():
                of = contenders[f"tardis, {w}"]
                rest, saved, _ = weight_only.quantised(model, quantise, b, ffns)
                decoding = decoder(rest, backend="tardis", options={"plan": plan, "mode": mode})
                contenders[f"tardis, {w}; else torchao int{b}"] = replace(
                    of, decoder=decoding, touched=of.touched - saved
                )
        except BenchError as error:
            remarks.append(f"No row for torchao's int{b} weights: {error}.")
    seconds = in_turn({name: one.decoder for name, one in contenders.items()}, rounds)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in contenders["Inductor"].decoder.cache.layers)
    if base < COLD * last_level_cache(device):
        remarks.append("The weights do not fill the last-level cache several times: in part this is its speed.")
    depth = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    title = folder.absolute().name if folder else shape
    case = f"{title}, {depth}, {str(dtype).removeprefix('torch.')}, {steps} steps, cache of {context}"
    return [
        Row(case, name, seconds[name], seconds["Inductor"], one.touched + cache, one.outliers)
        for name, one in contenders.items()
    ], remarks
