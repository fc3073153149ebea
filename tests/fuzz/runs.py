"""Ways to run a drawn program: as it is, in float64, and rewritten, by itself, through Dynamo or with Inductor."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fuzz.exact import exact_entry
from fuzz.programs import Program, Ran, fresh, is_weight
from tardis_fx.backend import tardis
from tardis_fx.config import Config
from tardis_fx.graph.surgery import copy
from tardis_fx.passes import pipeline
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.passes.weight_guard import GuardedGraph
from tardis_fx.plan import Plan

#: How a program is run: the backend called with its graph; through Dynamo; and with Inductor after it, which leaves
#: single operations to PyTorch's kernels, or compiles C++ of its own.
ROUTES = ("backend", "dynamo", "inductor", "inductor_cpp")


class Rewriter:
    """The backend, with a plan that keeps every site of a graph exact, made for each graph as it comes.

    Attributes:
        rewritten: how many graphs were.
    """

    def __init__(self, drawn: Program, inner: str) -> None:
        self._drawn, self._inner = drawn, inner
        self.rewritten = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a graph."""
        method, options = self._drawn.method, {"inner": self._inner, "prefill": self._drawn.prefill, "select": "always"}
        probe = copy(gm)
        position = {node: i for i, node in enumerate(probe.graph.find_nodes(op="placeholder"))}
        entries = []
        for outcome in pipeline.outcomes(probe, inputs, Plan((), Config(prefill="rewritten"))):
            if outcome.fits and rewrite_named(method).refuse(outcome.site) is None:
                weights = [inputs[position[node]] for node in outcome.site.parameters]
                entries.append(exact_entry(outcome.site, weights, method))
        compiled = tardis(gm, list(inputs), options={"plan": Plan(tuple(entries), Config()), **options})
        self.rewritten += isinstance(compiled, GuardedGraph)
        return compiled


class Host(NamedTuple):
    """A program that can be called.

    Attributes:
        call: its code.
        values: of its placeholders, which a call may write to.
        arguments: the ones that a call is given.
        more: the arguments of one more call, or None.
    """

    call: Callable[..., Any]
    values: list[Tensor]
    arguments: list[Tensor]
    more: list[Tensor] | None

    def run(self, inference: bool) -> Ran:
        """The outputs of all calls."""
        with torch.inference_mode() if inference else torch.no_grad():
            outputs = list(self.call(*self.arguments))
            if self.more is not None:
                outputs += self.call(*self.more)
        return Ran(outputs, self.values)


def host_of(drawn: Program, values: Sequence[Tensor], *, module: bool = False) -> Host:
    """The program as a graph of inputs only, or as a module that holds its weights, for Dynamo to capture.

    Args:
        drawn: the program.
        values: of its placeholders; copied.
        module: see above.
    """
    own, again = fresh(values), fresh(values)
    nodes = drawn.graph.find_nodes(op="placeholder")
    given, more = dict(zip(nodes, own, strict=True)), dict(zip(nodes, again, strict=True))
    if drawn.again == "more tokens":
        more = {node: _doubled(value) for node, value in more.items()}
    arguments = [node for node in nodes if not (module and is_weight(node))]
    code = _module(drawn, given) if module else fx.GraphModule(nn.Module(), drawn.graph)
    once_more = [given[node] if is_weight(node) else more[node] for node in arguments]
    return Host(code, own, [given[node] for node in arguments], once_more if drawn.again else None)


def _doubled(value: Tensor) -> Tensor:
    """Twice along its first axis, in the same layout: whether ``contiguous`` copies is a property of the graph."""
    if not value.dim():
        return value
    twice = torch.cat([value, value])
    if not twice.numel():
        return twice
    sizes, (first, *rest) = (2 * len(value), *value.shape[1:]), value.stride()
    if len(value) == 1:  # then its stride says nothing
        first = _extent(value.shape[1:], rest)
    strides = (first, *(2 * stride if stride > first else stride for stride in rest))
    made = value.new_zeros(_extent(sizes, strides)).as_strided(sizes, strides)
    return made.copy_(twice)


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _module(drawn: Program, given: dict[fx.Node, Tensor]) -> fx.GraphModule:
    host, graph = nn.Module(), fx.Graph()
    copies = {node: graph.node_copy(node) for node in given if not is_weight(node)}
    for count, node in enumerate(drawn.graph.nodes):
        if node in copies:
            continue
        if node in given:
            if drawn.buffers:
                host.register_buffer(node.name, given[node])
            else:
                host.register_parameter(node.name, nn.Parameter(given[node], requires_grad=False))
            copies[node] = graph.get_attr(node.name)
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if count == drawn.breaks:
                graph.call_function(torch._dynamo.graph_break)
    return fx.GraphModule(host, graph)


def compiled(drawn: Program, route: str, backend: Any) -> Ran:
    """A run by one of :data:`ROUTES`.

    Args:
        drawn: the program.
        route: the way.
        backend: as ``torch.compile`` takes it.
    """
    host = host_of(drawn, drawn.values, module=route != "backend")
    with torch.inference_mode() if drawn.inference else torch.no_grad():
        if route == "backend":
            call = backend(host.call, host.arguments)
        else:
            torch._dynamo.reset()
            call = torch.compile(host.call, backend=backend)
    with torch._inductor.config.patch(fallback_by_default=route == "inductor", force_disable_caches=True):
        return host._replace(call=call).run(drawn.inference)


class Truth(fx.Interpreter):
    """A program in float64.

    Attributes:
        results: outputs, and then the values of all placeholders.
        largest: absolute value on the way.
    """

    def __init__(self, drawn: Program) -> None:
        super().__init__(fx.GraphModule(nn.Module(), drawn.graph), garbage_collect_values=False)
        self._least = min((torch.finfo(v.dtype).max for v in drawn.values if v.is_floating_point()), default=math.inf)
        self.largest = 0.0
        host = host_of(drawn, _in_double(drawn.values if drawn.benign is None else drawn.benign))
        ran = host._replace(call=self.run).run(inference=False)
        self.results = [*ran.outputs, *ran.values]

    @property
    def representable(self) -> bool:
        """Whether no dtype of the program is near its largest number."""
        return self.largest < self._least / 16

    def run_node(self, n: fx.Node) -> Any:
        """Notes the largest value."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            self.largest = max(self.largest, float(result.abs().max().nan_to_num(math.inf, math.inf)))
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """In float64."""
        return super().call_function(target, *_widened(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """In float64."""
        return super().call_method(target, *_widened(args, kwargs))


def _widened(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def widen(value: Any) -> Any:
        wide = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if wide else value

    return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}


def _in_double(values: list[Tensor]) -> list[Tensor]:
    """Copies in float64 that share storages where the originals do, but for those of other widths of numbers."""
    copies: dict[tuple[int, torch.dtype], Tensor] = {}
    made = []
    for value in values:
        storage = value.untyped_storage()
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)  # type: ignore[call-overload]
        own = copies.setdefault((storage._cdata, value.dtype), whole.double())
        made.append(own.as_strided(value.shape, value.stride(), value.storage_offset()))
    return made
