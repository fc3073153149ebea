"""Histories of weights: compiled modules whose weights are changed by every habit, and called after each change.

A call must be right for the weights of that moment or raise a ``TardisError``. The habits of :mod:`fuzz_habits` that
PyTorch does not count write a weight as a whole; a few elements written past PyTorch may be missed by design.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fuzz.cases import Blocks, Choices, Failure, Judged
from fuzz.exact import METHODS, exact_entry
from fuzz.habits import HABITS, World
from tardis_fx.backend import tardis
from tardis_fx.config import Config
from tardis_fx.errors import TardisError
from tardis_fx.graph.surgery import copy
from tardis_fx.passes import pipeline
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan, SitePlan

#: Relative error that rounding may cause; a changed weight moves an output by much more.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.08}

_WIDTH, _HIDDEN = 8, 24


class Block(nn.Module):
    """A residual FFN, plain or gated, or two of them in a row."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        for name in ("up", "gate", "down")[:: 1 if kind == "gated" else 2]:
            sizes = (_HIDDEN, _WIDTH) if name == "down" else (_WIDTH, _HIDDEN)
            self.add_module(name, nn.Linear(*sizes, bias))
        self.kind, self.second = kind, Block("plain", bias) if kind == "two" else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., 8] to [..., 8]."""
        h = F.silu(self.gate(x)) * self.up(x) if self.kind == "gated" else F.gelu(self.up(x))
        y: Tensor = x + self.down(h)
        return y if self.second is None else self.second(y)  # type: ignore[no-any-return]


class _Planned:
    """The backend, with one plan for the weights that all blocks had at first, exact at each of their sites."""

    def __init__(self, blocks: Sequence[nn.Module], method: str, on_change: str) -> None:
        self._known = [
            {name: (p.data_ptr(), p.detach().clone()) for name, p in block.named_parameters()} for block in blocks
        ]
        self._method, self._on_change = method, on_change
        self._plan: Plan | None = None

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self._plan is None:
            self._plan = Plan(tuple(self._entries(gm, inputs)), Config(prefill="rewritten"))
        options = {"plan": self._plan, "inner": "eager", "select": "always", "on_change": self._on_change}
        return tardis(gm, list(inputs), options=options)

    def _entries(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> list[SitePlan]:
        names = {address: name for name, (address, _) in self._known[0].items()}
        probe = copy(gm)
        values = dict(zip(probe.graph.find_nodes(op="placeholder"), inputs, strict=True))
        entries = []
        for outcome in pipeline.outcomes(probe, inputs, Plan((), Config())):
            if outcome.fits and rewrite_named(self._method).refuse(outcome.site) is None:
                own = [names[values[node].data_ptr()] for node in outcome.site.parameters]
                for known in self._known:
                    entries.append(exact_entry(outcome.site, [known[name][1] for name in own], self._method))
        return entries


def judge(blocks: Blocks) -> Judged:
    """Runs a history.

    The verdict is "right" where every call was right, "refused" where some raised a ``TardisError``, "invalid" where
    the same goes wrong with a backend of PyTorch's, or "failed".
    """
    found = _judge(blocks, rewriting=True)
    return Judged("invalid") if found.failure and _judge(blocks, rewriting=False).failure else found


def _judge(blocks: Blocks, *, rewriting: bool) -> Judged:
    torch._dynamo.reset()
    header = Choices(blocks[0])
    torch.manual_seed(header.below(256))
    dtype = header.pick((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    kind, bias = header.pick(("plain", "gated", "two")), not header.once_in(3)
    count, method = 1 + header.below(3), header.pick(("guarded_fold", *METHODS))
    on_change, inference = header.pick(("error", "original")), header.once_in(3)
    x = torch.randn(header.pick((3, 1, 12)), _WIDTH, dtype=torch.float32, device="cpu").to(dtype)
    modules = [Block(kind, bias).eval().to(dtype) for _ in range(count)]
    world, told = World(modules), [f"{count} {kind} blocks, {dtype}, {bias=}, {inference=}, {method}, {on_change=}"]
    backend: Any = _Planned(modules, method, on_change) if rewriting else "eager"
    for module in modules:
        module.compile(backend=backend)
    refused = False

    def failed(fault: str, message: str) -> Judged:
        return Judged("failed", Failure("weights", "dynamo", blocks, fault, message, "\n".join(told)))

    for number, block in enumerate(blocks):
        choices, habit = Choices(block), "nothing"
        if number:
            change = choices.pick(HABITS)
            habit = change.__name__.strip("_").replace("_", " ")
            try:
                with torch.no_grad():
                    told.append(f"{habit}: {world.change(change, choices)}")
            except Exception as error:
                return failed(f"{habit}: {type(error).__name__}", _trace(error))
        for which, module in enumerate(modules):
            if not _callable(module, dtype):
                continue
            with torch.inference_mode() if inference else torch.no_grad():
                expected = module.forward(x)
                try:
                    found = module(x)
                except TardisError:
                    refused = True
                    continue
                except Exception as error:
                    return failed(f"{type(error).__name__} after {habit}", f"block {which}: {_trace(error)}")
            off = float((found.double() - expected.double()).norm() / expected.double().norm())
            if not off <= _TOLERANCES[dtype]:
                return failed(f"wrong answer after {habit}", f"block {which} is off by {off:.3g}")
    return Judged("refused" if refused else "right")


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error)[-6:])


def _callable(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the weights can be multiplied as they are."""
    return all(p.dtype == dtype and p.untyped_storage().nbytes() for p in module.parameters())
