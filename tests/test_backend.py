import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import models
from builders.compiled import compiled
from builders.ffns import FFN, Block, batches, config, expected, ffn, inputs, planned
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

from tardis_fx import (
    Config,
    ConfigError,
    Plan,
    PlanFileError,
    PlanMismatchError,
    TardisError,
    calibrate,
    explain,
)
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.passes.guarded_fold import GuardedFold

FEW, MANY = inputs(4, 16, seed=7), inputs(40, 16, seed=8)


# ---- The plan


@torch.no_grad()
def test_a_plan_is_taken_as_object_as_path_and_as_string(model: FFN, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    plan.save(path)
    for argument in (plan, path, str(path)):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, argument)(FEW), expected(model, plan, FEW))


@torch.no_grad()
def test_inductor_is_the_inner_backend_and_makes_one_graph(model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, inner=None)
    for x in (FEW, FEW[:1], inputs(2, 3, 16)):
        torch.testing.assert_close(fast(x), expected(model, plan, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_can_be_compiled_with_one_plan_after_the_other(model: FFN, plan: Plan) -> None:
    other = planned(model, budget=0.9)
    for _ in range(2):
        for argument in (plan, other):
            torch.testing.assert_close(compiled(model, argument)(FEW), expected(model, argument, FEW))


@torch.no_grad()
def test_inference_mode_is_as_good_as_no_grad(model: FFN, plan: Plan) -> None:
    with torch.inference_mode():
        result = compiled(model, plan)(FEW)
    torch.testing.assert_close(result.clone(), expected(model, plan, FEW))


@torch.no_grad()
def test_the_compiled_model_follows_the_original_device_dtype_and_shape(model: FFN, plan: Plan) -> None:
    for shape in [(16,), (1, 16), (0, 16), (2, 3, 16), (5, 0, 16)]:
        torch._dynamo.reset()
        result = compiled(model, plan)(inputs(*shape))
        assert (result.shape, result.dtype, result.device) == (shape, torch.float32, torch.device("cpu"))


@torch.no_grad()
def test_the_model_is_left_as_it_was(model: FFN, plan: Plan) -> None:
    before = {name: (p.data_ptr(), p._version, p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modules, buffers = list(model.named_modules()), list(model.named_buffers())
    dynamo = torch._dynamo.config.get_config_copy()
    compiled(model, plan, inner="inductor")(FEW)
    assert torch._dynamo.config.get_config_copy() == dynamo
    assert list(model.named_modules()) == modules
    assert list(model.named_buffers()) == buffers
    for name, p in model.named_parameters():
        address, version, grad, value = before[name]
        assert (p.data_ptr(), p._version, p.requires_grad) == (address, version, grad)
        assert torch.equal(p, value)


def test_a_transformers_models_config_is_left_as_it_was() -> None:
    gpt2 = models.gpt2()
    before = json.dumps(gpt2.config.to_dict(), default=str)
    plan = calibrate(gpt2, [models.tokens(4, 32)], config=config())
    with torch.no_grad():
        compiled(gpt2, plan)(models.tokens(1, 4))
    assert json.dumps(gpt2.config.to_dict(), default=str) == before


def printed(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_is_lean() -> None:
    loaded = printed("import sys, tardis_fx; print(*sys.modules)")
    assert "tardis_fx" in loaded
    assert not {"transformers", "triton", "matplotlib", "typer", "torch._inductor.compile_fx"} & set(loaded)
    assert printed("import torch, tardis_fx; print(torch.cuda.is_initialized())") == ["False"]


def test_the_backend_is_found_without_importing_the_package() -> None:
    assert printed("import torch; print('tardis' in torch.compiler.list_backends())") == ["True"]


# ---- Prefill


@torch.no_grad()
def test_original_prefill_is_exact_for_many_tokens_and_rewritten_for_few(model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, prefill="original")
    for _ in range(2):
        torch.testing.assert_close(fast(MANY), model(MANY))
        torch.testing.assert_close(fast(FEW), expected(model, plan, FEW))
    assert not torch.allclose(model(FEW), expected(model, plan, FEW), atol=1e-3), "the plan approximates nothing"


@torch.no_grad()
def test_rewritten_prefill_rewrites_every_token(model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, prefill="rewritten")
    for x in (MANY, FEW, inputs(3, 20, 16)):
        torch.testing.assert_close(fast(x), expected(model, plan, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prefill_is_the_plans_unless_an_option_says_otherwise(model: FFN, plan: Plan) -> None:
    as_original = Plan(plan.sites, Config(prefill="original", progress=False))
    exact, rewritten = model(MANY), expected(model, plan, MANY)
    cases: list[tuple[Plan, dict[str, Any], Tensor]] = [
        (as_original, {}, exact), (plan, {}, rewritten),
        (as_original, {"prefill": "rewritten"}, rewritten), (plan, {"prefill": "original"}, exact),
        (as_original, {"prefill": None}, exact),
    ]  # fmt: skip
    for argument, options, result in cases:
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model, argument, **options)(MANY), result)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [GuardedFold.decode_tokens, GuardedFold.decode_tokens + 1])
def test_with_symbolic_sizes_the_number_of_tokens_still_decides(tokens: int, model: FFN, plan: Plan) -> None:
    fast = compiled(model, plan, prefill="original", dynamic=True)
    x = inputs(tokens, 16)
    torch.testing.assert_close(fast(x), model(x) if tokens > GuardedFold.decode_tokens else expected(model, plan, x))
    torch.testing.assert_close(fast(FEW), expected(model, plan, FEW))
    torch.testing.assert_close(fast(MANY), model(MANY))


# ---- A language model


@pytest.fixture(scope="module")
def gpt2_plan() -> Plan:
    return calibrate(models.gpt2(), [models.tokens(4, 48, seed=i) for i in range(4)], config=config(prefill="original"))


def generated(model: Any, prompt: Tensor, steps: int) -> Tensor:
    """Logits of a prompt and of greedy decoding with a static cache, [1, prompt + steps, vocabulary]."""
    gpt2 = models.gpt2()
    cache = {cache_argument(gpt2): StaticCache(config=gpt2.config, max_cache_len=64)}
    logits = [model(prompt, **cache, use_cache=True).logits]
    for i in range(steps):
        position = torch.tensor([[prompt.shape[1] + i]])
        logits.append(model(logits[-1][:, -1:].argmax(-1), **cache, use_cache=True, position_ids=position).logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def test_decoding_with_a_static_cache_does_not_recompile(gpt2_plan: Plan) -> None:
    gpt2 = models.gpt2()
    fast = compiled(gpt2, gpt2_plan)
    generated(fast, models.tokens(1, 20), 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        generated(fast, models.tokens(1, 20, seed=1), 20)


@torch.no_grad()
def test_generation_with_exact_prefill_and_a_generous_plan_gives_the_models_logits(gpt2_plan: Plan) -> None:
    gpt2, prompt = models.gpt2(), models.tokens(1, 20)
    exact, fast = generated(gpt2, prompt, 8), generated(compiled(gpt2, gpt2_plan), prompt, 8)
    torch.testing.assert_close(fast[:, :20], exact[:, :20])
    torch.testing.assert_close(fast, exact, rtol=0, atol=0.1 * float(exact.std()))
    assert not torch.equal(fast[:, 20:], exact[:, 20:])


@torch.no_grad()
def test_generate_runs_on_the_compiled_model(gpt2_plan: Plan) -> None:
    gpt2 = models.gpt2()
    gpt2.forward = compiled(gpt2.forward, gpt2_plan, fullgraph=False)
    tokens = gpt2.generate(models.tokens(1, 20), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] <= 24


@torch.no_grad()
def test_a_fused_encoder_is_calibrated_and_rewritten() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model.layers[1].linear1.weight.mul_(1.5)
    plan = calibrate(model, [inputs(4, 64, 16, seed=i) for i in range(4)], config=config(budget=0.6))
    assert [site.method for site in plan.sites] == ["guarded_fold"] * 2
    x = inputs(2, 5, 16, seed=9)
    output, exact = compiled(model, plan)(x), model(x)
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0, atol=0.3)
    assert {site.status for site in explain(model, plan, x).sites} == {"rewritten"}


# ---- Errors that a user can cause


def raises(kind: type[TardisError], cause: str, run: Callable[[], Any]) -> None:
    """The error itself, not one of Dynamo's around it; any cause in its own words."""
    with torch.no_grad(), pytest.raises(kind) as raised:
        run()
    error = raised.value
    assert isinstance(error, TardisError)
    assert type(error).__name__ == kind.__name__
    assert cause in str(error)
    assert "backend=" not in str(error)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"budget": 0.2}, "unknown option 'budget': the options are plan, config"),
        ({"config": 3}, "config must be an instance of Config, not 3"),
        ({"plan": 3}, "plan must be a tardis_fx.Plan or the path of its file, not int"),
        ({"plan": {"sites": []}}, "not dict"),
        ({"prefill": "exact"}, "prefill must be 'original' or 'rewritten', not 'exact'"),
        ({"prefill": ["original"]}, "prefill"),
        ({"strict": "yes"}, "strict must be a valid boolean, not 'yes'"),
        ({"inner": "nvcc"}, "'nvcc'"),
        ({"inner": "tardis"}, "name another backend, not 'tardis'"),
        ({"inner": 3}, "inner must be a valid string, not 3"),
        ({"mode": 3}, "mode must be a valid string, not 3"),
        ({"mode": "faster", "inner": "inductor"}, "'faster'"),
        ({"mode": "max-autotune"}, "needs the inner backend 'inductor'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_a_config_error_that_names_it(
    options: dict[str, Any], cause: str, model: FFN, plan: Plan
) -> None:
    raises(ConfigError, cause, lambda: compiled(model, **({"plan": plan} | options))(FEW))


def test_a_plan_file_that_cannot_be_read_is_named(model: FFN, tmp_path: Path) -> None:
    raises(PlanFileError, str(tmp_path / "none"), lambda: compiled(model, tmp_path / "none")(FEW))
    (tmp_path / "plan").write_bytes(b"no plan")
    raises(PlanFileError, str(tmp_path / "plan"), lambda: compiled(model, str(tmp_path / "plan"))(FEW))


def test_the_plan_of_another_model_is_a_mismatch(plan: Plan) -> None:
    raises(PlanMismatchError, "belong to another model", lambda: compiled(ffn(seed=3), plan)(FEW))
    raises(PlanMismatchError, "no site of these shapes", lambda: compiled(ffn(16, 48), plan)(FEW))


def test_the_plan_of_another_dtype_is_a_mismatch_that_names_both(model: FFN, plan: Plan) -> None:
    run = lambda: compiled(model.bfloat16(), plan)(FEW.bfloat16())  # noqa: E731
    raises(PlanMismatchError, "made for torch.float32 weights, but these are torch.bfloat16", run)


def test_a_plan_whose_rewrite_is_not_installed_is_refused(model: FFN, plan: Plan) -> None:
    entry = type(plan.sites[0])(**vars(plan.sites[0]) | {"method": "unheard of"})
    raises(PlanFileError, "unheard of", lambda: compiled(model, Plan((entry,), plan.config))(FEW))


def test_the_error_of_a_compiled_model_can_be_raised_again(plan: Plan) -> None:
    fast = compiled(ffn(seed=3), plan)
    for _ in range(2):
        raises(PlanMismatchError, "belong to another model", lambda: fast(FEW))


# ---- Sites left as they are


class Two(nn.Module):
    """An FFN that every rewrite takes and a gated one, which the paper's does not."""

    def __init__(self, planned: FFN) -> None:
        super().__init__()
        self.planned = planned
        self.gate, self.up, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.planned(x) + self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_site_that_is_left_is_warned_about_once_and_the_rest_rewritten(
    model: FFN, caplog: pytest.LogCaptureFixture
) -> None:
    two = Two(model).eval()
    plan = planned(two, method="paper")
    caplog.clear()  # calibration warns of few tokens
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        fast = compiled(two, plan)
        fast(FEW)
        result = fast(FEW)
    (record,) = [record for record in caplog.records if record.name == "tardis_fx"]
    assert record.levelno == logging.WARNING
    assert "gated" in record.getMessage()
    gated = two.down(F.silu(two.gate(FEW)) * two.up(FEW))
    first = Plan(tuple(site for site in plan.sites if site.method), plan.config)
    torch.testing.assert_close(result, expected(model, first, FEW) + gated)


@torch.no_grad()
def test_nothing_is_warned_about_where_everything_is_rewritten(
    model: FFN, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        compiled(model, plan, strict=True)(FEW)
        compiled(model, plan, prefill="original", strict=True)(MANY)
    assert caplog.records == []


def test_strict_raises_where_a_site_is_left(model: FFN) -> None:
    two = Two(model).eval()
    raises(PlanMismatchError, "gated", lambda: compiled(two, planned(two, method="paper"), strict=True)(FEW))


def test_strict_raises_where_the_plan_does_not_know_a_site(model: FFN, plan: Plan) -> None:
    both = nn.Sequential(Block(model), Block(ffn(16, 48))).eval()
    raises(PlanMismatchError, "1.ffn", lambda: compiled(both, plan, strict=True)(FEW))


def test_a_model_that_needs_gradients_runs_as_it_was_and_says_so(
    model: FFN, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        output = compiled(model, plan, inner="aot_eager")(FEW)
    assert "gradients" in caplog.text
    torch.testing.assert_close(output, model(FEW))
    output.sum().backward()
    assert model.up.weight.grad is not None


@torch.no_grad()
def test_a_model_in_training_mode_runs_as_it_was_and_says_so(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    dropping = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 16)).train()
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        compiled(dropping, plan)(FEW)
    assert "training mode" in caplog.text


@torch.no_grad()
def test_under_autocast_the_model_runs_as_it_was_and_says_so(
    model: FFN, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tardis_fx"), torch.autocast("cpu", torch.bfloat16):
        result = compiled(model, plan)(FEW)
        assert torch.equal(result, model(FEW))
    assert "autocast" in caplog.text


@torch.no_grad()
def test_a_model_without_ffns_compiles_as_ever(plan: Plan) -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).eval()
    torch.testing.assert_close(compiled(plain, plan)(FEW), plain(FEW))


@torch.no_grad()
def test_gradients_that_are_enabled_inside_the_graph_are_not_lost(model: FFN, plan: Plan) -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)  # type: ignore[no-any-return]

    fast = compiled(forward, plan)
    assert forward(FEW).requires_grad
    assert fast(FEW).requires_grad


def test_batches_for_the_plans_are_the_same_every_time() -> None:
    assert all(torch.equal(a, b) for a, b in zip(batches(), batches(), strict=True))
