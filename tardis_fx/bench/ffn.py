"""Times one FFN with random weights, rewritten and compiled by Inductor, with weights read from memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tardis_fx.bench.plans import Recipe, ffn_sites, random_plans
from tardis_fx.bench.timings import COLD, Timing, warm_cache
from tardis_fx.errors import BenchError
from tardis_fx.graph.site import Kind, SiteWeights
from tardis_fx.measure.machine import available_memory, last_level_cache
from tardis_fx.measure.timing import interleave, seconds
from tardis_fx.observation.capture import own_code
from tardis_fx.plan import Plan

#: Minimum seconds of a round of the dense FFN.
ROUND = 0.1
#: Most FFNs in one graph.
TOGETHER = 8
#: Number of tokens for setting thresholds.
SAMPLES = 1024
#: Share of the free memory that the copies and their plans may take; compilers and samples also need some.
MEMORY = 0.5


@dataclass(frozen=True)
class Shape:
    """The shape of an FFN.

    Attributes:
        kind: plain, with GELU and biases; or gated, with SiLU and none, as in Llama.
        d: inputs and outputs.
        hidden: neurons.
    """

    kind: Kind
    d: int
    hidden: int

    @property
    def weights(self) -> int:
        """Number of weights, without biases."""
        return (2 if self.kind == "plain" else 3) * self.d * self.hidden

    def build(self) -> nn.Module:
        """An FFN of this shape."""
        if self.kind == "gated":
            return _Gated(self.d, self.hidden)
        return nn.Sequential(nn.Linear(self.d, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.d))

    def __str__(self) -> str:
        return f"{self.kind}, d {self.d}, {self.hidden} neurons"


class _Gated(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        output: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return output


class _Copies(nn.Module):
    """FFNs of one shape with separate weights and inputs."""

    def __init__(self, count: int, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(shape.build().to(dtype) for _ in range(count))
        for parameter in self.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 10
            nn.init.normal_(parameter, std=fan_in**-0.5)  # pre-activations about normal for normal inputs
        self.eval().requires_grad_(False)

    def forward(self, xs: Float[Tensor, "copies tokens d"]) -> list[Float[Tensor, "tokens d"]]:
        """Applies every FFN to its own input."""
        return [ffn(x) for ffn, x in zip(self.ffns, xs, strict=True)]


@torch.no_grad()
def bench_ffn(
    shape: Shape,
    dtype: torch.dtype,
    tokens: Sequence[int],
    recipes: Sequence[Recipe],
    rounds: int,
    copies: int | None = None,
    device: str = "cpu",
) -> tuple[list[Timing], list[str]]:
    """Times one FFN, with every token on the rewritten path.

    One graph of up to ``TOGETHER`` FFNs is compiled for each contender, as a model has several in one graph, and called
    with the weights of all copies in turn.

    Args:
        shape: of the FFN.
        dtype: of weights and inputs.
        tokens: of a step, one case each.
        recipes: of the plans, one contender each.
        rounds: timed rounds, after one warm-up round.
        copies: of the FFN; None makes enough to keep the last-level cache cold, or as many as fit in memory.
        device: "cpu" or "cuda", where all copies form one CUDA graph.

    Returns:
        The timings, and remarks: whether the cache stays warm.

    Raises:
        BenchError: not even one copy fits in memory.
    """
    torch.manual_seed(0)
    most = most_copies(shape, dtype.itemsize, recipes, device)
    if not most:
        raise BenchError(
            f"an FFN ({shape}) with its plans does not fit in memory: choose a smaller one, or fewer plans"
        )
    if copies is None:
        copies = max(2, math.ceil(COLD * last_level_cache(device) / _least_bytes(shape, dtype, recipes, device)))
        copies = min(most, TOGETHER * math.ceil(copies / TOGETHER))
        copies -= copies % TOGETHER if copies > TOGETHER else 0
    with torch.device(device):
        model = _Copies(copies, shape, dtype)
        batch = torch.randn(copies, SAMPLES, shape.d, dtype=dtype, device="cpu")
    plans = random_plans(model, batch, recipes)
    weights = {site.fingerprint: site.weights for site in ffn_sites(model, batch[:, :2])}
    del batch
    timings: list[Timing] = []
    remarks: list[str] = []
    for count in tokens:
        xs = torch.randn(copies, count, shape.d, dtype=dtype, device=device)
        name = f"{shape}, {str(dtype).removeprefix('torch.')}, {count} token{'s' * (count > 1)}, {copies} copies"
        case = _case(name, model, plans, weights, xs, rounds)
        remarks += warm_cache(case, last_level_cache(device), copies)
        timings += case
    return timings, remarks


def most_copies(shape: Shape, size: int, recipes: Sequence[Recipe], device: str = "cpu") -> int:
    """Number of copies of an FFN with their plans that fit in memory; ``size`` is a weight's in bytes."""
    each = shape.weights * size * (1 + sum(recipe.added(size) for recipe in recipes))
    return int(MEMORY * available_memory(device) / each)


def _least_bytes(shape: Shape, dtype: torch.dtype, recipes: Sequence[Recipe], device: str) -> float:
    """Bytes that the plan with the fewest reads per token, from plans of a single FFN."""
    model, batch = _Copies(1, shape, dtype), torch.randn(1, SAMPLES, shape.d, dtype=dtype, device="cpu")
    plans = random_plans(model.to(device), batch, recipes)
    return min(plan.sites[0].touched_bytes for plan in plans.values())


def _case(
    case: str,
    model: _Copies,
    plans: Mapping[Recipe, Plan],
    weights: Mapping[str, SiteWeights],
    xs: Float[Tensor, "copies tokens d"],
    rounds: int,
) -> list[Timing]:
    torch.compiler.reset()  # otherwise Dynamo would make the number of tokens symbolic
    copies = len(xs)
    options: dict[str, dict[str, Any]] = {"Inductor": {}}
    options |= {
        str(recipe): {"backend": "tardis", "options": {"plan": plan, "prefill": "rewritten", "select": "always"}}
        for recipe, plan in plans.items()
    }
    together = max(size for size in range(1, TOGETHER + 1) if copies % size == 0)
    lots = [(model.ffns[at : at + together], xs[at : at + together].unbind()) for at in range(0, copies, together)]
    calls = {name: torch.compile(own_code(_call), fullgraph=True, **options[name]) for name in options}
    for call in calls.values():
        call(*lots[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        over_all = {name: _over_all(call, lots, xs.is_cuda) for name, call in calls.items()}
        passes = math.ceil(ROUND / min(seconds(over_all["Inductor"], xs.device) for _ in range(2)))
        runs = {name: partial(seconds, run, xs.device, passes) for name, run in over_all.items()}
        steps = {name: [taken / copies for taken in turns] for name, turns in interleave(runs, rounds).items()}
    base = steps["Inductor"]
    dense = next(iter(plans.values())).sites[0].dense_bytes
    timings = [Timing(case, "Inductor", base, base, dense)]
    for recipe, plan in plans.items():
        reads = [
            recipe.step(entry, weights[entry.fingerprint], x.float())
            for entry, x in zip(plan.rewritten, xs, strict=True)
        ]
        touched, share = (sum(part) / copies for part in zip(*reads, strict=True))
        timings.append(Timing(case, str(recipe), steps[str(recipe)], base, touched, share))
    return timings


def _call(
    ffns: Iterable[Callable[[Tensor], Tensor]], xs: Sequence[Float[Tensor, "tokens d"]]
) -> list[Float[Tensor, "tokens d"]]:
    return [ffn(x) for ffn, x in zip(ffns, xs, strict=True)]


def _over_all(
    call: Callable[..., object], lots: Sequence[tuple[nn.ModuleList, Sequence[Tensor]]], on_cuda: bool
) -> Callable[[], object]:
    """A function that runs a step of each copy; on a CUDA device as one graph, so that launches take no time."""

    def run() -> list[object]:
        return [call(*lot) for lot in lots]

    if not on_cuda:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and tune
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
