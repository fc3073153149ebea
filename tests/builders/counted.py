"""Two FFNs whose plan changes nothing, compiled so that the calls of rewritten code are counted.

The rewritten model gives what the original gives, so that a test compares with eager, to rounding, and only the count
tells whether rewritten code ran.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from builders.compiled import compiled
from builders.ffns import FFN, Block, config, exact_plan, ffn
from tardis_fx import Plan
from tardis_fx.graph.site import SiteWeights

_CALLS: list[int] = []


def _counting(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """Runs a graph eagerly and counts the ops of rewritten sites."""
    ops = sum(node.op == "call_function" and "tardis" in str(node.target) for node in gm.graph.nodes)

    def run(*inputs: Any) -> Any:
        _CALLS.append(ops)
        return gm.forward(*inputs)

    return run


torch._dynamo.register_backend(_counting, name="counting_calls")  # type: ignore[no-untyped-call]


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Gives a function that says how many rewritten sites ran since it was last asked."""

    def calls() -> int:
        total = sum(_CALLS)
        _CALLS.clear()
        return total

    calls()
    yield calls
    calls()


def blocks(count: int = 2, d: int = 16, hidden: int = 64) -> nn.Sequential:
    """Blocks with an FFN each."""
    return nn.Sequential(*(Block(ffn(d, hidden, seed=seed), d) for seed in range(count))).eval()


def changing_nothing(model: nn.Module) -> Plan:
    """A plan that computes every neuron of every FFN."""
    entries = []
    for inner in (module for module in model.modules() if isinstance(module, FFN)):
        parameters = [parameter.detach().clone() for parameter in inner.parameters()]
        entries.append(exact_plan(SiteWeights(*parameters), parameters, inner.activation))
    return Plan(tuple(entries), config())


def fast(model: Callable[..., Any], plan: Plan | None, **options: Any) -> Callable[..., Any]:
    """The model on the tardis backend, counted."""
    given: dict[str, Any] = {"inner": "counting_calls", "fullgraph": False} | options
    return compiled(model, plan, **given)
