"""A language model of two FFNs, its plans, and how they are healed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from builders import models
from builders.ffns import Block, config, entries, ffn
from builders.gated import Gated
from tardis_fx import Plan, calibrate, heal
from tardis_fx.healing.site import TrainableSite

STEPS = 40  # two evaluations


class Language(nn.Module):
    """Token numbers to logits, with two FFNs between."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(models.VOCABULARY, 16), nn.Linear(16, models.VOCABULARY)
        made: Any = Gated if kind == "gated" else ffn
        self.blocks = nn.Sequential(*(Block(made(seed=i)) for i in range(2)))
        self.eval()

    def forward(self, ids: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.blocks(self.embedding(ids))))


TEXT = [models.tokens(4, 32, seed=i) for i in range(8)]


@cache
def language_plan(bits: int | None = 16, dtype: torch.dtype = torch.float32, kind: str = "plain") -> Plan:
    """Of any :class:`Language` of this kind: all have the same weights. Without ``bits``, of the default rewrite."""
    chosen = config(method="partial_linear", budget=0.3) if bits is None else config(fold_bits=bits, row_bits=bits)
    return calibrate(Language(kind).to(dtype), TEXT, config=chosen)


def healed(model: nn.Module, plan: Plan, given: Any = TEXT, **changed: Any) -> Plan:
    chosen: dict[str, Any] = {"steps": STEPS, "learning_rate": 1e-2, "progress": False}
    return heal(model, plan, given, **(chosen | changed))


def slopes(site: TrainableSite, x: Tensor, name: str, step: float) -> tuple[float, float]:
    """The slope of a site's outputs along a random change of a parameter: by its gradient, and by the stored plans."""
    parameter = site.get_parameter(name)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(site.train()(x).sum(), parameter)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            values.append(float(site.eval()(x).double().sum()))
            parameter.sub_(sign * step * direction)
    return float((gradient * direction).sum()), (values[0] - values[1]) / (2 * step)


def same(a: Plan, b: Plan) -> bool:
    return all(
        x.touched_bytes == y.touched_bytes
        and x.error == y.error
        and all(torch.equal(tensor, y.tensors[name]) for name, tensor in x.tensors.items())
        for x, y in zip(entries(a), entries(b), strict=True)
    )
