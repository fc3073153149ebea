"""Times decoding with a whole model: rewritten, compiled by Inductor, quantised by torchao, and combinations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from tardis_fx.bench import shapes
from tardis_fx.bench.llama_cpp import Rival
from tardis_fx.bench.plans import Recipe, ffn_sites, random_plans
from tardis_fx.bench.timings import Timing, warm_cache
from tardis_fx.errors import BenchError, ConfigError
from tardis_fx.measure import weight_only
from tardis_fx.measure.decoding import Decoder, sample_tokens
from tardis_fx.measure.machine import available_memory, last_level_cache
from tardis_fx.measure.quality import rewrite_every_token
from tardis_fx.measure.timing import interleave
from tardis_fx.plan import Plan
from tardis_fx.runtime.touched import count_touched

#: Required free memory as a multiple of the requested memory, because compilers also need some.
MARGIN = 1.2
#: Copies of the weights that exist while a graph is frozen: folded, transposed and packed.
FROZEN = 3
#: Number of tokens for setting thresholds, in sequences of the decoded length, as inputs depend on the position.
SAMPLES = 1024


def bench_model(
    shape: str | Path,
    dtype: torch.dtype,
    plans: Sequence[Recipe] | Plan,
    rounds: int,
    steps: int = 32,
    context: int = 128,
    layers: int | None = None,
    device: str = "cpu",
    mode: str | None = None,
    rivals: Mapping[str, Rival] | None = None,
) -> tuple[list[Timing], list[str]]:
    """Times decoding at batch 1; every contender has its own static cache.

    Args:
        shape: of the model, as in :func:`tardis_fx.bench.shapes.config_of`; or the folder of a model.
        dtype: of weights and cache.
        plans: a plan, or recipes of some: one contender each, and one more for each of torchao's widths, which
            quantises the projections outside the FFNs.
        rounds: timed rounds, after one warm-up round.
        steps: tokens decoded in a round.
        context: length of the cache, all of which attention reads at every step.
        layers: number of the shape's layers; None means all.
        device: "cpu" or "cuda".
        mode: of torch.compile, for every contender.
        rivals: contenders that decode as many steps in processes of their own.

    Returns:
        The timings, and remarks, for example why there is no row for one of torchao's widths.

    Raises:
        ConfigError: there is no such shape, or an argument is out of range.
        BenchError: transformers is not installed, the folder holds no language model, there is not enough memory, or a
            rival fails.
        PlanMismatchError: the plan is for another model.
    """
    if not 2 <= steps <= context:
        raise ConfigError(f"steps must lie between 2 and the context of {context}, not {steps}")
    config = shapes.config_of(shape, layers)
    if isinstance(plans, Plan):
        dense_bytes = sum(site.dense_bytes for site in plans.sites)
        added = (sum(site.stored_bytes for site in plans.sites) - dense_bytes) / max(1, dense_bytes)
    else:
        added = sum(recipe.added(dtype.itemsize) for recipe in plans)
    folder = shape if isinstance(shape, Path) else None
    model: Any = shapes.build(config, dtype, (1 + added) * MARGIN, device, folder)
    tokens, *batch = sample_tokens(model, 1 + -(-SAMPLES // steps), steps, trained=folder is not None)
    if isinstance(plans, Plan):
        by_title = {"tardis, plan": plans}
    else:
        by_title = {str(recipe): plan for recipe, plan in random_plans(model, torch.stack(batch), plans).items()}
    contenders = Contenders(model, by_title, tokens, shapes.weight_bytes(model) * added)
    if device == "cpu":
        contenders.add_frozen()
    for bits in (8, 4):
        try:
            contenders.add_torchao(bits)
        except BenchError as error:
            contenders.remarks.append(f"No row for torchao's int{bits} weights: {error}.")
    depth = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    title = folder.absolute().name if folder else shape
    case = f"{title}, {depth}, {str(dtype).removeprefix('torch.')}, {steps} steps, cache of {context}"
    contenders.rivals = dict(rivals or {})
    timings = contenders.timings(case, rounds, context, mode)
    return timings, contenders.remarks + warm_cache(timings, last_level_cache(device))


@dataclass(frozen=True)
class _Form:
    """A form of the model, the weight bytes that a step of it reads, and its share of outliers."""

    model: Any
    plan: Plan | None
    touched: float
    outliers: float | None = None
    freezing: bool = False


class Contenders:
    """The forms of one model to be timed, and remarks on forms that are omitted."""

    def __init__(self, model: Any, plans: Mapping[str, Plan], tokens: Int64[Tensor, " steps"], reserved: float) -> None:
        """Starts with the dense model and every plan; ``reserved`` is the memory in bytes that they will still take."""
        self.remarks: list[str] = []
        self.rivals: dict[str, Rival] = {}
        self._model, self._tokens, self._reserved = model, tokens, reserved
        dense = _Form(model, None, shapes.step_bytes(model))
        self._originals = {"Inductor": dense}
        for title, plan in plans.items():
            with count_touched() as counted, torch.no_grad():  # all steps at once: counting recomputes every estimate
                rewrite_every_token(model, plan)(tokens[None], use_cache=False)
            touched = dense.touched - sum(site.dense_bytes for site in plan.sites) + counted.per_token
            self._originals[title] = _Form(model, plan, touched, counted.outlier_rate)
        self.forms = dict(self._originals)

    def _fits(self, size: float) -> bool:
        """Whether ``size`` bytes are free, with a margin."""
        return available_memory(self._tokens.device.type) - self._reserved >= MARGIN * size

    def add_frozen(self) -> None:
        """Adds every form again, with constants that Inductor packs."""
        size = FROZEN * shapes.weight_bytes(self._model)
        for name, form in self._originals.items():
            if self._fits(size):
                self._reserved += size
                self.forms[f"{name}; freezing"] = replace(form, freezing=True)
            else:
                self.remarks.append(f"No row for {name} with freezing: its copies of the weights do not fit in memory.")

    def add_torchao(self, bits: int) -> None:
        """Adds torchao's integers for all projections, and for those outside the FFNs of every plan.

        Raises:
            BenchError: torchao is not installed, or there is not enough memory.
        """
        if not self._fits(shapes.weight_bytes(self._model)):
            raise BenchError("its copy of the weights does not fit in memory")
        quantise = weight_only.quantiser(bits, self._tokens.device.type)
        ffns = [p for site in ffn_sites(self._model, self._tokens[None, :2]) for p in site.parameters]
        for name, form in self._originals.items():
            excluded = () if form.plan is None else ffns
            model, saved, unsupported = weight_only.quantise_model(self._model, quantise, bits, excluded)
            title = f"{name}; else torchao int{bits}"
            if form.plan is None:
                title = f"torchao int{bits} + {name}"
                self.remarks += [f"torchao's int{bits} does not support {n}, which stays dense." for n in unsupported]
            self.forms[title] = replace(form, model=model, touched=form.touched - saved)

    def timings(
        self,
        case: str,
        rounds: int,
        context: int,
        mode: str | None = None,
        done: Callable[[str], None] = lambda step: None,
    ) -> list[Timing]:
        """Times every form along the given tokens, in interleaved rounds; the first form is the base of all ratios.

        Args:
            case: description of the model.
            rounds: timed rounds, after one warm-up round.
            context: length of the cache.
            mode: of torch.compile.
            done: told of every form that is compiled.
        """
        decoders = {}
        for name, form in self.forms.items():
            decoders[name] = Decoder(form.model, context, form.plan, freezing=form.freezing, mode=mode)
            decoders[name].follow(self._tokens)
            done(f"{name} compiled")
        runs: dict[str, Callable[[], float]]
        runs = {name: partial(decoder.follow, self._tokens) for name, decoder in decoders.items()}
        runs |= {name: rival.run for name, rival in self.rivals.items()}
        seconds = interleave(runs, rounds)
        base = next(iter(self.forms))
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoders[base].cache.layers)
        return [
            Timing(case, name, seconds[name], seconds[base], form.touched + cache, form.outliers)
            for name, form in self.forms.items()
        ] + [Timing(case, name, seconds[name], seconds[base], rival.touched) for name, rival in self.rivals.items()]
