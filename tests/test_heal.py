import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import models
from builders.compiled import compiled
from builders.ffns import Block, Broken, batches, entries, ffn, planned
from builders.healing import TEXT, Language, healed, language_plan, same
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from tardis_fx import (
    CalibrationError,
    Plan,
    count_touched,
)
from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing import training
from tardis_fx.healing.evaluation import Evaluation
from tardis_fx.healing.student import Student
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.planning import refused
from tardis_fx.runtime.packing import low_bits, row_bytes
from tardis_fx.statistics.divergence import divergence


@torch.no_grad()
def loss(model: nn.Module, plan: Plan, given: list[Tensor]) -> float:
    torch._dynamo.reset()
    run = compiled(model, plan)
    return sum(float(divergence(run(batch), model(batch), batch)) for batch in given) / len(given)


def test_the_loss_leaves_padding_out() -> None:
    logits, dense = torch.randn(2, 2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    output = CausalLMOutput(logits=logits), CausalLMOutput(logits=dense)
    masked = divergence(*output, {"input_ids": mask, "attention_mask": mask})
    logits[mask == 0] = 1e3 * torch.arange(7.0)
    assert divergence(*output, {"input_ids": mask, "attention_mask": mask}) == masked
    assert divergence(*output, {"input_ids": mask}) > 10 * masked


def test_logits_may_be_an_item() -> None:
    logits, dense = torch.randn(2, 2, 5, 7)
    moved, original = ({"hidden": torch.zeros(2, 5, 3), "logits": given} for given in (logits, dense))
    wanted = divergence(CausalLMOutput(logits=logits), CausalLMOutput(logits=dense), {})
    assert divergence(moved, original, {}) == wanted > 0


@dataclass(frozen=True)
class Case:
    """A model, its plan, and the plan healed."""

    model: nn.Module
    plan: Plan
    better: Plan


@pytest.fixture(scope="module", params=list(itertools.product([16, 4, None], ["plain", "gated"])), ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    bits, kind = request.param
    model, plan = Language(kind), language_plan(bits, kind=kind)
    return Case(model, plan, healed(model, plan, learning_rate=1e-2 if bits else 5e-2))


@pytest.fixture(scope="module")
def paper() -> Case:
    """A model without logits, and a plan that is easily bettered."""
    model = nn.Sequential(Block(ffn(seed=1)), Block(ffn(seed=2))).eval()
    plan = planned(model, budget=0.45, method="paper")
    return Case(model, plan, healed(model, plan, batches(), learning_rate=3e-2))


# ---- What healing does


def test_a_healed_plan_is_closer_to_the_dense_model(case: Case) -> None:
    fresh = [models.tokens(4, 32, seed=100 + i) for i in range(4)]
    for given in (TEXT[-1:], fresh):
        assert loss(case.model, case.better, given) < 0.98 * loss(case.model, case.plan, given)


def test_a_healed_plan_reads_no_more_bytes(case: Case) -> None:
    assert case.better.touched_fraction <= case.plan.touched_fraction * (1 + 1e-5)
    read = []
    for plan in (case.plan, case.better):
        torch._dynamo.reset()
        with torch.no_grad(), count_touched() as touched:
            compiled(case.model, plan)(TEXT[-1])
        read.append(touched.per_token)
    assert read[1] <= read[0] * (1 + 1e-2)


def test_the_outlier_rate_and_the_bytes_tell_the_same(case: Case) -> None:
    if case.plan.rewritten[0].method == "partial_linear":
        pytest.skip("neurons read more than one part")
    for old, new in zip(entries(case.plan), entries(case.better), strict=True):
        bits, (hidden, d) = old.settings["row_bits"], old.shapes[0]
        projections, beside = (2, 16 + 8) if old.kind == "gated" else (1, 12 + 4)
        whole = bits == 16
        row = beside + (d * 4 if whole else row_bytes(d, bits, 64))
        row += projections * (d * 4 if whole else row_bytes(d, low_bits(2, bits), 64))
        more = new.outlier_rate - old.outlier_rate
        assert new.touched_bytes - old.touched_bytes == pytest.approx(row * hidden * more)


def test_a_model_without_logits_is_healed_by_its_output_and_so_is_the_papers_recipe(paper: Case) -> None:
    given = batches()[-1:]
    assert loss(paper.model, paper.better, given) < 0.98 * loss(paper.model, paper.plan, given)


def test_the_error_is_that_of_the_healed_site(paper: Case) -> None:
    block, x = paper.model[0], batches()[-1]  # type: ignore[index]
    weights = SiteWeights(*(parameter.detach() for parameter in block.ffn.parameters()))
    entry, rewrite = paper.better.rewritten[0], rewrite_named("paper")
    with torch.no_grad():
        entering = block.norm(x)
        expected = block.ffn(entering)
        missed = rewrite.forward(entering, rewrite.constants(entry, weights), entry) - expected
    assert entry.error == pytest.approx(float(missed.norm() / expected.norm()), rel=1e-3)
    assert entry.error != paper.plan.sites[0].error


@pytest.mark.parametrize("learning_rate", [1e-6, 0.9])
def test_the_loss_on_the_tuning_split_is_never_worse_than_before(learning_rate: float) -> None:
    model = Language()
    plan = language_plan()
    better = healed(model, plan, learning_rate=learning_rate, steps=20)
    assert loss(model, better, TEXT[-1:]) <= loss(model, plan, TEXT[-1:]) * (1 + 1e-5)


def test_where_nothing_gets_better_it_stops_early_and_the_plan_stays_as_it_was(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def worse(evaluation: Evaluation) -> float:
        asked.append(evaluation.before + 1)
        return asked[-1]

    monkeypatch.setattr(Evaluation, "__call__", worse)
    monkeypatch.setattr(training, "INTERVAL", 2)
    model = Language()
    plan = language_plan()
    assert healed(model, plan, steps=1000) is plan
    assert len(asked) == 5
    assert "did not improve" in caplog.text


def test_the_tuning_split_is_the_last_eighth_and_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[int] = set()
    tuned: set[int] = set()

    def record(self: Student, batch: Tensor, *, gradients: bool = False) -> Any:
        (trained if gradients else tuned).add(int(batch[0, 0]))
        return self._capture(batch, gradients=gradients)

    monkeypatch.setattr(Student, "__call__", record)
    model = Language()
    given = [torch.full((1, 32), i) for i in range(16)]
    healed(model, language_plan(), given, steps=20)
    assert trained == set(range(14))
    assert tuned == {14, 15}


# ---- Graphs that several blocks share


def test_blocks_that_share_a_graph_are_healed_as_those_that_do_not() -> None:
    blocks: list[nn.Module] = [Block(ffn(seed=i)) for i in range(4)]
    blocks.append(blocks[0])  # runs twice
    given = batches(3, 64)
    plain = nn.Sequential(*blocks).eval()
    plan = planned(plain)
    found, expected = (healed(model, plan, given, steps=4) for model in (Broken(blocks), plain))
    assert len(found.sites) == 4
    assert same(found, expected)
    for old, new in zip(entries(plan), entries(found), strict=True):
        assert not torch.equal(old.tensors["folded_weight"], new.tensors["folded_weight"])
        assert 0 < new.error != old.error


def test_a_batch_that_is_the_first_to_reach_a_block_is_refused() -> None:
    model = Broken([Block(ffn(seed=i)) for i in range(2)])
    plan = planned(model)
    given = [{"x": batches(1)[0]}, {"x": batches(1)[0], "first": 1}]
    with pytest.raises(CalibrationError, match=r"first to reach blocks\.1\.ffn: every batch must run every site"):
        healed(model, plan, given)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    model = nn.Sequential(Block(ffn(seed=1))).eval()
    plan = planned(model)
    expected = healed(model, plan, batches(3, 64), steps=4)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = healed(model, plan, batches(3, 64), steps=4)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert same(found, expected)
    assert not any(t.is_inference() or t.requires_grad for site in entries(found) for t in site.tensors.values())


def test_a_model_made_in_inference_mode_is_refused_and_one_of_its_parameters_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(Block(ffn(seed=1))).eval()
    with pytest.raises(CalibrationError, match=r"0\.norm\.weight was made under torch\.inference_mode"):
        healed(model, planned(nn.Sequential(Block(ffn(seed=1))).eval()), batches(3, 64))


# ---- What it leaves alone


def test_model_plan_and_batches_are_left_as_they_were() -> None:
    model = Language()
    model.head.requires_grad_(False)
    plan = language_plan(4)
    tensors = copy.deepcopy([dict(site.tensors) for site in entries(plan)])
    state = [(n, p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    weights, given = copy.deepcopy(model.state_dict()), copy.deepcopy(TEXT)
    with torch.no_grad():
        output = model(TEXT[0]).logits
    better = healed(model, plan)
    assert better is not plan
    assert [(n, p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()] == state
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(TEXT[0]).logits, output)
    assert all(torch.equal(a, b) for a, b in zip(TEXT, given, strict=True))
    for site, before in zip(entries(plan), tensors, strict=True):
        assert all(torch.equal(t, before[name]) for name, t in site.tensors.items())
    for old, new in zip(entries(plan), entries(better), strict=True):
        for name in ("fingerprint", "settings", "method", "stored_bytes", "dense_bytes"):
            assert getattr(old, name) == getattr(new, name)


def test_a_healed_plan_saves_loads_and_compiles(tmp_path: Path, case: Case) -> None:
    case.better.save(tmp_path / "healed.plan")
    loaded = Plan.load(tmp_path / "healed.plan")
    assert same(case.better, loaded)
    with torch.no_grad():
        assert torch.equal(
            compiled(case.model, loaded)(TEXT[0]).logits, compiled(case.model, case.better)(TEXT[0]).logits
        )


def test_a_model_in_half_precision_gets_tensors_of_its_own_dtype() -> None:
    model, plan = Language().bfloat16(), language_plan(dtype=torch.bfloat16)
    better = healed(model, plan, steps=20)
    assert better is not plan
    for old, new in zip(entries(plan), entries(better), strict=True):
        assert {name: t.dtype for name, t in old.tensors.items()} == {name: t.dtype for name, t in new.tensors.items()}
    assert loss(model, better, TEXT[-1:]) < loss(model, plan, TEXT[-1:])


def test_a_refused_site_is_left_as_it_is(paper: Case) -> None:
    observed = BatchObservation(paper.model, batches(), progress=False).sites[0]
    partly = Plan((refused(observed, "not wanted"), paper.plan.sites[1]), paper.plan.config)
    better = healed(paper.model, partly, batches(), learning_rate=3e-2)
    assert better.sites[0] is partly.sites[0]
    assert better.sites[1] is not partly.sites[1]


def test_inputs_may_differ_in_shape() -> None:
    plan, given = language_plan(), [models.tokens(2, 20 + i, seed=i) for i in range(3)]
    assert len(healed(Language(), plan, given, steps=4).sites) == len(plan.sites)
