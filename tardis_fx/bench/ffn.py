"""Times one FFN with random weights, rewritten and compiled by Inductor, with weights read from memory."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tardis_fx.bench.plans import Widths, random_plans
from tardis_fx.bench.timings import Timing
from tardis_fx.measure.machine import last_level_cache
from tardis_fx.measure.timing import interleave, seconds
from tardis_fx.observation.capture import own_code
from tardis_fx.passes.pipeline import decode_tokens
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.runtime import reference

#: Bytes that a pass over all copies reads, as a multiple of the last-level cache.
COLD = 4
#: Minimum seconds of a round of the dense FFN.
ROUND = 0.1
#: Number of tokens for setting thresholds.
SAMPLES = 1024


class _Copies(nn.Module):
    """FFNs of one shape with separate weights and inputs."""

    def __init__(self, count: int, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(count)
        )
        for parameter in self.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 10
            nn.init.normal_(parameter, std=fan_in**-0.5)  # pre-activations about normal for normal inputs
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, xs: Float[Tensor, "copies tokens d"]) -> list[Float[Tensor, "tokens d"]]:
        """Applies every FFN to its own input."""
        return [ffn(x) for ffn, x in zip(self.ffns, xs, strict=True)]


def copies_for(d: int, size: int, widths: Widths, rate: float, cache: int) -> int:
    """Number of FFNs of 4 d neurons whose rewritten forms read :data:`COLD` times the cache; ``size`` is a weight's."""
    costs = widths.costs(d, d, size)
    return max(2, math.ceil(COLD * cache / (costs.fold + 4 * d * (costs.predictor + rate * costs.row))))


@torch.no_grad()
def bench_ffn(
    d: int,
    dtype: torch.dtype,
    tokens: Sequence[int],
    widths: Sequence[Widths],
    rate: float,
    rounds: int,
    copies: int | None = None,
    device: str = "cpu",
) -> list[Timing]:
    """Times one FFN of d inputs and 4 d neurons with GELU.

    One graph is compiled for each contender, and called with the weights of each copy in turn.

    Args:
        d: inputs and outputs.
        dtype: of weights and inputs.
        tokens: of a step, one case each; above 8, or 16 on a CUDA device, the rewritten model runs the original FFN.
        widths: of the plans, one contender each.
        rate: share of (token, neuron) pairs that are outliers.
        rounds: timed rounds, after one warm-up round.
        copies: of the FFN; None makes enough to keep the last-level cache cold.
        device: "cpu" or "cuda", where all copies form one CUDA graph.
    """
    torch.manual_seed(0)
    size = dtype.itemsize
    copies = copies or max(copies_for(d, size, w, rate, last_level_cache(device)) for w in widths)
    with torch.device(device):
        model = _Copies(copies, d, dtype)
        batch = torch.randn(copies, SAMPLES, d, dtype=dtype, device="cpu")
    plans = random_plans(model, batch, widths, rate)
    cases = [torch.randn(copies, count, d, dtype=dtype, device=device) for count in tokens]
    return [timing for xs in cases for timing in _case(model, plans, xs, rounds)]


def _case(model: _Copies, plans: dict[Widths, Plan], xs: Float[Tensor, "copies tokens d"], rounds: int) -> list[Timing]:
    torch.compiler.reset()  # otherwise Dynamo would make the number of tokens symbolic
    copies, tokens, d = xs.shape
    options: dict[str, dict[str, Any]] = {"Inductor": {}}
    for w, plan in plans.items():
        options[f"tardis, {w}"] = {"backend": "tardis", "options": {"plan": plan, "select": "always"}}
    calls = {name: torch.compile(own_code(_call), fullgraph=True, **options[name]) for name in options}
    for call in calls.values():
        call(model.ffns[0], xs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        over_all = {name: _over_all(call, model, xs) for name, call in calls.items()}
        passes = math.ceil(ROUND / min(seconds(over_all["Inductor"], xs.device) for _ in range(2)))
        runs = {name: partial(seconds, run, xs.device, passes) for name, run in over_all.items()}
        steps = {name: [taken / copies for taken in turns] for name, turns in interleave(runs, rounds).items()}
    base = steps["Inductor"]
    dtype = str(xs.dtype).removeprefix("torch.")
    case = f"d {d}, {dtype}, {tokens} token{'s' * (tokens > 1)}, {copies} copies"
    dense = next(iter(plans.values())).sites[0].dense_bytes
    timings = [Timing(case, "Inductor", base, base, dense)]
    for widths, plan in plans.items():
        name = f"tardis, {widths}"
        if tokens <= decode_tokens(xs.device):
            reads = [_reads(entry, widths, x) for entry, x in zip(plan.rewritten, xs, strict=True)]
            touched, share = (sum(part) / copies for part in zip(*reads, strict=True))
            timings.append(Timing(case, name, steps[name], base, touched, share))
        else:
            timings.append(Timing(case, f"{name} (original runs)", steps[name], base, dense))
    return timings


def _call(ffn: Callable[[Tensor], Tensor], x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    return ffn(x)


def _over_all(
    call: Callable[..., Tensor], model: _Copies, xs: Float[Tensor, "copies tokens d"]
) -> Callable[[], object]:
    """A function that runs a step of each copy; on a CUDA device as one graph, so that launches take no time."""
    pairs = list(zip(model.ffns, xs, strict=True))

    def run() -> list[Float[Tensor, "tokens d"]]:
        return [call(ffn, x) for ffn, x in pairs]

    if not xs.is_cuda:
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


def _reads(entry: SitePlan, widths: Widths, x: Float[Tensor, "tokens d"]) -> tuple[float, float]:
    """Bytes that a step reads, and the share of pairs that are outliers; several tokens share a neuron's row."""
    t, d_out = entry.tensors, len(entry.tensors["folded_bias"])
    codes, scale, zero = (t[name][:, 0] for name in ("codes", "scale", "zero"))
    z_hat = reference.estimate(x.float(), codes, scale, zero, widths.predictor)
    outlier = reference.outside([z_hat], None, t["guard"], entry.settings["activation"])
    costs = widths.costs(x.shape[-1], d_out, x.element_size())
    read = costs.fold + costs.predictor * len(t["guard"]) + costs.row * int(outlier.any(0).sum())
    return read, float(outlier.float().mean())
