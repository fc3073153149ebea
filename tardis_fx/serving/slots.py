"""Finds a plan's FFNs among the modules of a vLLM model, by their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from tardis_fx.errors import PlanMismatchError, ServingError, StaleWeightError
from tardis_fx.graph.recognition import recognise
from tardis_fx.graph.site import SiteWeights, function_of
from tardis_fx.passes.entry import check_entry
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from tardis_fx.plan import Entry, Plan, Planned


@dataclass(frozen=True)
class Slot:
    """Two projections of one module, ``down`` taking what ``up`` gives.

    Attributes:
        parent: the module that holds them.
        name: its path in the model.
        up: name of the first projection in ``parent``.
        down: name of the last one.
    """

    parent: nn.Module
    name: str
    up: str
    down: str

    @property
    def layers(self) -> tuple[LinearBase, LinearBase]:
        """The projections."""
        return self.parent.get_submodule(self.up), self.parent.get_submodule(self.down)

    @property
    def shards(self) -> tuple[int, int]:
        """This rank and the number of ranks that the neurons are shared out over."""
        up = self.layers[0]
        whole = tuple(up.weight.shape) == (up.output_size, up.input_size)
        return (0, 1) if whole else (up.tp_rank, up.tp_size)

    @property
    def weights(self) -> SiteWeights:
        """This rank's weights, as vLLM has loaded them."""
        up, down = self.layers
        return SiteWeights(_plain(up.weight), _bias(up), _plain(down.weight), _bias(down))

    @property
    def whole_weights(self) -> SiteWeights:
        """The weights of all ranks together; every rank must ask."""
        own = self.weights
        if self.shards[1] == 1:
            return own
        gather = tensor_model_parallel_all_gather
        up_bias = None if own.up_bias is None else gather(own.up_bias, 0)
        return replace(own, up=gather(own.up, 0), up_bias=up_bias, down=gather(own.down, 1))

    def activation(self, wanted: str) -> str:
        """Name of the one child of ``parent`` that computes an activation.

        Raises:
            ServingError: there is none, or more than one.
        """
        children = {n: c for n, c in self.parent.named_children() if n not in (self.up, self.down)}
        plain = {n: c for n, c in children.items() if not any(True for _ in c.parameters())}
        found = {n: a for n, c in plain.items() if (a := recognise(c)) and a.affine is None}
        named = [n for n, a in found.items() if a.name == wanted]
        if len(named) != 1:
            others = ", ".join(f"{n} ({a.name})" for n, a in found.items()) or "none"
            raise ServingError(
                f"{self.name}: the plan's activation is {wanted}, and {type(self.parent).__name__} has "
                f"{len(named) or 'no'} module for it (activations found: {others}): was the model's config changed?"
            )
        return named[0]


def find(model: nn.Module, plan: Plan) -> list[tuple[Slot, SitePlan]]:
    """The slots of all FFNs that a plan rewrites.

    Weights are compared as calibration stored them: vLLM keeps every matrix as [out, in].

    Raises:
        PlanFileError: an entry could not have been made by its rewrite.
        PlanMismatchError: none of the plan's FFNs is in the model.
        StaleWeightError: some are not.
    """
    if not plan.rewritten:
        raise PlanMismatchError("the plan rewrites no FFN")
    found, alike = [], []
    for slot in _slots(model):
        entries = [entry for entry in plan.sites if entry.kind == "plain" and _orders(slot, entry)]
        if not entries:
            continue
        entry = _entry(slot, entries)
        if entry is None:
            alike.append(slot)
        elif isinstance(entry, SitePlan):
            found.append((slot, entry))
    served = {entry.fingerprint for _, entry in found}
    if missing := [entry for entry in plan.rewritten if entry.fingerprint not in served]:
        reasons = "; ".join(f"{e.name}: {_mismatch(e, alike)}" for e in missing[:4])
        more = f"; and {len(missing) - 4} more" if len(missing) > 4 else ""
        if served:
            raise StaleWeightError(f"weights are not those that the plan was made for: {reasons}{more}")
        raise PlanMismatchError(f"the plan fits none of the model's FFNs: {reasons}{more}")
    return found


def _slots(model: nn.Module) -> Iterator[Slot]:
    for name, parent in model.named_modules():
        linears = [n for n, c in parent.named_children() if isinstance(c, LinearBase) and _is_matrix(c)]
        for up, down in permutations(linears, 2):
            slot = Slot(parent, name, up, down)
            first, last = slot.layers
            if first.output_size == last.input_size and _is_sharded(first) == _is_sharded(last):
                yield slot


def _is_matrix(layer: LinearBase) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and len(layer.output_partition_sizes) == 1


def _is_sharded(layer: LinearBase) -> bool:
    return tuple(layer.weight.shape) != (layer.output_size, layer.input_size)


def _orders(slot: Slot, entry: Entry) -> list[tuple[bool, bool]]:
    """In which ways the two matrices may have been stored transposed, going by the shapes."""
    up, down = slot.layers
    one, other = (up.output_size, up.input_size), (down.output_size, down.input_size)
    biases = [(layer.output_size,) if layer.bias is not None else None for layer in (up, down)]
    return [
        (first, last)
        for first, last in product((False, True), repeat=2)
        if _kept(one[:: -1 if first else 1], biases[0], other[:: -1 if last else 1], biases[1]) == entry.shapes
    ]


def _kept(*values: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...]:
    return tuple(value for value in values if value is not None)


def _entry(slot: Slot, entries: Sequence[Planned]) -> Planned | None:
    """The entry of the slot's weights."""
    weights = slot.whole_weights
    for activation, order in sorted({(e.activation, order) for e in entries for order in _orders(slot, e)}, key=str):
        up, down = (w.mT if transposed else w for w, transposed in zip((weights.up, weights.down), order, strict=True))
        turned = [
            n for n, w, t in zip(("up", "down"), (up, down), order, strict=True) if t and w.shape[0] == w.shape[1]
        ]
        own = [w for w in (up, weights.up_bias, down, weights.down_bias) if w is not None]
        identity = fingerprint(own, function_of(activation, turned=turned))
        if entry := next((e for e in entries if e.fingerprint == identity), None):
            if isinstance(entry, SitePlan):
                check_entry(entry, weights)
            return entry
    return None


def _mismatch(entry: Entry, alike: Sequence[Slot]) -> str:
    """Why an entry has no slot."""
    same = [slot for slot in alike if _orders(slot, entry)]
    if not same:
        return f"the model has no FFN of its shapes {', '.join(map(str, entry.shapes))}"
    dtypes = {str(slot.weights.up.dtype) for slot in same} - {entry.dtype}
    if dtypes:
        return (
            f"the plan was made for {entry.dtype} weights, the engine has {' and '.join(sorted(dtypes))}: use --dtype"
        )
    return (
        f"no FFN has its weights (of its shapes, but with weights unknown to the plan: "
        f"{', '.join(slot.name for slot in same[:4])}): they changed since calibration, or belong to another model"
    )


def _plain(parameter: Tensor) -> Tensor:
    return parameter.data.as_subclass(torch.Tensor)


def _bias(layer: LinearBase) -> Tensor | None:
    return None if layer.bias is None else _plain(layer.bias)


def reduces(slot: Slot) -> bool:
    """Whether the last projection sums what the ranks give."""
    down = slot.layers[1]
    return isinstance(down, RowParallelLinear) and down.reduce_results and slot.shards[1] > 1
