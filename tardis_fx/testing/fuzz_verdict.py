"""Runs a drawn program rewritten and as it is, and judges: the same values everywhere, or a ``TardisError``."""

from __future__ import annotations

import math
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tardis_fx.backend import tardis
from tardis_fx.config import Config
from tardis_fx.errors import TardisError
from tardis_fx.graph.surgery import copy
from tardis_fx.passes import pipeline
from tardis_fx.passes.base import rewrite_named
from tardis_fx.plan import Plan
from tardis_fx.runtime.guard import GuardedGraph
from tardis_fx.testing.assertions import TOLERANCES
from tardis_fx.testing.exact import exact_entry
from tardis_fx.testing.fuzz_cases import Failure, Judged
from tardis_fx.testing.fuzz_programs import Program, Ran, fresh, is_weight, program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.testing.fuzz_cases import Blocks

#: How a program is run: the backend called with its graph; through Dynamo; and with Inductor behind it, which computes
#: single operations by PyTorch's kernels, or in C++ of its own.
ROUTES = ("backend", "dynamo", "inductor", "inductor_cpp")


class _Rewriter:
    """The backend, with a plan that keeps every site of a graph exact, made for each graph as it comes."""

    def __init__(self, drawn: Program, inner: str) -> None:
        self._drawn, self._inner = drawn, inner
        self.rewritten = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        method, options = self._drawn.method, {"inner": self._inner, "prefill": self._drawn.prefill}
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


def judge(blocks: Blocks, route: str = "backend") -> Judged:
    """Builds a case's program and runs it one way.

    The verdict is "rewritten", "original" (no site was rewritten), "refused" (a ``TardisError``), "invalid" (PyTorch
    itself does not run it, or goes wrong with it) or "failed".
    """
    try:
        drawn = program(blocks)
        expected = drawn.expected
        if drawn.benign is not None:
            expected = _run(_host(drawn, fresh(drawn.values)), drawn.inference)
    except Exception:  # whatever PyTorch says to an op that it does not take
        return Judged("invalid")
    inner = "eager" if route in ("backend", "dynamo") else "inductor"
    rewriter = _Rewriter(drawn, inner)

    def failed(fault: str, message: str) -> Judged:
        return Judged("failed", Failure("program", route, blocks, fault, message, drawn.code))

    try:
        found = _compiled(drawn, route, rewriter)
    except TardisError:
        return Judged("refused")
    except Exception as error:
        if _foreign(drawn, route, expected):
            return Judged("invalid")
        return failed(f"untyped {type(error).__name__}", "".join(traceback.format_exception(error)[-6:]))
    wrong = difference(drawn, found, expected)
    if wrong is not None and not _foreign(drawn, route, expected):
        return failed("wrong answer", wrong)
    return Judged("rewritten" if rewriter.rewritten else "original")


class _Host(NamedTuple):
    """A program's code, the values of its placeholders, and which of these are its arguments."""

    call: Callable[..., Any]
    values: list[Tensor]
    arguments: list[Tensor]


def _host(drawn: Program, values: list[Tensor], *, module: bool = False) -> _Host:
    """The program as a graph of inputs only, or as a module that holds its weights, for Dynamo to capture."""
    if not module:
        return _Host(fx.GraphModule(nn.Module(), drawn.graph), values, values)
    host, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = dict(zip(drawn.graph.find_nodes(op="placeholder"), values, strict=True))
    arguments = [node for node in given if not is_weight(node)]
    copies |= {node: graph.node_copy(node) for node in arguments}
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
    return _Host(fx.GraphModule(host, graph), values, [given[node] for node in arguments])


def _run(host: _Host, inference: bool) -> Ran:
    with torch.inference_mode() if inference else torch.no_grad():
        outputs = host.call(*host.arguments)
    return Ran(list(outputs), host.values)


def _compiled(drawn: Program, route: str, backend: Any) -> Ran:
    """One run by the way of ``route``."""
    host = _host(drawn, fresh(drawn.values), module=route != "backend")
    with torch.inference_mode() if drawn.inference else torch.no_grad():
        if route == "backend":
            call = backend(host.call, host.arguments)
        else:
            torch._dynamo.reset()
            call = torch.compile(host.call, backend=backend)
    with torch._inductor.config.patch(fallback_by_default=route == "inductor", force_disable_caches=True):
        return _run(host._replace(call=call), drawn.inference)


def _foreign(drawn: Program, route: str, expected: Ran) -> bool:
    """Whether PyTorch goes wrong with the program by itself; tried twice, for not everything it does repeats."""
    if route == "backend":
        return False
    try:
        runs = [_compiled(drawn, route, "eager" if route == "dynamo" else "inductor") for _ in range(2)]
    except Exception:
        return True
    return any(difference(drawn, run, expected) is not None for run in runs)


# ---- Comparison


def difference(drawn: Program, found: Ran, expected: Ran) -> str | None:
    """What differs between two runs of a program by more than rounding, or None."""
    pairs = [*zip(found.outputs, expected.outputs, strict=True), *zip(found.values, expected.values, strict=True)]
    for number, (one, other) in enumerate(pairs):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"result {number}: {one.dtype}{list(one.shape)}, not {other.dtype}{list(other.shape)}"
    aliases = [_aliases(run) for run in (found, expected)]
    if aliases[0] != aliases[1]:
        return f"outputs share storages differently: {aliases[0]}, not {aliases[1]}"
    if drawn.benign is None:
        clean = [torch.ones_like(other, dtype=torch.bool) for _, other in pairs]
    else:  # what a hostile value reaches is not judged, only that it reaches nothing else
        harmless = drawn.expected
        clean = [(b == e) for b, (_, e) in zip([*harmless.outputs, *harmless.values], pairs, strict=True)]
    judged = [_Pair(*pair, mask) for pair, mask in zip(pairs, clean, strict=True)]
    suspects = [number for number, pair in enumerate(judged) if not pair.close]
    if not suspects:
        return None
    truth = _Truth(drawn)
    if not truth.representable:
        return None
    for number in suspects:
        if told := judged[number].wrong(truth.results[number], truth.largest):
            return f"result {number} of {len(found.outputs)} outputs and then the inputs: {told}"
    return None


def _aliases(run: Ran) -> list[int]:
    """Of every output the first of all results that shares its storage; of an empty one itself."""
    every = [*run.outputs, *run.values]
    storages = [t.untyped_storage()._cdata if t.numel() else -1 - i for i, t in enumerate(every)]
    return [storages.index(storages[i]) for i in range(len(run.outputs))]


class _Pair(NamedTuple):
    """A result of both runs, and which elements are judged."""

    found: Tensor
    expected: Tensor
    clean: Tensor

    @property
    def _finite(self) -> Tensor:
        return self.clean & self.expected.isfinite()

    @property
    def close(self) -> bool:
        """Whether they agree as two ways to compute the same thing do where nothing is cancelled."""
        if torch.equal(self.found, self.expected):
            return True
        if not self.expected.is_floating_point():
            return False
        finite = self._finite
        one, other = (t[finite].double() for t in (self.found, self.expected))
        allowed = TOLERANCES.get(self.expected.dtype, 0.1)
        return bool((one - other).norm() <= allowed * other.norm())  # False where one is NaN

    def wrong(self, truth: Tensor, largest: float) -> str | None:
        """What is wrong, in view of the result in float64 and of the largest value on the way to it."""
        finite = self._finite
        one, other, exact = (t[finite].double() for t in (self.found, self.expected, truth))
        error, rounding = float((one - exact).norm()), float((other - exact).norm())
        tolerance = TOLERANCES.get(self.expected.dtype, 0.1)
        allowed = tolerance * (float(exact.norm()) + largest) + 8 * rounding
        if error <= allowed:
            return None
        return f"off by {error:.3g}, eager PyTorch by {rounding:.3g}, of {float(exact.norm()):.3g}"


class _Truth(fx.Interpreter):
    """A program in float64.

    Attributes:
        results: outputs, and then the values of all placeholders.
        largest: absolute value on the way.
    """

    def __init__(self, drawn: Program) -> None:
        super().__init__(fx.GraphModule(nn.Module(), drawn.graph), garbage_collect_values=False)
        self._least = min((torch.finfo(v.dtype).max for v in drawn.values if v.is_floating_point()), default=math.inf)
        self.largest = 0.0
        values = _in_double(drawn.values if drawn.benign is None else drawn.benign)
        with torch.no_grad():
            outputs = self.run(*values)
        self.results = [*outputs, *values]

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
