"""What happens to a service without a plan: useless warm-ups, errors, interruptions, threads."""

import logging
import threading
from typing import Any

import pytest
import torch
from builders.ffns import Block, ffn, inputs
from builders.live import ENOUGH, RUNS, compiled, serve
from torch import Tensor, nn

from tardis_fx import explain
from tardis_fx.guarded_fold.draft import Draft
from tardis_fx.guarded_fold.histogram import Histogram
from tardis_fx.live.arrivals import PATIENCE, Repeats
from tardis_fx.passes import guarded_fold
from tardis_fx.passes.guarded_fold import GuardedFold


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

    monkeypatch.setattr(guarded_fold, "Histogram", broken)
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

    monkeypatch.setattr(guarded_fold, "Histogram", interrupted)
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
    fit = GuardedFold._fitted

    def counted(self: GuardedFold, *given: Any) -> Any:
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
        patch.setattr(GuardedFold, "_fitted", counted)
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
        serve(fast, ENOUGH, seed=9999)  # calls of other threads during the fit are not observed
        assert not torch.equal(fast(x), model(x))


def test_a_repeat_is_a_direction_seen_before() -> None:
    x = inputs(200, 16)
    repeats = Repeats(16)
    assert len(repeats.dropped(torch.cat([x, 3 * x]))) == 200
    assert len(repeats.dropped(x * (1 + 1e-6))) < 10
    assert len(repeats.dropped(torch.zeros(5, 16))) == 1
    assert len(repeats.dropped(inputs(200, 16, seed=5))) == 200
    assert len(Repeats(16).dropped(torch.ones(64, 16) + 1e-6 * inputs(64, 16))) < 4
