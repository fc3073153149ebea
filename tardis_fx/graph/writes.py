"""Finds in-place writes: a Dynamo graph is not functional, so the value of a node may change.

Nodes whose example values share a storage share memory, regardless of views between them. A dropout that drops nothing
returns its input, though its example value is a copy. An unknown call counts as writing to all its tensors.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from tardis_fx.graph.forms import DROPOUT, call_name, is_parameter
from tardis_fx.graph.nested import called_graph

#: Python statements that write to their first operand, as functions of :mod:`operator`.
_STATEMENTS = frozenset(
    """
    delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem
    """.split()
)

#: Functions that write to their running statistics.
_NORMS = frozenset({"batch_norm", "instance_norm"})

#: Functions that scale the rows that they read if their fourth argument, ``max_norm``, is given.
_EMBEDDINGS = frozenset({"embedding", "embedding_bag"})

#: Modules whose functions are judged by their names.
_READ_BY_NAME = frozenset({"_operator", "builtins", "math", "torch"})


@dataclass(frozen=True)
class Write:
    """A node that writes in place.

    Attributes:
        node: the node.
        storages: that it may write to; None means any.
    """

    node: fx.Node
    storages: frozenset[int] | None

    def reaches(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the write may change the value of one of the nodes."""
        storages = storages_of(nodes)
        if storages is None or self.storages is None:
            return storages != frozenset()
        return not storages.isdisjoint(self.storages)


def writes_of(graph: fx.Graph) -> list[Write]:
    """All nodes of a graph that may write in place, in the order of the graph."""
    # A later call may pass views of one tensor where this call did not.
    together = [storages_of(n for n in graph.find_nodes(op="placeholder") if not is_parameter(n))]
    together += [storages_of([n, *n.all_input_nodes[:1]]) for n in graph.nodes if call_name(n) in DROPOUT]
    shared = [storages for storages in together if storages]
    return [Write(node, _closed(storages_of(targets), shared)) for node in graph.nodes if (targets := _targets(node))]


def _closed(storages: frozenset[int] | None, shared: Sequence[frozenset[int]]) -> frozenset[int] | None:
    """Storages, and all others that may share their memory through the shared groups."""
    for _ in shared:
        for group in shared:
            if storages is not None and not storages.isdisjoint(group):
                storages |= group
    return storages


def storages_of(nodes: Iterable[fx.Node]) -> frozenset[int] | None:
    """The storages of the tensors of some nodes; None if one of them is unknown."""
    storages: set[int] = set()
    for node in nodes:
        for value in tree_leaves(node.meta.get("example_value")):
            if not isinstance(value, Tensor):
                continue
            if is_traceable_wrapper_subclass(value):  # the tensors that it wraps have their own storages
                return None
            try:
                storages.add(value.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):  # a sparse tensor has none
                return None
    return frozenset(storages)


def changes(writes: Sequence[Write], node: fx.Node, first: fx.Node, last: fx.Node) -> Write | None:
    """A write strictly between two nodes that may change the value of a node, or None."""
    return next((w for w in writes if first < w.node < last and w.reaches([node])), None)


def _targets(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes whose values a node may write to."""
    if node.op == "call_method":
        return _by_name(node, str(node.target))
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function":
        return []
    target: Any = node.target
    if isinstance(target, OpOverload):
        return _by_schema(node, [target])
    if isinstance(target, OpOverloadPacket):
        return _by_schema(node, [getattr(target, name) for name in target.overloads()])
    if isinstance(target, HigherOrderOperator):
        called = [g for o in tree_leaves((node.args, node.kwargs)) if (g := called_graph(o))]
        pure = called and not any(_targets(inner) for graph in called for inner in graph.graph.nodes)
        return [] if pure else node.all_input_nodes
    owner = str(getattr(target, "__module__", None) or getattr(target, "__objclass__", target).__module__)
    if not inspect.isroutine(target) or owner.startswith(("torch._dynamo", "torch.distributed")):
        return node.all_input_nodes
    if owner.partition(".")[0] not in _READ_BY_NAME:
        return node.all_input_nodes
    return _by_name(node, target.__name__)


def _by_schema(node: fx.Node, overloads: Sequence[OpOverload]) -> list[fx.Node]:
    written: list[Any] = []
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    return _nodes(written)


def _by_name(node: fx.Node, name: str) -> list[fx.Node]:
    """The nodes that a PyTorch function or method writes to, judged by an underscore, ``out`` and ``inplace``."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    written: list[Any] = [node.kwargs.get("out")]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    if name in _STATEMENTS or _is_set(node, "inplace"):
        written.append(first)
    elif name.endswith("_"):
        is_single = isinstance(first, fx.Node) and not name.startswith("_fused")
        written.append(first if is_single else node.all_input_nodes)
    elif name in _NORMS:
        written.append([n for n in node.all_input_nodes if n is not first])
    elif name in _EMBEDDINGS and (node.args[3:4] or (node.kwargs.get("max_norm"),))[0] is not None:
        written.append(node.all_input_nodes)
    return _nodes(written)


def _is_set(node: fx.Node, flag: str) -> bool:
    """Whether a flag is given and not False."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    i = names.index(flag) if flag in names else len(node.args)
    value = node.args[i] if i < len(node.args) else node.kwargs.get(flag, False)
    return value is not False


def _nodes(values: object) -> list[fx.Node]:
    return [value for value in tree_leaves(values) if isinstance(value, fx.Node)]
