"""A drawn program in the making."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fuzz.cases import Choices
from tardis_fx.testing.building import Graph

#: The dtypes of programs; the first is the one of most.
DTYPES = (torch.float32,) * 5 + (torch.bfloat16, torch.float16, torch.float64)


class InvalidProgramError(Exception):
    """The drawn program is none that PyTorch runs."""


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
        values, named = fx.node.map_arg((args, kwargs), value_of)
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


def value_of(node: fx.Node) -> Any:
    """A node's value in the example."""
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
