"""Builds graphs by hand in Dynamo's form: an example value on every node, parameters as inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tardis_fx.graph.forms import call


class Graph:
    """Builder of an ``fx.Graph`` with example values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._mode = FakeTensorMode()

    def input(self, *shape: int, prefix: str = "x") -> fx.Node:
        """Adds a graph input before the first computation."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"{prefix}{len(self.graph.nodes)}")
        with self._mode:
            node.meta["example_value"] = torch.empty(shape, dtype=torch.float32, device="cpu")
        return node

    def parameter(self, *shape: int) -> fx.Node:
        """Adds a parameter as an input, in the form in which Dynamo lifts it."""
        node = self.input(*shape, prefix="p")
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        return node

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a function, or of a method by its name."""
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self._mode:
            node.meta["example_value"] = call(node, *values)
        return node
