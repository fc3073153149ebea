"""torch.compile with no plan: observed, fitted, checked and swapped in while the model serves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, ffn, ffn_of, inputs
from torch import Tensor, nn

from tardis_fx import Config, ConfigError, explain
from tardis_fx.live.arrivals import PATIENCE, Repeats
from tardis_fx.partial_linear import residuals
from tardis_fx.partial_linear.draft import Draft
from tardis_fx.partial_linear.histogram import Histogram
from tardis_fx.passes import partial_linear
from tardis_fx.passes.partial_linear import PartialLinear

TOKENS = 1024
CONFIG = Config(budget=0.5, prefill="rewritten", progress=False)


def compiled(model: Any, **options: Any) -> Any:
    given: Any = {"config": CONFIG, "inner": "eager", "profile_tokens": TOKENS, "tolerance": 0.5} | options
    return torch.compile(model, backend="tardis", options=given, fullgraph=True)


def serve(model: Callable[..., Any], calls: int, tokens: int = 256, seed: int = 0) -> list[Tensor]:
    return [model(inputs(tokens, 16, seed=seed + i)) for i in range(calls)]


RUNS = 4  # input moments, hot ranges, residuals, check
ENOUGH = RUNS * TOKENS // 256


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
    fast = compiled(model, config=Config(target_error=0.15, prefill="rewritten", progress=False))
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
    fast = compiled(model, config=Config(budget=0.01, progress=False))
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


# ---- What people do to a service


@torch.no_grad()
@pytest.mark.parametrize("warm_up", ["constants", "one batch", "zeros"])
def test_a_warm_up_that_says_nothing_is_survived(warm_up: str) -> None:
    model, x = Block(ffn()), inputs(64, 16, seed=7)
    given = {"constants": torch.ones_like(x), "one batch": x, "zeros": torch.zeros_like(x)}[warm_up]
    # Behind the norm of a block all constants are zero: the FFN itself is compiled.
    fast = compiled(model.ffn)
    for _ in range(3 * ENOUGH):
        assert torch.equal(fast(given), model.ffn(given)), "nothing is fitted to it"
    serve(fast, ENOUGH)
    fresh = inputs(256, 16, seed=99)
    found, exact = fast(fresh), model.ffn(fresh)
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < 0.5 * exact.norm()


@torch.no_grad()
def test_a_site_that_repeats_its_inputs_does_not_hold_up_the_others() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.ffn = ffn(seed=1), ffn(seed=2)

        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            return self.ffn(x) + self.steps(step)  # type: ignore[no-any-return]

    model = Both().eval()
    fast, step = compiled(model, profile_tokens=256), inputs(512, 16, seed=3)[:1].expand(512, 16).clone()
    for i in range(PATIENCE + RUNS):
        fast(inputs(512, 16, seed=i), step)
    report = explain(fast, None, {"x": inputs(512, 16), "step": step})
    status = {site.name: (site.status, str(site.reason)) for site in report.sites}
    assert status["ffn"][0] == "rewritten"
    assert "its inputs repeat" in status["steps"][1]


@torch.no_grad()
@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("a bug"),
        MemoryError("no memory"),
        torch.linalg.LinAlgError("singular"),  # type: ignore[attr-defined]  # PyTorch does not declare it
    ],
)
def test_any_error_of_a_fit_ends_the_profile_and_not_the_service(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fits: list[int] = []

    def broken(*_: object) -> None:
        fits.append(1)
        raise error

    monkeypatch.setattr(partial_linear, "Histogram", broken)
    model = Block(ffn())
    fast = compiled(model)
    for i in range(2 * ENOUGH):
        given = inputs(256, 16, seed=i)
        assert torch.equal(fast(given), model(given))
    assert len(fits) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(error) in record.message
    assert type(error).__name__ in str(explain(fast, None, inputs(4, 16)).sites[0].reason)


@torch.no_grad()
def test_a_fit_that_is_interrupted_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupted(draft: Draft) -> Histogram:
        if interrupts:
            raise interrupts.pop()
        return Histogram(draft)

    monkeypatch.setattr(partial_linear, "Histogram", interrupted)
    model, x = Block(ffn()), inputs(4, 16, seed=99)
    fast = compiled(model)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            serve(fast, ENOUGH)
    serve(fast, ENOUGH)
    assert explain(fast, None, x).sites[0].status == "rewritten"
    assert not torch.equal(fast(x), model(x))


@torch.no_grad()
def test_a_call_that_fails_is_not_observed() -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn()

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return self.ffn(x)[rows]  # type: ignore[no-any-return]

    model, x = Checking().eval(), inputs(4, 16, seed=99)
    fast, rows = compiled(model), torch.arange(4)
    for i in range(ENOUGH):
        with pytest.raises(IndexError):
            fast(inputs(256, 16, seed=i), rows + 1000)
    assert "256" not in str(explain(fast, None, {"x": x, "rows": rows}).sites[0].reason)
    for i in range(ENOUGH):
        fast(inputs(256, 16, seed=i), rows)
    assert explain(fast, None, {"x": x, "rows": rows}).sites[0].status == "rewritten"


def test_threads_that_call_one_model_get_right_answers_and_in_the_end_the_rewrite() -> None:
    model, faults, wrong = Block(ffn()), list[str](), list[float]()
    fast = compiled(model)
    fits: list[int] = []
    fit = PartialLinear._fitted

    def counted(self: PartialLinear, *given: Any) -> Any:
        fits.append(threading.get_ident())
        return fit(self, *given)

    def work(thread: int) -> None:
        try:
            with torch.no_grad():
                for i in range(6 * ENOUGH):
                    x = inputs(1 + (37 * i + thread) % 200, 16, seed=1000 * thread + i)
                    wrong.append(float((fast(x) - model(x)).norm() / (model(x) - x).norm()))
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialLinear, "_fitted", counted)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults
    assert max(wrong) < 0.6
    assert len(fits) == 4, "one fit, at four pairs of widths"
    assert len(set(fits)) == 1
    x = inputs(64, 16, seed=99)
    with torch.no_grad():
        assert not torch.equal(fast(x), model(x))


def test_a_repeat_is_a_direction_seen_before() -> None:
    x = inputs(200, 16)
    repeats = Repeats(16)
    assert len(repeats.dropped(torch.cat([x, 3 * x]))) == 200
    assert len(repeats.dropped(x * (1 + 1e-6))) < 10
    assert len(repeats.dropped(torch.zeros(5, 16))) == 1
    assert len(repeats.dropped(inputs(200, 16, seed=5))) == 200
    assert len(Repeats(16).dropped(torch.ones(64, 16) + 1e-6 * inputs(64, 16))) < 4


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"profile_tokens": 0}, "profile_tokens must be positive"),
        ({"profile_tokens": 1.5}, "profile_tokens must be a number of tokens"),
        ({"tolerance": 0}, "tolerance must be a positive relative error"),
        ({"tolerance": float("nan")}, "tolerance must be a positive"),
        ({"config": Config(sequential=True)}, "sequential"),
        ({"config": {"budget": 0.2}}, "config must be a tardis_fx.Config, not dict"),
    ],
    ids=str,
)
@torch.no_grad()
def test_wrong_options_are_named(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        compiled(Block(ffn()), **options)(inputs(4, 16))
