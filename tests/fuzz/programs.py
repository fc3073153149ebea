"""Drawn programs: FFNs whose steps are tangled with writes, aliases, shared weights, casts, leaks and dead code.

A program is a graph in the form that Dynamo gives it. It is built by running steps: opening an FFN, taking an open FFN
one node further, or doing something else in between. Every step is a block of a case (:mod:`fuzz_cases`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from fuzz.cases import Choices
from fuzz.exact import METHODS
from fuzz.ffns import ffn
from fuzz.tangles import TANGLES
from tardis_fx.testing.building import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fuzz.cases import Blocks

#: The dtypes of programs; the first is the one of most.
DTYPES = (torch.float32,) * 5 + (torch.bfloat16, torch.float16, torch.float64)

_HOSTILE = (torch.inf, -torch.inf, torch.nan, 1e30)


class InvalidProgramError(Exception):
    """The drawn program is none that PyTorch runs."""


class Ran(NamedTuple):
    """Outputs of a run, and the values of all placeholders after it."""

    outputs: list[Tensor]
    values: list[Tensor]


@dataclass
class Program:
    """A graph and how it is to be run.

    Attributes:
        graph: every placeholder is an input or, marked as Dynamo marks it, a weight.
        values: of the placeholders; some share a storage.
        benign: the same where some of the values are infinite, NaN or huge: what they are without these.
        method: the rewrite, one of :data:`fuzz.exact.METHODS`.
        prefill: as in :class:`tardis_fx.Config`.
        inference: whether it runs in inference mode.
        breaks: where Dynamo is made to break the graph, if it runs through Dynamo: after how many nodes; 0, nowhere.
        buffers: whether the weights are buffers, not parameters.
        again: "", or how it is called a second time: with "new inputs" of the same shapes, or with "more tokens".
        expected: what one call gives.
    """

    graph: fx.Graph
    values: list[Tensor]
    benign: list[Tensor] | None
    method: str
    prefill: str
    inference: bool
    breaks: int
    buffers: bool
    again: str
    expected: Ran

    @property
    def code(self) -> str:
        """The program as a person reads it."""
        nodes = self.graph.find_nodes(op="placeholder")
        given = [
            f"# {node.name}: {'weight' if is_weight(node) else 'input'} {str(value.dtype)[6:]}{list(value.shape)}, "
            f"stride {list(value.stride())}, storage {self._storage(value)}"
            for node, value in zip(nodes, self.values, strict=True)
        ]
        hostile = self.benign is not None
        how = f"# {self.method}, prefill={self.prefill!r}, inference={self.inference}, {hostile=}, "
        how += f"buffers={self.buffers}, again={self.again!r}"
        return "\n".join([how, *given, self.graph.python_code("self").src.strip()])

    def _storage(self, value: Tensor) -> int:
        every = [v.untyped_storage().data_ptr() for v in self.values]
        return every.index(value.untyped_storage().data_ptr())


def is_weight(node: fx.Node) -> bool:
    """Whether a placeholder is marked as a parameter."""
    return "tensor_dict" in node.meta


class Scene(Graph):
    """A program in the making, which runs as it is built: the example values of its nodes are what PyTorch gives.

    Attributes:
        dtype: of most values.
        width: of the residual stream.
        streams: nodes of [..., width], the last one the newest: what FFNs read and give.
        inner: nodes inside FFNs.
        weights: placeholders of weights.
        inputs: placeholders of inputs.
        leaks: what is returned besides the streams.
        values: of the placeholders, as they are before the program runs.
    """

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.dtype: torch.dtype = choices.pick(DTYPES)
        self.width: int = choices.pick((8, 4, 5, 16))
        self.streams: list[fx.Node] = []
        self.inner: list[fx.Node] = []
        self.weights: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self.leaks: list[fx.Node] = []
        self.values: dict[fx.Node, Tensor] = {}
        self._copies = Copies()
        self._random = torch.Generator().manual_seed(choices.below(256))
        one_storage = choices.once_in(4)
        self._room = self._drawn(40_000).mul_(0.3).to(self.dtype) if one_storage else None

    def bring(self, value: Tensor, *, weight: bool = False) -> fx.Node:
        """A graph input with its value."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"{'w' if weight else 'x'}{len(self.values)}")
        if weight:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node.meta["example_value"] = self._copies.of(value)
        self.values[node] = value
        (self.weights if weight else self.inputs).append(node)
        return node

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Runs a call and adds it.

        Raises:
            InvalidProgramError: it cannot run.
        """
        values, named = fx.node.map_arg((args, kwargs), _value)
        try:
            found = (getattr(values[0], target) if isinstance(target, str) else partial(target, values[0]))(
                *values[1:], **named
            )
        except Exception as error:  # whatever an op says to what it does not take
            raise InvalidProgramError(f"{target}: {error}") from error
        kind = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = kind(target, args, kwargs)  # type: ignore[arg-type]
        node.meta["example_value"] = found
        return node

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, as a tensor of its own or as a part of the storage that all weights share."""
        count = math.prod(shape)
        if self._room is None or dtype not in (None, self.dtype) or count > len(self._room):
            return self._drawn(*shape).mul_(scale).to(dtype or self.dtype)
        part, self._room = self._room[:count].view(shape), self._room[count:]
        return part

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float32, device="cpu")

    def shape(self, node: fx.Node) -> torch.Size:
        """Of a node's value."""
        return node.meta["example_value"].shape  # type: ignore[no-any-return]

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """Of a node's value."""
        return node.meta["example_value"].dtype  # type: ignore[no-any-return]


def program(blocks: Blocks) -> Program:
    """The program of a case."""
    with torch.no_grad():
        return _program(blocks)


def _program(blocks: Blocks) -> Program:
    header = Choices(blocks[0])
    scene = Scene(header)
    method = header.pick(("partial_linear",) * 3 + tuple(METHODS))
    prefill = header.pick(("rewritten", "rewritten", "original"))
    inference, buffers = header.once_in(4), header.once_in(6)
    breaks = header.below(30) if header.once_in(4) else 0
    scene.streams.append(scene.bring(_input(scene, header)))
    hostile = header.pick(_HOSTILE) if header.once_in(8) else 0.0
    again = header.pick(("", "", "", "new inputs", "more tokens"))
    returned = header.below(256)
    _run_steps(scene, blocks[1:])
    results = [scene.streams[-1], *scene.leaks]
    others = [*scene.streams, *scene.inner]
    results += [others[returned % len(others)]] if returned % 3 == 0 else []
    scene.graph.output(tuple(results))
    for node in list(scene.graph.find_nodes(op="placeholder")):
        if not node.users:
            scene.graph.erase_node(node)
    nodes = scene.graph.find_nodes(op="placeholder")
    values = [scene.values[node] for node in nodes]
    expected, benign = Ran([_value(node) for node in results], [_value(node) for node in nodes]), None
    if hostile and scene.inputs[0] in nodes and scene.values[scene.inputs[0]].numel():
        benign = fresh(values)
        scene.values[scene.inputs[0]][..., 0, 0] = hostile
    return Program(scene.graph, values, benign, method, prefill, inference, breaks, buffers, again, expected)


def _input(scene: Scene, choices: Choices) -> Tensor:
    """The first input: some shape, some layout."""
    width = scene.width
    shape = choices.pick(((3,), (2, 3), (1,), (12,), (2, 1, 3), (0,), (1, 2)))
    layout = choices.below(5)
    if layout == 3:  # tokens last
        return scene.normal(width, math.prod(shape)).t().unflatten(0, shape)  # type: ignore[no-any-return]
    if layout == 4:  # a part of something wider
        return scene.normal(*shape, width + 3)[..., 1 : width + 1]
    return scene.normal(*shape, width)


def _run_steps(scene: Scene, blocks: Blocks) -> None:
    """Each block does something; FFNs left open at the end are finished, the first opened first."""
    opened: list[Iterator[None]] = []

    def advance(number: int) -> None:
        try:
            next(opened[number])
        except (StopIteration, InvalidProgramError):
            del opened[number]

    for block in blocks:
        choices = Choices(block)
        kind = choices.below(8)
        if block is blocks[0] or kind < 3:
            opened.append(ffn(scene, choices))
        elif kind < 6 and opened:
            number = choices.below(len(opened))
            for _ in range(1 + choices.below(3)):
                if number < len(opened):
                    advance(number)
        else:
            try:
                choices.pick(TANGLES)(scene, choices)
            except InvalidProgramError:
                continue  # another step, then
    while opened:
        advance(0)


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]


class Copies:
    """Makes copies of tensors that share storages where the originals do."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def of(self, value: Tensor) -> Tensor:
        """A copy of one."""
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage, storage.clone()  # held, for addresses are used again
        own = self._storages[storage._cdata][1]
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        made: Tensor = empty.set_(own, value.storage_offset(), value.shape, value.stride())  # type: ignore[call-overload]
        return made.data  # counts its writes from none on


def fresh(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors that share storages where the originals do."""
    copies = Copies()
    return [copies.of(value) for value in values]
