"""Drawn programs: FFNs whose steps are tangled with writes, aliases, shared weights, casts, leaks and dead code.

A program is a graph in the form that Dynamo gives it. It is built by running steps: opening an FFN, taking an open FFN
one node further, or doing something else in between. Every step is a block of a case (:mod:`fuzz_cases`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fuzz.cases import Blocks, Choices
from fuzz.exact import METHODS
from fuzz.ffns import ffn
from fuzz.scene import Copies, InvalidProgramError, Scene, value_of
from fuzz.tangles import TANGLES

_HOSTILE = (torch.inf, -torch.inf, torch.nan, 1e30)


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


def program(blocks: Blocks) -> Program:
    """The program of a case."""
    with torch.no_grad():
        return _program(blocks)


def _program(blocks: Blocks) -> Program:
    header = Choices(blocks[0])
    scene = Scene(header)
    method = header.pick(("guarded_fold",) * 3 + tuple(METHODS))
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
    expected, benign = Ran([value_of(node) for node in results], [value_of(node) for node in nodes]), None
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


def fresh(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors that share storages where the originals do."""
    copies = Copies()
    return [copies.of(value) for value in values]
