"""A site stays original where its rewritten form is slower."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import live, release
from builders.compiled import compiled
from builders.counted import blocks, changing_nothing, counted, fast
from builders.ffns import FFN, batches, config, expected, ffn, inputs, planned
from torch import Tensor, fx, nn

import tardis_fx
from tardis_fx import Plan, calibrate, count_touched, explain
from tardis_fx.passes import pipeline, site_timing
from tardis_fx.passes.site_timing import Candidate
from tardis_fx.runtime.cpu import build

FEW, MANY = inputs(1, 16, seed=7), inputs(40, 16, seed=8)
SLOWER, FASTER = (41e-6, 55e-6), (55e-6, 41e-6)


@pytest.fixture(autouse=True)
def rewritten_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides the fixture of all other tests: here sites are timed, and records kept apart."""
    build.load()  # from the usual folder
    monkeypatch.setenv("TARDIS_FX_CACHE", str(tmp_path / "cache"))


class Clock:
    """Takes the place of measured times: those of one FFN, by its number of neurons."""

    def __init__(self) -> None:
        self.times: dict[int, tuple[float, float]] = {}
        self.default = FASTER
        self.timed: list[int] = []  # numbers of neurons

    def __call__(self, sites: Any, values: Any, compile_graph: Any, *, frozen: bool) -> tuple[float, float]:
        (hidden, _) = sites[0].guard.compiled_for.shapes[0]
        self.timed.append(hidden)
        return self.times.get(hidden, self.default)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tardis_fx.passes.selection.seconds_per_site", clock)
    return clock


def records(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("times-*.json"))


@pytest.mark.parametrize(("times", "rewritten"), [(SLOWER, 0), (FASTER, 2), ((41e-6, 41e-6), 2)])
@torch.no_grad()
def test_the_slower_form_does_not_run_and_a_tie_is_rewritten(
    times: tuple[float, float], rewritten: int, clock: Clock
) -> None:
    clock.default, model = times, blocks()
    with counted() as calls:
        torch.testing.assert_close(fast(model, changing_nothing(model))(FEW), model(FEW))
        assert calls() == rewritten
    assert clock.timed == [64]  # both sites at once


@torch.no_grad()
def test_the_output_is_that_of_the_chosen_form(model: FFN, plan: Plan, clock: Clock) -> None:
    torch.testing.assert_close(compiled(model, plan)(FEW), expected(model, plan, FEW))
    torch._dynamo.reset()
    clock.default = SLOWER
    assert torch.equal(compiled(model, plan)(few := inputs(2, 16)), model(few))


@torch.no_grad()
def test_sites_of_one_graph_are_decided_by_their_own_times(clock: Clock) -> None:
    model = nn.Sequential(*blocks(2), *blocks(1, hidden=96)).eval()
    clock.times = {64: SLOWER, 96: FASTER}
    with counted() as calls:
        torch.testing.assert_close(fast(model, changing_nothing(model))(FEW), model(FEW))
        assert calls() == 1
    assert clock.timed == [64, 96]


@torch.no_grad()
def test_explain_and_the_log_name_both_times(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    clock.default, model = SLOWER, blocks()
    plan = changing_nothing(model)
    assert {site.status for site in explain(model, plan, FEW).sites} == {"rewritten"}  # nothing is compiled yet
    fast(model, plan, strict=True)(FEW)  # the times are no reason to refuse
    reason = "the original is faster here: 41.0 µs, rewritten 55.0 µs, for 1 token"
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, f"not rewritten: ffn, ffn: {reason}")
    report = explain(model, plan, MANY)
    assert {(site.status, site.reason, site.method) for site in report.sites} == {("original", reason, "")}
    assert all(site.touched_bytes == site.stored_bytes == site.dense_bytes for site in report.sites)
    assert reason in str(report)
    assert "0 of 2 sites rewritten" in str(report)
    torch.compiler.reset()
    assert {site.status for site in explain(model, plan, FEW).sites} == {"rewritten"}


@torch.no_grad()
def test_explain_names_the_numbers_of_tokens_for_which_a_rewritten_site_is_slower(clock: Clock) -> None:
    clock.default, model = SLOWER, blocks()
    compiled = fast(model, plan := changing_nothing(model), dynamic=False)
    compiled(FEW)
    clock.default = FASTER
    compiled(inputs(4, 16))
    for site in explain(model, plan, FEW).sites:
        assert (site.status, site.method) == ("rewritten", "guarded_fold")
        assert site.reason == "the original is faster here: 41.0 µs, rewritten 55.0 µs, for 1 token"


@torch.no_grad()
def test_always_never_times(clock: Clock, tmp_path: Path) -> None:
    clock.default, model = SLOWER, blocks()
    with counted() as calls:
        fast(model, changing_nothing(model), select="always")(FEW)
        assert calls() == 2
    assert not clock.timed
    assert not records(tmp_path)


@torch.no_grad()
def test_steps_of_many_tokens_are_not_timed(clock: Clock) -> None:
    clock.default, model = SLOWER, blocks()
    with counted() as calls:
        fast(model, changing_nothing(model), prefill="original")(MANY)
        assert calls() == 0
        torch._dynamo.reset()
        fast(model, changing_nothing(model), prefill="rewritten")(MANY)
        assert calls() == 2
        torch._dynamo.reset()
        fast(model, changing_nothing(model), prefill="rewritten", dynamic=True)(inputs(4, 16))  # for any number
        assert calls() == 2
    assert not clock.timed


@torch.no_grad()
def test_released_weights_are_never_timed(clock: Clock) -> None:
    clock.default, model = SLOWER, ffn()
    plan = release.planned(model)
    expected = release.compiled(model, plan, select="always")(FEW)
    tardis_fx.release(model, plan, FEW)
    torch._dynamo.reset()
    assert torch.equal(release.compiled(model, plan)(FEW), expected)
    assert not clock.timed


@torch.no_grad()
def test_without_a_plan_fitted_sites_are_timed(clock: Clock) -> None:
    clock.default, model = SLOWER, ffn()
    compiled = live.compiled(model)
    live.serve(compiled, live.ENOUGH)
    assert not clock.timed
    assert torch.equal(compiled(FEW), model(FEW))
    assert clock.timed == [64]
    (site,) = explain(model, None, FEW).sites
    assert site.status == "original"


# ---- The records


SECOND_PROCESS = """
import sys, torch
from pathlib import Path
from builders.counted import blocks, counted, fast
from builders.ffns import inputs
from tardis_fx import Plan
from tardis_fx.passes import selection

timed = []
selection.seconds_per_site = lambda sites, *_, **__: timed.append(sites) or (1.0, 2.0)
model = blocks()
with counted() as calls, torch.no_grad():
    fast(model, Plan.load(sys.argv[1]))(inputs(1, 16))
    print(len(timed), calls())
"""


@torch.no_grad()
def test_another_process_reuses_the_record(clock: Clock, tmp_path: Path) -> None:
    model = blocks()
    (plan := changing_nothing(model)).save(path := tmp_path / "plan")
    fast(model, plan)(FEW)
    assert clock.timed == [64]
    if (kernel := build.load()) is not None:
        shutil.copy(kernel._name, tmp_path / "cache")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))}
    command = [sys.executable, "-c", SECOND_PROCESS, str(path)]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["0", "2"]
    assert len(records(tmp_path)) == 1


@torch.no_grad()
def test_only_what_no_record_knows_is_timed(clock: Clock, tmp_path: Path) -> None:
    fast(model := blocks(2), changing_nothing(model))(FEW)
    model = nn.Sequential(*blocks(2), *blocks(1, hidden=96)).eval()
    fast(model, plan := changing_nothing(model))(FEW)
    torch._dynamo.reset()
    fast(model, plan)(FEW)
    assert clock.timed == [64, 96]
    assert len(records(tmp_path)) == 2
    torch._dynamo.reset()
    fast(model, plan)(inputs(2, 16))  # other shapes
    assert clock.timed[2:] == [64, 96]


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_text(""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1.0, 2.0]"),
    "other fields": lambda path: path.write_text('{"original": 1.0}'),
    "no number": lambda path: path.write_text('{"original": 1.0, "rewritten": "2"}'),
    "NaN": lambda path: path.write_text('{"original": 1.0, "rewritten": NaN}'),
    "negative": lambda path: path.write_text('{"original": 1.0, "rewritten": -1.0}'),
    "writable by others": writable_by_others,
}


@pytest.mark.parametrize("damage", DAMAGES)
@torch.no_grad()
def test_a_damaged_record_is_ignored_and_written_again(damage: str, clock: Clock, tmp_path: Path) -> None:
    model = blocks()
    plan = changing_nothing(model)
    fast(model, plan)(FEW)
    (path,) = records(tmp_path)
    content = path.read_text()
    assert json.loads(content) == {"original": FASTER[0], "rewritten": FASTER[1]}
    DAMAGES[damage](path)
    for _ in range(2):
        torch._dynamo.reset()
        fast(model, plan)(FEW)
    assert clock.timed == [64, 64]
    assert path.read_text() == content
    assert os.listdir(path.parent) == [path.name]


@torch.no_grad()
def test_without_a_cache_folder_sites_are_timed_after_a_warning(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TARDIS_FX_CACHE", str(tmp_path / "file"))
    clock.default, model = SLOWER, blocks()
    with counted() as calls:
        fast(model, changing_nothing(model))(FEW)
        assert calls() == 0
    assert "TARDIS_FX_CACHE" in caplog.messages[0]


# ---- The timing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_timing, "DURATION", 0.0)


def on_its_site(model: nn.Module, plan: Plan, x: Tensor, observe: Callable[[Candidate], object]) -> None:
    """Shows the site of a model before it is rewritten."""

    seen: list[Candidate] = []

    def select(sites: Sequence[Candidate], values: Sequence[Any]) -> list[bool]:
        seen.extend(sites)
        observe(*sites)
        return [True]

    def backend(gm: fx.GraphModule, values: list[Any]) -> Callable[..., Any]:
        pipeline.apply(gm, values, plan, "rewritten", select)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert len(seen) == 1


@pytest.mark.parametrize("method", ["guarded_fold", "partial_linear", "low_rank"])
@torch.no_grad()
def test_what_is_timed_is_each_form_of_the_site(method: str) -> None:
    model = ffn()
    plan = calibrate(model, batches(d=16), config=config(method=method))
    x = inputs(2, 3, 16)

    def compare(site: Candidate) -> None:
        original, rewritten = site.forms
        torch.testing.assert_close(original(x, *site.weights)[0], model(x))
        expected = site.guard.rewrite.forward(x, site.constants.tensors, plan.rewritten[0])
        torch.testing.assert_close(rewritten(x, *site.constants.tensors.values())[0], expected)

    on_its_site(model, plan, x, compare)


@torch.no_grad()
def test_inputs_read_about_the_bytes_that_the_plan_expects() -> None:
    model = ffn(64, 256)
    plan = calibrate(model, [3 * batch for batch in batches(d=64)], config=config(budget=0.4))

    def count(site: Candidate) -> None:
        (x,) = site_timing._inputs([site])
        with count_touched() as touched:
            site.guard.rewrite.forward(x, site.constants.tensors, site.constants.entry)
        assert touched.per_token == pytest.approx(plan.rewritten[0].touched_bytes, rel=0.25)

    on_its_site(model, plan, inputs(4, 64), count)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_measuring_leaves_nothing_behind_but_the_record(inner: str, freezing: bool, tmp_path: Path) -> None:
    from torch._inductor import config as inductor_config

    model = ffn()
    plan = planned(model, prefill="original")
    expected = {len(x): [model(x), fast(model, plan, select="always", inner="eager")(x)] for x in (FEW, inputs(4, 16))}
    torch._dynamo.reset()
    state, before = torch.get_rng_state(), torch._dynamo.config.get_config_copy()
    with inductor_config.patch(freezing=freezing), count_touched() as touched:
        compiled = fast(model, plan, inner=inner, dynamic=False)
        outputs = [compiled(x) for x in (FEW, inputs(4, 16))]
        with torch.compiler.set_stance("fail_on_recompile"):
            outputs += [compiled(x) for x in (FEW, inputs(4, 16))]
    for output in outputs:
        forms = expected[len(output)]
        assert any(torch.allclose(output, form, rtol=1e-3, atol=1e-3) for form in forms)
    assert touched.tokens in (0, 2, 8, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch._dynamo.config.get_config_copy() == before
    assert len(records(tmp_path)) == 2
    for path in records(tmp_path):
        assert all(0 < seconds < 1 for seconds in json.loads(path.read_text()).values())


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_sites_can_be_timed_under_any_stance(tmp_path: Path) -> None:
    model = ffn()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast(model, planned(model, prefill="original"), inner="inductor")(FEW)
    assert len(records(tmp_path)) == 1


def test_rounds_are_interleaved_and_medians_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    times: Iterator[float] = iter([9.0, 9.0] * 2 + [1.0, 5.0] * 5 + [100.0, 2.0] * 4)
    monkeypatch.setattr(site_timing, "DURATION", 0.0)
    monkeypatch.setattr(site_timing, "_seconds", lambda run, *_: (run(), next(times))[1])
    found = site_timing.medians(lambda: turns.append("a"), lambda: turns.append("b"), lambda: None, torch.device("cpu"))
    assert found == (1.0, 5.0)
    assert turns == ["a", "b"] * 11
