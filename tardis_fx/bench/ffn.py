"""One FFN of random weights: rewritten, beside what Inductor makes of it, out of memory and not out of the cache."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tardis_fx.bench.plans import Widths, random_plans
from tardis_fx.measure.machine import last_level_cache, wait
from tardis_fx.measure.table import Row, in_turn
from tardis_fx.observation.capture import own_code
from tardis_fx.passes.pipeline import decode_tokens
from tardis_fx.runtime import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.plan import Plan, SitePlan

#: What a pass over all copies reads, in last-level caches.
COLD = 4
#: Seconds that a round of the dense FFN takes at the least.
ROUND = 0.1
#: Tokens that thresholds are set on.
SAMPLES = 1024


class _Copies(nn.Module):
    """FFNs of one shape, each with weights and inputs of its own."""

    def __init__(self, count: int, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(count)
        )
        for parameter in self.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 10
            nn.init.normal_(parameter, std=fan_in**-0.5)  # pre-activations about normal for normal inputs
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, xs: Tensor) -> list[Tensor]:
        """Every FFN on its own input, xs [copies, tokens, d]."""
        return [ffn(x) for ffn, x in zip(self.ffns, xs, strict=True)]


def copies_for(d: int, size: int, widths: Widths, rate: float, cache: int) -> int:
    """How many FFNs it takes that the bytes the rewritten ones read fill the cache :data:`COLD` times.

    Args:
        d: input size; 4 d neurons.
        size: bytes of a weight.
        widths: of the plan.
        rate: of outliers.
        cache: bytes.
    """
    costs = widths.costs(d, d, size, bias=True)
    return max(2, math.ceil(COLD * cache / (costs.fold + 4 * d * (costs.predictor + rate * costs.row))))


@torch.no_grad()
def compare(
    d: int,
    dtype: torch.dtype,
    tokens: Sequence[int],
    widths: Sequence[Widths],
    rate: float,
    rounds: int,
    copies: int | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Times one FFN of d inputs and 4 d neurons with GELU.

    One graph is compiled for each contender, and called with one copy's weights after the other's.

    Args:
        d: inputs and outputs.
        dtype: of weights and inputs.
        tokens: of a step, one case each; above 8, or 16 on a CUDA device, the rewritten model runs the original FFN.
        widths: of the plans, one contender each.
        rate: share of (token, neuron) pairs that are outliers.
        rounds: timed, after one that is not.
        copies: of the FFN; as many as leave the last-level cache cold when None.
        device: "cpu" or "cuda", where all copies make one CUDA graph.
    """
    torch.manual_seed(0)
    size = dtype.itemsize
    copies = copies or max(copies_for(d, size, w, rate, last_level_cache(device)) for w in widths)
    with torch.device(device):
        model = _Copies(copies, d, dtype)
        batch = torch.randn(copies, SAMPLES, d, dtype=dtype, device="cpu")
    plans = random_plans(model, batch, widths, rate)
    rows: list[Row] = []
    for count in tokens:
        rows += _case(model, plans, torch.randn(copies, count, d, dtype=dtype, device=device), rounds)
    return rows


def _case(model: _Copies, plans: dict[Widths, Plan], xs: Tensor, rounds: int) -> list[Row]:
    torch.compiler.reset()  # or Dynamo would make the number of tokens symbolic
    copies, tokens, d = xs.shape
    steps: dict[str, Callable[..., Tensor]] = {"Inductor": torch.compile(own_code(_call), fullgraph=True)}
    for widths, plan in plans.items():
        options: dict[str, Any] = {"plan": plan}
        steps[f"tardis, {widths}"] = torch.compile(own_code(_call), backend="tardis", options=options, fullgraph=True)
    for step in steps.values():
        step(model.ffns[0], xs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        over_all = {name: _over_all(step, model, xs) for name, step in steps.items()}
        once = min(_seconds(over_all["Inductor"], xs, 1) for _ in range(2))
        passes = max(1, math.ceil(ROUND / (once * copies)))
        runs = {name: partial(_seconds, run, xs, passes) for name, run in over_all.items()}
        seconds = in_turn(runs, rounds)
    base, rewritten = seconds["Inductor"], tokens <= decode_tokens(xs.device)
    dtype = str(xs.dtype).removeprefix("torch.")
    case = f"d {d}, {dtype}, {tokens} token{'s' * (tokens > 1)}, {copies} copies"
    dense = next(iter(plans.values())).sites[0].dense_bytes
    rows = [Row(case, "Inductor", base, base, dense)]
    for widths, plan in plans.items():
        name = f"tardis, {widths}"
        if rewritten:
            found = [_reads(entry, widths, x) for entry, x in zip(plan.rewritten, xs, strict=True)]
            touched, share = (sum(part) / copies for part in zip(*found, strict=True))
            rows.append(Row(case, name, seconds[name], base, touched, share))
        else:
            rows.append(Row(case, f"{name} (original runs)", seconds[name], base, dense))
    return rows


def _call(ffn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return ffn(x)


def _over_all(step: Callable[..., Tensor], model: _Copies, xs: Tensor) -> Callable[[], object]:
    """A step of each copy in turn; on a CUDA device as one graph, so that no launch is waited for."""
    calls = list(zip(model.ffns, xs, strict=True))

    def run() -> list[Tensor]:
        return [step(ffn, x) for ffn, x in calls]

    return captured(run) if xs.is_cuda else run


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph's replay of what is run; three runs before it leave nothing to compile or to tune."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _seconds(run: Callable[[], object], xs: Tensor, passes: int) -> float:
    """Seconds of one call, over all copies in turn."""
    wait(xs.device)
    started = time.perf_counter()
    for _ in range(passes):
        run()
    wait(xs.device)
    return (time.perf_counter() - started) / (passes * len(xs))


def _reads(entry: SitePlan, widths: Widths, x: Tensor) -> tuple[float, float]:
    """Bytes that a step reads, an outlier of several tokens read once, and the share of pairs that are outliers."""
    t, d_out, activation = entry.tensors, len(entry.tensors["folded_bias"]), entry.settings["activation"]
    codes, scale, zero = (t[name][:, 0] for name in ("codes", "scale", "zero"))
    z_hat = reference.estimate(x.float(), codes, scale, zero, widths.predictor)
    outlier = reference.outside([z_hat], None, t["guard"], activation)
    costs = widths.costs(x.shape[-1], d_out, x.element_size(), bias=True)
    read = costs.fold + costs.predictor * len(t["guard"]) + costs.row * int(outlier.any(0).sum())
    return read, float(outlier.float().mean())
