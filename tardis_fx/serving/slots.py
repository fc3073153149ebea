"""Finds a plan's FFNs among the modules of a vLLM model, by their weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from tardis_fx.errors import PlanMismatchError, ServingError, StaleWeightError
from tardis_fx.graph.activations import Activation
from tardis_fx.graph.feed_forward import BIASES
from tardis_fx.graph.recognition import recognise, recognise_product
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.entry import check_entry
from tardis_fx.plan import Entry, Plan, Planned, SitePlan
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.serving.forms import Form, forms


@dataclass(frozen=True)
class Place:
    """Location of a matrix: a layer, or one of the equal parts that vLLM merges into a layer.

    Attributes:
        layer: name of the layer in the slot's module.
        part: index of the part of its columns out.
        parts: number of parts.
    """

    layer: str
    part: int
    parts: int

    def __str__(self) -> str:
        return self.layer if self.parts == 1 else f"part {self.part} of {self.layer}"


@dataclass(frozen=True)
class Slot:
    """The layers of one module that may form an FFN: ``down`` has as many columns as each projection has rows.

    Attributes:
        parent: the module that holds them.
        name: path of the module in the model.
        places: of ``gate``, if there is one, ``up`` and ``down``, in this order; all parts of their layers.
    """

    parent: nn.Module
    name: str
    places: Mapping[str, Place]

    @property
    def layers(self) -> dict[str, LinearBase]:
        """The layers by name; that of ``down`` is the last."""
        return {place.layer: self.parent.get_submodule(place.layer) for place in self.places.values()}

    @property
    def down(self) -> str:
        """Name of the last layer."""
        return self.places["down"].layer

    @property
    def shards(self) -> tuple[int, int]:
        """This rank and the number of ranks that share the neurons."""
        layer = self.layers[self.down]
        return (layer.tp_rank, layer.tp_size) if _is_sharded(layer) else (0, 1)

    @property
    def reduces(self) -> bool:
        """Whether the last layer sums the outputs of the ranks."""
        down = self.layers[self.down]
        return isinstance(down, RowParallelLinear) and down.reduce_results and self.shards[1] > 1

    @property
    def weights(self) -> SiteWeights:
        """This rank's weights, as vLLM has loaded them."""
        weights: dict[str, Any] = {"gate": None, "gate_bias": None}
        for name, place in self.places.items():
            layer = self.layers[place.layer]
            for key, tensor in ((name, layer.weight), (BIASES[name], layer.bias)):
                merged = None if tensor is None else tensor.data.as_subclass(torch.Tensor)
                weights[key] = None if merged is None else merged.chunk(place.parts)[place.part]
        return SiteWeights(**weights)

    @property
    def whole_weights(self) -> SiteWeights:
        """The weights of all ranks together; every rank must call this."""
        return self.weights if self.shards[1] == 1 else self._joined(tensor_model_parallel_all_gather)

    @property
    def outline(self) -> SiteWeights:
        """The weights of all ranks together, without their values."""
        size = self.shards[1]
        return self._joined(lambda shard, axis: torch.cat([shard.to("meta")] * size, axis))

    def _joined(self, join: Callable[[Tensor, int], Tensor]) -> SiteWeights:
        weights = self.weights
        shards = {n: t for n, t in vars(weights).items() if t is not None and n != "down_bias"}
        return replace(weights, **{n: join(t, 1 if n == "down" else 0) for n, t in shards.items()})

    def activation(self, wanted: str) -> str:
        """Name of the only child of ``parent`` that computes an activation, times ``up`` if there is a gate.

        Raises:
            ServingError: there is none, or more than one.
        """
        children = {n: c for n, c in self.parent.named_children() if n not in self.layers}
        plain = {n: c for n, c in children.items() if not any(True for _ in c.parameters())}
        with torch.compiler.set_stance("force_eager"):  # vLLM compiles some of them
            activations = {n: a for n, c in plain.items() if (a := self._computed(c)) and a.affine is None}
        names = [n for n, a in activations.items() if a.name == wanted]
        if len(names) != 1:
            recognised = ", ".join(f"{n} ({a.name})" for n, a in activations.items()) or "none"
            gated = f" of {self.places['gate']} times {self.places['up']}" if "gate" in self.places else ""
            raise ServingError(
                f"{self.name}: the plan's activation is {wanted}{gated}, and {type(self.parent).__name__} has "
                f"{len(names) or 'no'} module for it (activations found: {recognised}): was the model's config changed?"
            )
        return names[0]

    def _computed(self, module: nn.Module) -> Activation | None:
        """The activation that a module computes, from gate and up if both come from one layer."""
        *gate, up, _ = self.places.values()
        if not gate:
            return recognise(module)
        if gate[0].layer != up.layer:
            return None
        order = slice(None, None, 1 if gate[0].part < up.part else -1)
        return recognise_product(lambda *z: module(torch.cat(z[order])))


def find(model: nn.Module, plan: Plan) -> list[tuple[Slot, SitePlan]]:
    """Finds the slots of all FFNs that a plan rewrites.

    Weights are compared in the form of the calibrated model, because vLLM keeps every matrix as [out, in] and merges
    gate and up.

    Raises:
        PlanFileError: an entry could not have been made by its rewrite.
        PlanMismatchError: none of the plan's FFNs is in the model.
        ServingError: the plan has linear layers outside of FFNs.
        StaleWeightError: some are not in the model.
    """
    if plan.config.linear_bits is not None:
        raise ServingError("vLLM serves FFNs alone: calibrate without linear_bits")
    if not plan.rewritten:
        raise PlanMismatchError("the plan rewrites no FFN")
    rewritten, unknown, known = list[tuple[Slot, SitePlan]](), list[Slot](), set[tuple[str, str]]()
    for slot in _slots(model):
        stored = _stored(slot)
        entries = [entry for entry in plan.sites if (entry.kind, entry.shapes) in stored]
        if not entries or (slot.name, slot.down) in known:
            continue
        entry = _entry(slot, entries, stored)
        if entry is None:
            unknown.append(slot)
            continue
        known.add((slot.name, slot.down))
        if isinstance(entry, SitePlan):
            rewritten.append((slot, entry))
    served = {entry.fingerprint for _, entry in rewritten}
    if missing := [entry for entry in plan.rewritten if entry.fingerprint not in served]:
        reasons = "; ".join(f"{e.name}: {_mismatch(e, unknown)}" for e in missing[:4])
        more = f"; and {len(missing) - 4} more" if len(missing) > 4 else ""
        if served:
            raise StaleWeightError(f"weights are not those that the plan was made for: {reasons}{more}")
        raise PlanMismatchError(f"the plan fits none of the model's FFNs: {reasons}{more}")
    return rewritten


def _slots(model: nn.Module) -> Iterator[Slot]:
    """All combinations of a last layer and one or two possible projections before it in one module."""
    for name, parent in model.named_modules():
        linears = {n: c for n, c in parent.named_children() if isinstance(c, LinearBase) and _is_matrix(c)}
        for down, last in linears.items():
            counts = {n: len(c.output_partition_sizes) for n, c in linears.items() if n != down and _fits(c, last)}
            parts = [Place(n, part, count) for n, count in counts.items() for part in range(count)]
            for chosen in (*permutations(parts, 1), *permutations(parts, 2)):
                layers = {place.layer for place in chosen}
                whole = sum(counts[layer] for layer in layers) == len(chosen)
                if whole and len({linears[layer].input_size for layer in layers}) == 1:
                    names = ("gate", "up", "down")[-len(chosen) - 1 :]
                    yield Slot(parent, name, dict(zip(names, (*chosen, Place(down, 0, 1)), strict=True)))


def _is_matrix(layer: LinearBase) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def _fits(layer: LinearBase, down: LinearBase) -> bool:
    """Whether ``down`` has as many columns as each part of a layer has rows."""
    hidden = down.weight.shape[1]
    alike = len(down.output_partition_sizes) == 1 and _is_sharded(layer) == _is_sharded(down)
    return alike and all(size == hidden for size in layer.output_partition_sizes)


def _is_sharded(layer: LinearBase) -> bool:
    return tuple(layer.weight.shape) != (layer.output_size, layer.input_size)


_Stored = dict[tuple[str, tuple[tuple[int, ...], ...]], list[Form]]


def _stored(slot: Slot) -> _Stored:
    """Forms in which the calibrated model may have stored a slot's weights, by kind and shapes of an entry."""
    outline, stored = slot.outline, _Stored()
    kind = "plain" if outline.gate is None else "gated"
    for form in forms(outline):
        shapes = tuple(tuple(parameter.shape) for parameter in form.parameters(outline))
        stored.setdefault((kind, shapes), []).append(form)
    return stored


def _entry(slot: Slot, entries: Sequence[Planned], stored: _Stored) -> Planned | None:
    """The plan's entry for the weights of a slot."""
    weights = slot.whole_weights
    for activation, form in sorted({(e.activation, f) for e in entries for f in stored[e.kind, e.shapes]}, key=str):
        identity = fingerprint(form.parameters(weights), form.function(weights, activation))
        if entry := next((e for e in entries if e.fingerprint == identity), None):
            if isinstance(entry, SitePlan):
                check_entry(entry, weights)
            return entry
    return None


def _mismatch(entry: Entry, unknown: Sequence[Slot]) -> str:
    """Why an entry has no slot."""
    alike = [slot for slot in unknown if (entry.kind, entry.shapes) in _stored(slot)]
    if not alike:
        return f"the model has no FFN of its shapes {', '.join(map(str, entry.shapes))}"
    if dtypes := {str(slot.weights.up.dtype) for slot in alike} - {entry.dtype}:
        engine = " and ".join(sorted(dtypes))
        return f"the plan was made for {entry.dtype} weights, but the engine has {engine}: use --dtype"
    names = ", ".join(list(dict.fromkeys(slot.name for slot in alike))[:4])
    return (
        f"no FFN has its weights (FFNs of its shapes, with weights unknown to the plan: {names}): "
        "they changed since calibration, or belong to another model"
    )
