"""Decoding with a whole model: rewritten, beside Inductor, and beside and with torchao's integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.bench import shapes
from tardis_fx.bench.ffn import COLD
from tardis_fx.bench.plans import ffn_weights, random_plans
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.measure import weight_only
from tardis_fx.measure.decoding import Decoder, call_model, texts
from tardis_fx.measure.machine import available_memory, last_level_cache
from tardis_fx.measure.table import Row, in_turn
from tardis_fx.observation.capture import own_code
from tardis_fx.plan import Plan
from tardis_fx.runtime.touched import count_touched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tardis_fx.bench.plans import Widths
    from tardis_fx.runtime.touched import Touched

#: Free memory over that which is asked for: compilers take some, too.
MARGIN = 1.2
#: Copies of the weights that there are while a graph is frozen: folded, transposed and packed.
FROZEN = 3
#: Tokens that thresholds are set on, in sequences as long as what is decoded: an FFN's inputs change with position.
SAMPLES = 1024


@dataclass(frozen=True)
class _Contender:
    """What is timed, the weight bytes that a step reads, and the share of outliers."""

    decoder: Decoder
    touched: float
    outliers: float | None = None


@torch.no_grad()
def _counted(model: Any, plan: Plan, tokens: Tensor) -> Touched:
    """What the steps read: all at once, for counting computes every estimate once more."""
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    with count_touched() as touched:
        torch.compile(own_code(call_model), backend="tardis", options=options)(model, tokens[None], use_cache=False)
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


class _Field:
    """The contenders of one model, and remarks on those that are not there."""

    def __init__(self, model: Any, plans: dict[str, Plan], tokens: Tensor, context: int, mode: str | None) -> None:
        self.remarks: list[str] = []
        self._contenders: dict[str, _Contender] = {}
        self._model, self._plans, self._tokens, self._context = model, plans, tokens, context
        self._inductor: dict[str, Any] = {"mode": mode}
        self._tardis: dict[str, dict[str, Any]] = {
            name: {"backend": "tardis", "options": {"plan": plan, "mode": mode}} for name, plan in plans.items()
        }

    def _decoder(self, model: Any, **options: Any) -> Decoder:
        return Decoder(model, self._tokens, self._context, **options)

    def compile(self) -> None:
        """Inductor, and every plan."""
        dense = float(shapes.step_bytes(self._model))
        self._contenders["Inductor"] = _Contender(self._decoder(self._model, **self._inductor), dense)
        for name, plan in self._plans.items():
            counted = _counted(self._model, plan, self._tokens)
            read = dense - sum(site.dense_bytes for site in plan.sites) + counted.per_token
            decoder = self._decoder(self._model, **self._tardis[name])
            self._contenders[f"tardis, {name}"] = _Contender(decoder, read, counted.outlier_rate)

    def freeze(self, memory: _Memory) -> None:
        """The same once more, with constants that Inductor packs."""
        needed = FROZEN * shapes.weight_bytes(self._model)
        options = {"Inductor": self._inductor} | {f"tardis, {name}": own for name, own in self._tardis.items()}
        for name, own in options.items():
            if not memory.fits(needed):
                self.remarks.append(f"No row for {name} with freezing: its copies of the weights do not fit in memory.")
                continue
            memory.promise(needed)
            decoder = self._decoder(self._model, freezing=True, **own)
            self._contenders[f"{name}; freezing"] = replace(self._contenders[name], decoder=decoder)

    def quantise(self, bits: int, memory: _Memory) -> None:
        """Integers of torchao for all projections, and for those that are not a plan's.

        Raises:
            BenchError: there is no torchao, or no memory.
        """
        if not memory.fits(shapes.weight_bytes(self._model)):
            raise BenchError("its copy of the weights does not fit in memory")
        quantise = weight_only.quantiser(bits, self._tokens.device.type)
        whole, saved, left = weight_only.quantised(self._model, quantise, bits)
        self.remarks += [f"torchao's int{bits} does not take {name}, which stays as it is." for name in left]
        read = self._contenders["Inductor"].touched - saved
        self._contenders[f"torchao int{bits} + Inductor"] = _Contender(self._decoder(whole, **self._inductor), read)
        ffns = ffn_weights(self._model, self._tokens[None, :2])
        for name, own in self._tardis.items():
            rest, saved, _ = weight_only.quantised(self._model, quantise, bits, ffns)
            alone = self._contenders[f"tardis, {name}"]
            around = replace(alone, decoder=self._decoder(rest, **own), touched=alone.touched - saved)
            self._contenders[f"tardis, {name}; else torchao int{bits}"] = around

    def race(self, case: str, rounds: int) -> list[Row]:
        """Times all in turn."""
        seconds = in_turn({name: one.decoder for name, one in self._contenders.items()}, rounds)
        layers = self._contenders["Inductor"].decoder.cache.layers
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return [
            Row(case, name, seconds[name], seconds["Inductor"], one.touched + cache, one.outliers)
            for name, one in self._contenders.items()
        ]


def _added(plan: Plan) -> float:
    """Bytes that a plan adds to the FFNs, over their own."""
    more = sum(site.stored_bytes - site.dense_bytes for site in plan.sites)
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
    size = dtype.itemsize
    added = {"plan": _added(plans)} if isinstance(plans, Plan) else {str(w): w.added(size) for w in plans}
    folder = shape if isinstance(shape, Path) else None
    model: Any = shapes.build(config, dtype, (1 + sum(added.values())) * MARGIN, device, folder)
    memory = _Memory(device)
    tokens, *batch = texts(model, 1 + -(-SAMPLES // steps), steps, folder is not None)
    if isinstance(plans, Plan):
        named = {"plan": plans}
    else:
        named = {str(w): plan for w, plan in random_plans(model, torch.stack(batch), plans, rate).items()}
    memory.promise(shapes.weight_bytes(model) * sum(added.values()))
    field = _Field(model, named, tokens, context, mode)
    field.compile()
    if device == "cpu":
        field.freeze(memory)
    for bits in weight_bits:
        try:
            field.quantise(bits, memory)
        except BenchError as error:
            field.remarks.append(f"No row for torchao's int{bits} weights: {error}.")
    if shapes.step_bytes(model) < COLD * last_level_cache(device):
        field.remarks.append("The weights do not fill the last-level cache several times: in part this is its speed.")
    depth = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    title = folder.absolute().name if folder else shape
    case = f"{title}, {depth}, {str(dtype).removeprefix('torch.')}, {steps} steps, cache of {context}"
    return field.race(case, rounds), field.remarks
