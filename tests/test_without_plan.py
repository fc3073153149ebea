"""torch.compile with no plan: observed, fitted, checked and swapped in while the model serves."""

import logging
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, ffn, ffn_of, inputs
from builders.live import CONFIG, ENOUGH, RUNS, TOKENS, compiled, serve
from torch import Tensor, nn

from tardis_fx import Config, ConfigError, explain
from tardis_fx.guarded_fold import residuals


@torch.no_grad()
def test_the_original_runs_until_the_rewrite_is_swapped_in() -> None:
    model = Block(ffn())
    fast = compiled(model)
    x = inputs(4, 16, seed=99)
    stages = []
    for i in range(ENOUGH):
        given = inputs(256, 16, seed=i)
        assert torch.equal(fast(given), model(given)), "an observed call is the original's"
        stages.append(explain(fast, None, x).sites[0].reason)
    assert stages[0] == "profiling: input moments, 256 of 1,024 tokens"
    assert [s.split(":")[1].split(",")[0].strip() for s in stages[::4]][1:] == [
        "hot ranges",
        "residuals at a budget of 0.5",
        "check",
    ]
    report = explain(fast, None, x)
    assert report.sites[0].status == "rewritten"
    found, exact = fast(x), model(x)
    assert not torch.equal(found, exact)
    error = (found - exact).norm() / (exact - x).norm()
    assert 0.2 * report.sites[0].error < error < 3 * report.sites[0].error


@torch.no_grad()
def test_a_target_error_is_searched_for_on_live_calls() -> None:
    """Budgets that lie close to each other are runs of their own."""
    model = Block(ffn())
    settings = Config(method="guarded_fold", target_error=0.15, prefill="rewritten", progress=False)
    fast = compiled(model, config=settings)
    x = inputs(4, 16, seed=99)
    calls = 0
    while explain(fast, None, x).sites[0].status != "rewritten":
        fast(inputs(256, 16, seed=calls))
        calls += 1
        assert calls <= (3 + 8) * TOKENS // 256, "more runs than the search may take"
    assert explain(fast, None, x).sites[0].error < 0.2
    assert not torch.equal(fast(x), model(x))


@torch.no_grad()
def test_where_memory_is_short_the_widths_are_observed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residuals, "MEMORY", 1)
    model, x = Block(ffn()), inputs(4, 16, seed=99)
    fast, stages = compiled(model), list[str]()
    while explain(fast, None, x).sites[0].status != "rewritten":
        serve(fast, TOKENS // 256)
        stages.append(str(explain(fast, None, x).sites[0].reason))
        assert len(stages) < RUNS + 4, stages
    assert sum("residuals" in stage for stage in stages) == 4, "one for each pair of widths"
    assert not torch.equal(fast(x), model(x))


@torch.no_grad()
def test_a_composition_is_fitted_on_live_calls() -> None:
    """Each run of either rewrite is a run of its own."""
    model, x = Block(ffn()), inputs(4, 16, seed=99)
    method = {"ffn": ["drop_bias", "low_rank", "int8_ffn"]}
    fast = compiled(model, config=Config(method=method, prefill="rewritten", budget=0.5, progress=False), tolerance=0.9)
    stages: list[str] = []
    while explain(fast, None, x).sites[0].status != "rewritten":
        serve(fast, TOKENS // 256)
        stages.append(explain(fast, None, x).sites[0].reason)
        assert len(stages) < 8, stages
    assert explain(fast, None, x).sites[0].method == "drop_bias+low_rank+int8_ffn"
    assert not torch.equal(fast(x), model(x))


@torch.no_grad()
def test_a_fit_that_asks_for_the_models_output_goes_on_without_it() -> None:
    """Live calls do not give it: with dynamic precision, both sites count alike."""
    model, x = nn.Sequential(Block(ffn(seed=1)), Block(ffn(seed=2))).eval(), inputs(4, 16, seed=99)
    settings = Config(method="partial_linear", prefill="rewritten", budget=0.6, progress=False)
    fast = compiled(model, config=settings, tolerance=0.9)
    serve(fast, 4 * TOKENS // 256)
    assert [site.method for site in explain(fast, None, x).sites] == ["partial_linear"] * 2
    assert not torch.equal(fast(x), model(x))


@torch.no_grad()
def test_a_site_beyond_the_tolerance_is_never_swapped_in(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(ffn())
    fast = compiled(model, tolerance=1e-4)
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        serve(fast, ENOUGH + 2)
    assert "exceeds the tolerance" in caplog.text
    x = inputs(4, 16, seed=99)
    assert torch.equal(fast(x), model(x))
    (site,) = explain(fast, None, x).sites
    assert site.status == "refused"
    assert "exceeds the tolerance" in site.reason


@torch.no_grad()
def test_all_graphs_of_a_model_add_to_one_profile_and_all_are_swapped() -> None:
    model = Block(ffn())
    fast = compiled(model, prefill="rewritten")
    few = inputs(2, 3, 16)
    for i in range(ENOUGH):
        fast(inputs(255, 16, seed=i))
        fast(inputs(2, 3, 16, seed=1000 + i))
    assert not torch.equal(fast(inputs(255, 16)), model(inputs(255, 16)))
    assert not torch.equal(fast(few), model(few))


@torch.no_grad()
def test_blocks_compiled_one_by_one_are_each_fitted() -> None:
    blocks = nn.Sequential(*(Block(ffn(seed=seed)) for seed in range(3))).eval()
    originals = [lambda x, b=b: b.forward(x) for b in blocks]
    for block in blocks:
        block.compile(
            backend="tardis", options={"config": CONFIG, "inner": "eager", "profile_tokens": TOKENS, "tolerance": 0.5}
        )
    serve(blocks, ENOUGH)
    x = inputs(4, 16, seed=99)
    for block, original in zip(blocks, originals, strict=True):
        found, exact = block(x), original(x)
        assert not torch.equal(found, exact)
        assert (found - exact).norm() < 0.5 * (exact - x).norm()


@torch.no_grad()
def test_a_weight_that_changes_while_it_is_observed_begins_anew() -> None:
    model = Block(ffn())
    fast = compiled(model)
    serve(fast, ENOUGH - 1)
    ffn_of(model).up.weight.mul_(1.5)
    x = inputs(4, 16, seed=99)
    assert torch.equal(serve(fast, 1)[0], serve(model, 1)[0])
    assert "input moments" in explain(fast, None, x).sites[0].reason


@torch.no_grad()
def test_nan_inputs_end_the_profile_and_not_the_service(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(ffn())
    fast = compiled(model)
    bad = torch.full((8, 16), torch.nan)
    assert fast(bad).isnan().all()
    assert "NaN" in caplog.text
    serve(fast, 2)
    assert "NaN" in explain(fast, None, inputs(4, 16)).sites[0].reason


@torch.no_grad()
def test_a_budget_that_cannot_be_met_leaves_the_original(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(ffn())
    fast = compiled(model, config=Config(method="guarded_fold", budget=0.01, progress=False))
    serve(fast, ENOUGH)
    assert "budget" in caplog.text
    assert torch.equal(serve(fast, 1)[0], serve(model, 1)[0])


@torch.no_grad()
def test_a_transformer_decodes_its_way_to_the_rewrite() -> None:
    gpt2 = models.gpt2()
    fast = compiled(gpt2, profile_tokens=256, prefill="original")
    for i in range(40):
        fast(models.tokens(2, 20, seed=i), use_cache=False)
    report = explain(fast, None, models.tokens(1, 4))
    assert [site.status for site in report.sites] == ["rewritten"] * 2
    many, few = models.tokens(2, 20), models.tokens(1, 4)
    torch.testing.assert_close(fast(many, use_cache=False).logits, gpt2(many, use_cache=False).logits)
    assert not torch.equal(fast(few, use_cache=False).logits, gpt2(few, use_cache=False).logits)


def test_calls_in_inference_mode_and_without_gradients_add_up() -> None:
    model = Block(ffn())
    fast = compiled(model)
    for i in range(ENOUGH + 2):
        with torch.inference_mode() if i % 2 else torch.no_grad():
            serve(fast, 1, seed=i)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert not torch.equal(serve(fast, 1)[0], serve(model, 1)[0])


def test_weights_that_cannot_be_guarded_are_left_alone_at_once() -> None:
    with torch.inference_mode():
        model, x = Block(ffn()), inputs(4, 16)
        fast = compiled(model)
        assert torch.equal(fast(x), model(x))
        assert "inference tensors" in explain(fast, None, x).sites[0].reason


@torch.no_grad()
def test_what_cannot_be_rewritten_is_left_alone_from_the_second_call(capfd: pytest.CaptureFixture[str]) -> None:
    llama, tokens = models.llama(), models.tokens(2, 8)
    fast = compiled(llama, config=Config(method="paper"))
    for _ in range(3):
        torch.testing.assert_close(fast(tokens, use_cache=False).logits, llama(tokens, use_cache=False).logits)
    report = explain(fast, None, tokens)
    assert {(s.status, "gated" in s.reason) for s in report.sites} == {("refused", True)}
    assert capfd.readouterr().err == "", "no progress bar while a model serves"


@torch.no_grad()
def test_a_graph_break_leaves_two_graphs_with_a_profile_each() -> None:
    blocks = [Block(ffn(seed=seed)) for seed in range(2)]

    def forward(x: Tensor) -> Tensor:
        x = blocks[0](x)
        torch._dynamo.graph_break()
        return blocks[1](x)  # type: ignore[no-any-return]

    options: Any = {"config": CONFIG, "inner": "eager", "profile_tokens": TOKENS, "tolerance": 0.5}
    fast = torch.compile(forward, backend="tardis", options=options)
    serve(fast, ENOUGH)
    x = inputs(4, 16, seed=99)
    found, middle = fast(x), blocks[0](x)
    assert not torch.equal(found, blocks[1](middle))
    assert (found - blocks[1](middle)).norm() < (blocks[1](middle) - x).norm()
    assert not any(torch.equal(block(x), fast(x)) for block in blocks)


@torch.no_grad()
def test_dynamic_shapes_are_observed_and_swapped() -> None:
    model = Block(ffn())
    options: Any = {"config": CONFIG, "inner": "inductor", "profile_tokens": TOKENS, "tolerance": 0.5}
    fast = torch.compile(model, backend="tardis", dynamic=True, options=options)
    for i in range(ENOUGH):
        fast(inputs(256 + i, 16, seed=i))
    for tokens in (3, 17):
        x = inputs(tokens, 16, seed=7)
        found, exact = fast(x), model(x)
        assert not torch.equal(found, exact)
        assert (found - exact).norm() < 0.5 * (exact - x).norm()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"profile_tokens": 0}, "profile_tokens must be greater than or equal to 1, not 0"),
        ({"profile_tokens": 1.5}, "profile_tokens must be a valid integer, not 1.5"),
        ({"tolerance": 0}, "tolerance must be greater than 0, not 0"),
        ({"tolerance": float("nan")}, "tolerance must be greater than 0, not nan"),
        ({"config": Config(sequential=True)}, "sequential"),
        ({"config": {"budget": 0.2}}, "config must be an instance of Config, not {'budget'"),
    ],
    ids=str,
)
@torch.no_grad()
def test_wrong_options_are_named(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        compiled(Block(ffn()), **options)(inputs(4, 16))
