"""Released weights are neither saved nor read."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Broken, config, ffn, inputs
from builders.release import HIDDEN, D, compiled, planned
from torch import nn

import tardis_fx
from tardis_fx import Plan
from tardis_fx.errors import ReleasedWeightError


def _released(**changes: Any) -> tuple[nn.Module, Plan, torch.Tensor]:
    model, x = nn.Sequential(ffn(D, HIDDEN)).eval(), inputs(32, D)
    plan = planned(model, **changes)
    tardis_fx.release(model, plan, x)
    return model, plan, x


def _eager(model: nn.Module) -> Any:
    """Compiled, which PyTorch declares to be a function."""
    return torch.compile(model, backend="eager")


#: Uses that write, copy or read a whole model.
USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "state_dict of a part": lambda model, _: model[0][2].state_dict(),  # type: ignore[index,operator,union-attr]
    "torch.save of its state": lambda model, path: torch.save(model.state_dict(), path),
    "torch.save of the model": lambda model, _: torch.save(model, io.BytesIO()),
    "torch.save of parameters": lambda model, _: torch.save(dict(model.named_parameters()), io.BytesIO()),
    "pickle": lambda model, _: pickle.dumps(model),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "eager call": lambda model, _: model(inputs(3, D)),
    "eager call of a part": lambda model, _: model[0][0](inputs(3, D)),  # type: ignore[index,operator,union-attr]
    "state_dict after a cast": lambda model, _: model.half().state_dict(),
    "eager call after a cast": lambda model, _: model.double()(inputs(3, D).double()),
    "state_dict of the compiled model": lambda model, _: _eager(model).state_dict(),
}


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
def test_what_would_write_or_read_released_weights_names_them(use: str, tmp_path: Path) -> None:
    model, _, _ = _released()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(b"as it was")
    with pytest.raises(ReleasedWeightError, match=r"0\.[02]\.weight: released by tardis_fx\.release"):
        USES[use](model, checkpoint)
    assert checkpoint.read_bytes() == b"as it was"


@torch.no_grad()
def test_a_released_model_is_not_saved_over_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = models.gpt2()
    plan = tardis_fx.calibrate(model, [models.tokens(4, 32)], config=config(fold_bits=8, row_bits=8, budget=0.7))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    before = weights.read_bytes()
    assert tardis_fx.release(model, plan, models.tokens(1, 4)) > 0
    for save in (lambda: model.save_pretrained(tmp_path), lambda: save_model(model, str(weights))):
        with pytest.raises(ReleasedWeightError, match=r"h\.0\.mlp\.c_fc\.weight"):
            save()
    assert weights.read_bytes() == before


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_loading_the_original_weights_makes_the_model_whole(assign: bool) -> None:
    model, x = nn.Sequential(ffn(D, HIDDEN)).eval(), inputs(32, D)
    plan, before, state = planned(model), model(x), copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert tardis_fx.release(model, plan, x) > 0
        part = {name: value for name, value in state.items() if name.startswith("0.0.")}
        model.load_state_dict(part, strict=False)
        with pytest.raises(ReleasedWeightError, match=r"0\.2\.weight"):
            model.state_dict()
        model.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(model(x), before)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert all(map(torch.equal, twin.state_dict().values(), state.values()))
        assert torch.equal(twin(x), before)
        torch.compiler.reset()
        assert torch.equal(compiled(model, plan, prefill="original")(x), before)


@torch.no_grad()
def test_weights_that_take_the_place_of_released_ones_are_used() -> None:
    model, _, x = _released()
    for linear in (model[0][0], model[0][2]):  # type: ignore[index,operator,union-attr]
        linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    assert model(x).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


class Owner(nn.Module):
    """An FFN that holds its matrices itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.up = nn.Parameter(torch.randn(HIDDEN, D, generator=g) / D**0.5)
        self.down = nn.Parameter(torch.randn(D, HIDDEN, generator=g) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(nn.functional.linear(x, self.up))
        return nn.functional.linear(hidden, self.down)


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_code_does_not_see_what_guards_released_weights(fullgraph: bool) -> None:
    """As the model itself, and as twelve blocks of one graph, more than Dynamo would compile anew."""
    model = Owner(0).eval() if fullgraph else Broken([Owner(seed) for seed in range(12)])
    x = inputs(32, D)
    plan = planned(model)
    before = compiled(model, plan)(x)
    tardis_fx.release(model, plan, x)
    torch.compiler.reset()
    options: dict[str, Any] = {"plan": plan, "inner": "eager", "strict": True}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert torch.equal(torch.compile(model, backend="tardis", options=options, fullgraph=fullgraph)(x), before)
    with pytest.raises(ReleasedWeightError, match=r"up, (blocks\.0\.)?down: released"):
        model(x)
