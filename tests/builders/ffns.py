"""Plain FFNs and plans for them, calibrated or made by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx import Config, Plan, calibrate
from tardis_fx.config import GOALS, MOVED
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import RepeatableObservation, drive, steps
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.correction import guard_width
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.runtime.packing import group_count, pack, packed_bytes
from tardis_fx.testing.ffn import ACTIVATIONS as ACTIVATIONS
from tardis_fx.testing.ffn import FFN as FFN
from tardis_fx.testing.ffn import Activation as Activation
from tardis_fx.testing.ffn import Block as Block
from tardis_fx.testing.ffn import ffn as ffn
from tardis_fx.testing.ffn import inputs as inputs


class Broken(nn.Module):
    """Blocks behind graph breaks: Dynamo runs one graph for all of them. A batch may reach the first ones alone."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.eval()

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        for block in self.blocks[:first]:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def batches(count: int = 4, tokens: int = 256, d: int = 16) -> list[Tensor]:
    """Calibration batches."""
    return [inputs(tokens, d, seed=100 + i) for i in range(count)]


def config(**changed: Any) -> Config:
    """A config for tests: silent, every token on the rewritten path, nothing but the predictor quantised."""
    widths = {"fold_bits": 16, "row_bits": 16} | {name: changed.pop(name) for name in MOVED if name in changed}
    goal = {} if changed.keys() & GOALS else {"budget": 0.5}
    settings: dict[str, Any] = {**goal, "method": "guarded_fold", "prefill": "rewritten", "progress": False} | changed
    chosen = Config(**settings)
    own = {name: widths for name in ("guarded_fold", "paper") if name in chosen.rewrites}
    return replace(chosen, options=own | dict(chosen.options))


def planned(model: nn.Module, d: int = 16, **changed: Any) -> Plan:
    """The model's plan, calibrated on normal inputs."""
    return calibrate(model, batches(d=d), config=config(**changed))


def entries(plan: Plan) -> tuple[SitePlan, ...]:
    """The entries of a plan that rewrites every site."""
    assert len(plan.rewritten) == len(plan.sites)
    return plan.rewritten


def fitted(observation: RepeatableObservation, rewrite: Rewrite, config: Config) -> list[SitePlan]:
    """The plans of a rewrite that takes every site."""
    plans = drive(observation, steps(rewrite.fit(observation.sites, config)))
    rewritten = [plan for plan in plans if isinstance(plan, SitePlan)]
    assert len(rewritten) == len(plans)
    return rewritten


def ffn_of(block: nn.Module) -> FFN:
    """The plain FFN of a block, which a container gives as any module."""
    assert isinstance(block, Block)
    assert isinstance(block.ffn, FFN)
    return block.ffn


@dataclass(frozen=True)
class Oracle:
    """An FFN of dyadic weights with a hand-made guard, whose 8-bit predictor gives the pre-activations themselves.

    Weights, biases and inputs are small multiples of powers of two, so that pre-activations are exact in every order of
    summation, and hot ranges end halfway between two values that an estimate can take.
    """

    weights: SiteWeights
    x: Tensor
    activation: str
    codes: Tensor
    lower: Tensor
    upper: Tensor
    slope: Tensor
    intercept: Tensor

    @property
    def z(self) -> Tensor:
        """True pre-activations, [..., h]."""
        return F.linear(
            self.x.float(),
            self.weights.up.float(),
            None if self.weights.up_bias is None else self.weights.up_bias.float(),
        )

    @property
    def outlier(self) -> Tensor:
        """Where the true pre-activation lies outside its hot range, [..., h]; ranges are those of estimates, without bias."""
        z = F.linear(self.x.float(), self.weights.up.float())
        return (z < self.lower) | (z > self.upper)

    def to(self, dtype: torch.dtype) -> "Oracle":
        """The same in another dtype: exact, for 8 significant bits hold every weight."""
        w = self.weights
        weights = SiteWeights(*(None if t is None else t.to(dtype) for t in (w.up, w.up_bias, w.down, w.down_bias)))  # type: ignore[arg-type]
        return Oracle(
            weights, self.x.to(dtype), self.activation, self.codes, self.lower, self.upper, self.slope, self.intercept
        )

    def plan(self, guarded: Sequence[int], exact: Sequence[int]) -> SitePlan:
        """The plan that guards some neurons and always computes others; the fold takes each neuron's surrogate."""
        w, listed, rows = (
            self.weights,
            torch.tensor([*guarded, *exact], dtype=torch.int32),
            torch.tensor(guarded, dtype=torch.long),
        )
        slope, up_bias = self.slope.double(), 0 if w.up_bias is None else w.up_bias.double()
        folded_bias = w.down.double() @ (slope * up_bias + self.intercept) + (
            0 if w.down_bias is None else w.down_bias.double()
        )
        tensors = {
            "neurons": listed,
            "codes": pack(self.codes, 8)[rows, None],
            "scale": torch.full((len(rows), 1, group_count(w.up.shape[1], 64)), SCALE, dtype=torch.float16),
            "zero": torch.full((len(rows), 1, group_count(w.up.shape[1], 64)), ZERO, dtype=torch.uint8),
            "guard": torch.stack([self.lower, self.upper], 1)[rows],
            "surrogate": torch.stack([self.slope, self.intercept], 1)[listed.long()],
            "folded_weight": ((w.down.double() * slope) @ w.up.double()).to(w.up.dtype),
            "folded_bias": folded_bias.to(w.up.dtype),
        }
        parameters = [p for p in (w.up, w.up_bias, w.down, w.down_bias) if p is not None]
        return SitePlan(
            fingerprint=fingerprint(parameters, self.activation), name="ffn", kind="plain", activation=self.activation, dtype=str(w.up.dtype),
            shapes=tuple(tuple(p.shape) for p in parameters), dense_bytes=w.bytes, method="guarded_fold",
            settings={"bits": 8, "fold_bits": 16, "row_bits": 16, "group_size": 64, "activation": self.activation}, tensors=tensors,
        )  # fmt: skip

    def rewritten(self, guarded: Sequence[int], exact: Sequence[int], x: Tensor | None = None) -> Tensor:
        """The eager specification's output."""
        rewrite, plan = GuardedFold(), self.plan(guarded, exact)
        return rewrite.forward(self.x if x is None else x, rewrite.constants(plan, self.weights), plan)

    def dense(self, x: Tensor | None = None) -> Tensor:
        """The original's output."""
        w = self.weights
        hidden = Activation(self.activation)(F.linear(self.x if x is None else x, w.up, w.up_bias))
        return F.linear(hidden, w.down, w.down_bias)

    def model(self) -> FFN:
        """The original as a module."""
        w = self.weights
        linears = []
        for weight, bias in ((w.up, w.up_bias), (w.down, w.down_bias)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.clone())
            if bias is not None:
                linear.bias = nn.Parameter(bias.clone())
            linears.append(linear)
        return FFN(linears[0], Activation(self.activation), linears[1]).eval()


#: Of an oracle's predictor; weights lie between -31 and 31 scales, inputs between -4 and 4.
SCALE, ZERO, LARGEST = 2.0**-4, 128, 31


def oracle(
    d: int,
    hidden: int,
    tokens: int,
    activation: str = "gelu",
    *,
    d_out: int | None = None,
    bias: bool = True,
    seed: int = 0,
) -> Oracle:
    """An oracle with random weights, inputs and ranges.

    Args:
        d: input width.
        hidden: neurons.
        tokens: rows of ``x``.
        activation: name.
        d_out: output width; where None, W2 is the identity, so that each output is one neuron's contribution.
        bias: whether the projections have biases.
        seed: of everything.
    """
    g = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g).float()

    codes = (whole(-LARGEST, LARGEST, hidden, d) + ZERO).to(torch.uint8)
    up = (codes.float() - ZERO) * SCALE
    down = torch.eye(hidden) if d_out is None else whole(-8, 8, d_out, hidden) / 32
    x = whole(-4, 4, tokens, d)
    spread = (x @ up.T).std(unbiased=False).clamp(min=1).item() if tokens else 8.0
    ends = torch.randn(2, hidden, generator=g).mul(spread).div(SCALE).floor().add(0.5).mul(SCALE).sort(0).values
    weights = SiteWeights(
        up, whole(-16, 16, hidden) * SCALE if bias else None, down, whole(-16, 16, len(down)) * SCALE if bias else None
    )
    slope, intercept = torch.rand(hidden, generator=g), torch.randn(hidden, generator=g) / 4
    return Oracle(weights, x, activation, codes, ends[0], ends[1], slope, intercept)


@st.composite
def oracles(draw: st.DrawFn, *, identity: bool = False, expanding: bool = False) -> Oracle:
    """Oracles of drawn shapes; ``identity`` makes W2 the identity, ``expanding`` the hidden size larger than the input's."""
    d = draw(st.sampled_from([1, 5, 8, 64, 65]))
    return oracle(
        d,
        draw(st.integers(d + 1, d + 40) if expanding else st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(ACTIVATIONS)),
        d_out=None if identity else draw(st.integers(1, 12)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def exact_plan(weights: SiteWeights, parameters: Sequence[Tensor], activation: str) -> SitePlan:
    """A plan that computes every neuron exactly: its rewritten site gives what the original gives."""
    (hidden, d), k = weights.up.shape, len(weights.projections)
    slopes = [torch.linspace(-1, 1, hidden), torch.linspace(2, -1, hidden)][:k]
    intercept = torch.linspace(-2, 2, hidden)
    shift, folded_weight = intercept.clone(), torch.zeros(len(weights.down), d, dtype=weights.up.dtype)
    for slope, (matrix, bias) in zip(slopes, weights.projections.values(), strict=True):
        shift += 0 if bias is None else slope * bias
        folded_weight += (weights.down * slope) @ matrix
    return SitePlan(
        fingerprint=fingerprint(parameters, activation), name="ffn", kind="plain" if k == 1 else "gated",
        activation=activation, dtype=str(weights.up.dtype), shapes=tuple(tuple(p.shape) for p in parameters),
        dense_bytes=weights.bytes, method="guarded_fold",
        settings={"bits": 2, "fold_bits": 16, "row_bits": 16, "group_size": 64, "activation": activation},
        tensors={
            "neurons": torch.arange(hidden, dtype=torch.int32),
            "codes": torch.zeros(0, k, packed_bytes(d, 2), dtype=torch.uint8),
            "scale": torch.zeros(0, k, group_count(d, 64), dtype=torch.float16),
            "zero": torch.zeros(0, k, group_count(d, 64), dtype=torch.uint8),
            "guard": torch.zeros(0, guard_width(k)),
            "surrogate": torch.stack([*slopes, intercept], 1),
            "folded_weight": folded_weight,
            "folded_bias": weights.down @ shift + (0 if weights.down_bias is None else weights.down_bias),
        },
    )  # fmt: skip


@st.composite
def classes(draw: st.DrawFn, hidden: int) -> tuple[list[int], list[int]]:
    """Guarded and always exact neurons, in drawn orders; the rest are folded."""
    order = draw(st.permutations(range(hidden)))
    first, second = sorted((draw(st.integers(0, hidden)), draw(st.integers(0, hidden))))
    return order[:first], order[first:second]


def expected(model: FFN, plan: Plan, x: Tensor) -> Tensor:
    """What the eager specification makes of a model that is one FFN."""
    weights = SiteWeights(*(parameter.detach() for parameter in model.parameters()))
    entry = plan.rewritten[0]
    rewrite = rewrite_named(str(entry.method))
    with torch.no_grad():
        return rewrite.forward(x, rewrite.constants(entry, weights), entry)
