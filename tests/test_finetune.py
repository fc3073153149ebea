"""Training the weights of rewritten FFNs on a task."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import Block, Broken, batches, config, entries, ffn, inputs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from tardis_fx import CalibrationError, ConfigError, Plan, calibrate, finetune
from tardis_fx.explain import Report
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.testing import assert_equivalent, assert_plan_roundtrip

D, CLASSES = 16, 3


class Classifier(nn.Sequential):
    """A block and a head; its loss is the cross-entropy where labels are given."""

    def __init__(self) -> None:
        super().__init__(Block(ffn(D, 64), D), Block(ffn(D, 64, seed=1), D), nn.Linear(D, CLASSES))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


def loss(output: Tensor, batch: Any) -> Tensor:
    """Labels by what the dense model says."""
    with torch.no_grad():
        wanted = model()(batch)
    return F.cross_entropy(output, (wanted * 20).softmax(-1))


@cache
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


@cache
def plan() -> Plan:
    return replace(calibrate(model(), batches(d=D), config=config(method="ffsplit", budget=0.4)), kl=0.1)


@cache
def trained() -> Plan:
    return finetune(model(), plan(), batches(8, 64, d=D), loss=loss, epochs=4, learning_rate=1e-2, progress=False)


@torch.no_grad()
def test_the_task_is_done_better_on_inputs_never_seen() -> None:
    x = inputs(400, D, seed=7)
    before, after = (float(loss(compiled(copy.deepcopy(model()), p)(x), x)) for p in (plan(), trained()))
    dense = float(loss(model()(x), x))
    assert after - dense < 0.7 * (before - dense)


def test_nothing_but_the_split_weights_changes() -> None:
    untouched = copy.deepcopy(model())
    assert trained().kl is None, "its divergence was that of other weights"
    assert all(map(torch.equal, model().state_dict().values(), untouched.state_dict().values()))
    assert all(parameter.requires_grad for parameter in model().parameters())
    for before, after in zip(entries(plan()), entries(trained()), strict=True):
        assert (after.method, after.settings) == ("ffsplit+finetuned", {"inner": before.settings})
        assert (after.fingerprint, after.touched_bytes) == (before.fingerprint, before.touched_bytes)
        assert set(after.tensors) == {
            "up",
            "down",
            "up_bias",
            "up_bias_rest",
            "down_bias",
            "up_a",
            "up_b",
            "down_a",
            "down_b",
        }
        assert 0 < after.error != before.error
    assert "ffsplit+finetuned" in str(Report.from_plan(trained()))


@torch.no_grad()
def test_the_plan_comes_back_from_its_file_and_compiles() -> None:
    def first(plan: Plan, x: Tensor) -> Tensor:
        entry = plan.rewritten[0]
        return rewrite_named(str(entry.method)).forward(x, dict(entry.tensors), entry)

    x, block = inputs(5, D), model()[0]
    assert isinstance(block, Block)
    assert_plan_roundtrip(trained(), lambda plan: first(plan, x))
    found = compiled(block, Plan(trained().rewritten[:1], plan().config))(x)
    assert_equivalent(found, x + first(trained(), block.norm(x)))


def test_no_training_gives_the_plan_back() -> None:
    """At a rate that makes everything worse."""
    found = finetune(model(), plan(), batches(2, 64, d=D), loss=loss, epochs=1, learning_rate=0.99, progress=False)
    assert found is plan()


def test_a_fine_tuned_plan_is_trained_on_from_where_it_is() -> None:
    x = batches(8, 64, d=D)
    again = finetune(model(), trained(), x, loss=loss, epochs=2, learning_rate=1e-3, progress=False)
    with torch.no_grad():
        first, second = (float(loss(compiled(copy.deepcopy(model()), p)(x[-1]), x[-1])) for p in (trained(), again))
    assert second < first, "on the batch that was held back"
    for before, after in zip(entries(trained()), entries(again), strict=True):
        assert (after.method, after.settings) == ("ffsplit+finetuned", before.settings)
        assert (after.touched_bytes, after.stored_bytes) == (before.touched_bytes, before.stored_bytes)
        assert {n: t.shape for n, t in after.tensors.items()} == {n: t.shape for n, t in before.tensors.items()}
        assert not torch.equal(after.tensors["up"], before.tensors["up"])


@pytest.mark.parametrize("method", ["wanda", "guarded_fold"])
def test_what_is_not_made_of_dense_weights_is_refused(method: str) -> None:
    other = calibrate(model(), batches(d=D), config=config(method=method, budget=0.6))
    with pytest.raises(ConfigError, match="not all weights of dense layers"):
        finetune(model(), other, batches(2, 64, d=D), loss=loss, progress=False)


def test_calibration_does_not_train() -> None:
    with pytest.raises(ConfigError, match=r"give a plan without it to tardis_fx\.finetune"):
        calibrate(model(), batches(d=D), config=config(method=["ffsplit", "finetuned"]))


@pytest.mark.parametrize(
    ("changed", "kind", "why"),
    [
        ({"epochs": 0}, ConfigError, "epochs must be"),
        ({"learning_rate": 2}, ConfigError, "learning_rate must lie"),
        ({"batches": [inputs(4, D)]}, CalibrationError, "two batches"),
        ({"loss": None}, CalibrationError, "has no loss"),
        ({"loss": lambda output, _: output}, CalibrationError, "finite scalar"),
        ({"loss": lambda output, _: output.sum() / 0}, CalibrationError, "finite scalar"),
        ({"loss": lambda output, _: output.detach().sum()}, CalibrationError, "no gradient"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], kind: type[Exception], why: str) -> None:
    given: Any = {"batches": batches(2, 64, d=D), "loss": loss, "progress": False} | changed
    with pytest.raises(kind, match=why):
        finetune(model(), plan(), **given)


class Branching(nn.Module):
    """Its second block is for long inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(ffn(D, 64), D), Block(ffn(D, 64, seed=1), D)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if len(x) > 32 else x


def branching(training: list[int], tuning: list[int], method: Any = "ffsplit") -> tuple[Plan, Plan]:
    """A plan of both blocks, before and after training on inputs of certain lengths."""
    given = [inputs(tokens, D, seed=i) for i, tokens in enumerate(training + tuning)]
    assert max(1, len(given) // 8) == len(tuning)
    model_ = Branching()
    before = calibrate(model_, batches(d=D), config=config(method=method, budget=0.5))
    return before, finetune(
        model_, before, given, loss=lambda output, _: output.square().mean(), epochs=1, progress=False
    )


def test_a_site_that_only_later_batches_reach_is_trained() -> None:
    before, after = branching([16] * 8 + [48] * 6, [16, 48])
    assert [site.method for site in after.sites] == ["ffsplit+finetuned"] * 2
    for old, new in zip(entries(before), entries(after), strict=True):
        assert not torch.equal(new.tensors["up_a"], old.tensors["up_a"])
        assert 0 < new.error != old.error


def test_a_site_that_cannot_be_trained_is_refused_where_only_later_batches_reach_it() -> None:
    with pytest.raises(ConfigError, match=r"second.* not all weights of dense layers"):
        branching([16, 48], [16], {"first*": "ffsplit", "second*": "wanda"})


@pytest.mark.parametrize(("training", "tuning"), [(16, 16), (48, 16), (16, 48)])
def test_a_site_that_training_or_evaluation_does_not_reach_stays_as_it_is(
    training: int, tuning: int, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = branching([16, training], [tuning])
    assert after.sites[0].method == "ffsplit+finetuned"
    assert after.sites[1] is before.sites[1]
    assert "the plan's entries of second" in caplog.text


def test_a_plan_whose_sites_no_batch_reaches_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no site can be fine-tuned, second"):
        branching([16, 16], [16], {"first*": None, "second*": "ffsplit"})


class Labelled(nn.Module):
    """Takes labels, and returns the loss with them, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.eval()

    def forward(self, x: Tensor, labels: Tensor) -> ImageClassifierOutput:
        logits = self.inner(x)
        return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def squares(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def test_blocks_that_share_a_graph_are_trained_as_those_that_do_not() -> None:
    blocks: list[nn.Module] = [Block(ffn(D, 64, seed=i), D) for i in range(4)]
    blocks.append(blocks[0])  # runs twice
    plain = nn.Sequential(*blocks).eval()
    before = calibrate(plain, batches(d=D), config=config(method="ffsplit", budget=0.4))
    found, expected = (
        finetune(m, before, batches(3, 32, d=D), loss=squares, epochs=1, progress=False)
        for m in (Broken(blocks), plain)
    )
    assert [site.method for site in found.sites] == ["ffsplit+finetuned"] * 4
    for old, new, same in zip(entries(before), entries(found), entries(expected), strict=True):
        assert not torch.equal(new.tensors["up_a"], old.tensors["up_a"])
        torch.testing.assert_close(dict(new.tensors), dict(same.tensors))
        assert new.error == pytest.approx(same.error)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    """Nor that batches and labels were made in it, which autograd would refuse to keep."""
    labelled, planned = Labelled(), plan()

    def trained_once() -> Plan:
        given = [{"x": inputs(32, D, seed=i), "labels": torch.arange(32) % CLASSES} for i in range(3)]
        return finetune(labelled, planned, given, epochs=1, progress=False)

    expected = trained_once()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = trained_once()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert [site.method for site in found.sites] == ["ffsplit+finetuned"] * 2
    for one, other in zip(entries(found), entries(expected), strict=True):
        assert not any(t.is_inference() or t.requires_grad for t in one.tensors.values())
        torch.testing.assert_close(dict(one.tensors), dict(other.tensors))
