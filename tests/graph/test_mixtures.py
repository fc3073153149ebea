"""Experts of a mixture are listed, and refused because their tokens are routed."""

import pytest
import torch
from builders.architectures import FAMILIES, made
from builders.compiled import compiled
from builders.exact import assert_same, run
from builders.ffns import config, ffn, inputs
from torch import Tensor, nn

from tardis_fx import calibrate, explain
from tardis_fx.testing.capture import sites_of

X = inputs(2, 3, 16)


class Mixture(nn.Module):
    """Each token goes to two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(ffn(seed=i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == i)
            result.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, place, None])
        return result


class Capacity(Mixture):
    """Each expert takes the three tokens that it likes best."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = self.router(x).softmax(-1).topk(3, 0)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            result = result.index_add(0, tokens[:, i], expert(x.index_select(0, tokens[:, i])) * weights[:, i, None])
        return result


@pytest.mark.parametrize("kind", [Mixture, Capacity])
def test_experts_are_listed_and_refused_because_their_tokens_are_routed(kind: type[Mixture]) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        backend = run(kind().eval(), X.view(6, 16))
    assert [s.name for s in backend.sites] == [f"experts.{i}" for i in range(4)]
    assert {s.reason for s in backend.sites} == {"it is an expert of a mixture: its tokens are routed"}


def test_experts_that_see_every_token_are_plain_ffns() -> None:
    class Soft(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            return sum(e(x) * weights[:, i, None] for i, e in enumerate(self.experts))  # type: ignore[return-value, no-any-return]

    assert run(Soft().eval(), X.view(6, 16)).rewritten == 4


def test_a_model_of_experts_alone_has_a_plan_that_refuses_them_and_runs_as_it_was() -> None:
    family = FAMILIES["mixtral"]
    model = made(family)
    plan = calibrate(model, [family.inputs], config=config())
    reports = explain(model, plan, family.inputs).sites
    assert [(r.name, r.status) for r in reports] == [(f"layers.{i}.mlp.experts", "refused") for i in range(2)]
    stacked = [(e.gate_up_proj, e.down_proj) for e in (layer.mlp.experts for layer in model.layers)]
    assert [r.dense_bytes for r in reports] == [4 * (up.numel() + down.numel()) for up, down in stacked]
    with torch.no_grad():
        assert_same(compiled(model, plan)(**family.inputs), model(**family.inputs))


def test_a_site_whose_number_of_tokens_depends_on_the_data_is_refused() -> None:
    class Unpadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x[x[:, 0] > 0])  # type: ignore[no-any-return]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (site,) = sites_of(Unpadded().eval(), X.view(6, 16))
    assert "depends on the data" in str(site.reason)
