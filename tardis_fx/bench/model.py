"""Times decoding with a whole model: rewritten, compiled by Inductor, quantised by torchao, and combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tardis_fx.bench import shapes
from tardis_fx.bench.ffn import COLD
from tardis_fx.bench.plans import Widths, ffn_weights, random_plans
from tardis_fx.bench.timings import Timing
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.measure import weight_only
from tardis_fx.measure.decoding import Decoder, call_model, sample_tokens
from tardis_fx.measure.machine import available_memory, last_level_cache
from tardis_fx.measure.timing import interleave
from tardis_fx.observation.capture import own_code
from tardis_fx.plan import Plan
from tardis_fx.runtime.touched import Touched, count_touched

#: Required free memory as a multiple of the requested memory, because compilers also need some.
MARGIN = 1.2
#: Copies of the weights that exist while a graph is frozen: folded, transposed and packed.
FROZEN = 3
#: Number of tokens for setting thresholds, in sequences of the decoded length, as inputs depend on the position.
SAMPLES = 1024


def bench_model(
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
) -> tuple[list[Timing], list[str]]:
    """Times decoding at batch 1; every contender has its own static cache.

    Args:
        shape: of the model, a key of :data:`tardis_fx.bench.shapes.SHAPES`; or the folder of a model.
        dtype: of weights and cache.
        plans: a plan, or widths of some: one contender each, and one more for each of torchao's widths, which
            quantises the projections outside the FFNs.
        rate: share of (token, neuron) pairs that are outliers, for setting thresholds; not used with a plan.
        rounds: timed rounds, after one warm-up round.
        steps: tokens decoded in a round.
        context: length of the cache, all of which attention reads at every step.
        layers: number of the shape's layers; None means all.
        device: "cpu" or "cuda".
        mode: of torch.compile, for every contender.
        weight_bits: of torchao's contenders, 8 or 4.

    Returns:
        The timings, and remarks, for example why there is no row for one of torchao's widths.

    Raises:
        ConfigError: there is no such shape, or an argument is out of range.
        BenchError: transformers is not installed, the folder holds no language model, or there is not enough memory.
        PlanMismatchError: the plan is for another model.
    """
    if not 2 <= steps <= context:
        raise ConfigError(f"steps must lie between 2 and the context of {context}, not {steps}")
    config = shapes.config_of(shape, layers)
    size = dtype.itemsize
    added = _added_bytes(plans) if isinstance(plans, Plan) else sum(w.added(size) for w in plans)
    folder = shape if isinstance(shape, Path) else None
    model: Any = shapes.build(config, dtype, (1 + added) * MARGIN, device, folder)
    memory = _FreeMemory(device)
    tokens, *batch = sample_tokens(model, 1 + -(-SAMPLES // steps), steps, trained=folder is not None)
    if isinstance(plans, Plan):
        named = {"plan": plans}
    else:
        named = {str(w): plan for w, plan in random_plans(model, torch.stack(batch), plans, rate).items()}
    memory.reserve(shapes.weight_bytes(model) * added)
    contenders = _ModelContenders(model, named, tokens, context, mode)
    if device == "cpu":
        contenders.add_frozen(memory)
    for bits in weight_bits:
        try:
            contenders.add_torchao(bits, memory)
        except BenchError as error:
            contenders.remarks.append(f"No row for torchao's int{bits} weights: {error}.")
    if shapes.step_bytes(model) < COLD * last_level_cache(device):
        contenders.remarks.append(
            "The weights do not fill the last-level cache several times: in part this is its speed."
        )
    depth = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    title = folder.absolute().name if folder else shape
    case = f"{title}, {depth}, {str(dtype).removeprefix('torch.')}, {steps} steps, cache of {context}"
    return contenders.time(case, rounds), contenders.remarks


def _added_bytes(plan: Plan) -> float:
    """Bytes that a plan adds to the FFNs, as a share of their weights."""
    more = sum(site.stored_bytes - site.dense_bytes for site in plan.sites)
    return more / max(1, sum(site.dense_bytes for site in plan.sites))


@dataclass(frozen=True)
class _TimedModel:
    """A compiled form of the model, the weight bytes that a step of it reads, and its share of outliers."""

    decoder: Decoder
    touched: float
    outliers: float | None = None


class _FreeMemory:
    """Free memory minus reservations for contenders that are compiled later."""

    def __init__(self, device: str) -> None:
        self._device, self._reserved = device, 0.0

    def fits(self, size: float) -> bool:
        """Whether ``size`` bytes are free, with a margin."""
        return available_memory(self._device) - self._reserved >= MARGIN * size

    def reserve(self, size: float) -> None:
        """Reserves bytes for a contender that is compiled later."""
        self._reserved += size


class _ModelContenders:
    """The timed forms of one model, and remarks on forms that are omitted."""

    def __init__(self, model: Any, plans: Mapping[str, Plan], tokens: Tensor, context: int, mode: str | None) -> None:
        """Starts with the dense model and every plan; other forms are added later."""
        self.remarks: list[str] = []
        self._model, self._tokens, self._context = model, tokens, context
        self._options: dict[str, dict[str, Any]] = {"Inductor": {"mode": mode}}
        self._timed = {"Inductor": self._compiled("Inductor", model, float(shapes.step_bytes(model)))}
        for title, plan in plans.items():
            name = f"tardis, {title}"
            self._options[name] = {"backend": "tardis", "options": {"plan": plan, "mode": mode}}
            counted = _count(model, plan, tokens)
            read = self._timed["Inductor"].touched - sum(site.dense_bytes for site in plan.sites) + counted.per_token
            self._timed[name] = self._compiled(name, model, read, counted.outlier_rate)

    def _compiled(self, name: str, model: Any, touched: float, outliers: float | None = None) -> _TimedModel:
        return _TimedModel(Decoder(model, self._context, **self._options[name]), touched, outliers)

    def add_frozen(self, memory: _FreeMemory) -> None:
        """Adds every form again, with constants that Inductor packs."""
        needed = FROZEN * shapes.weight_bytes(self._model)
        for name, options in self._options.items():
            if not memory.fits(needed):
                self.remarks.append(f"No row for {name} with freezing: its copies of the weights do not fit in memory.")
                continue
            memory.reserve(needed)
            decoder = Decoder(self._model, self._context, freezing=True, **options)
            self._timed[f"{name}; freezing"] = replace(self._timed[name], decoder=decoder)

    def add_torchao(self, bits: int, memory: _FreeMemory) -> None:
        """Adds torchao's integers for all projections, and for those outside the FFNs of every plan.

        Raises:
            BenchError: torchao is not installed, or there is not enough memory.
        """
        if not memory.fits(shapes.weight_bytes(self._model)):
            raise BenchError("its copy of the weights does not fit in memory")
        quantise = partial(
            weight_only.quantise_model, self._model, weight_only.quantiser(bits, self._tokens.device.type), bits
        )
        model, saved, left = quantise()
        self.remarks += [f"torchao's int{bits} does not take {name}, which stays as it is." for name in left]
        dense, *planned = list(self._options)
        self._timed[f"torchao int{bits} + {dense}"] = self._compiled(dense, model, self._timed[dense].touched - saved)
        ffns = ffn_weights(self._model, self._tokens[None, :2])
        for name in planned:
            model, saved, _ = quantise(but=ffns)
            alone = self._timed[name]
            self._timed[f"{name}; else torchao int{bits}"] = self._compiled(
                name, model, alone.touched - saved, alone.outliers
            )

    def time(self, case: str, rounds: int) -> list[Timing]:
        """Times all forms in interleaved rounds."""
        runs = {name: partial(form.decoder.follow, self._tokens) for name, form in self._timed.items()}
        seconds = interleave(runs, rounds)
        layers = self._timed["Inductor"].decoder.cache.layers
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return [
            Timing(case, name, seconds[name], seconds["Inductor"], form.touched + cache, form.outliers)
            for name, form in self._timed.items()
        ]


@torch.no_grad()
def _count(model: Any, plan: Plan, tokens: Tensor) -> Touched:
    """Counts the bytes of the steps over all tokens at once, because counting computes every estimate again."""
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    with count_touched() as touched:
        torch.compile(own_code(call_model), backend="tardis", options=options)(model, tokens[None], use_cache=False)
    return touched
