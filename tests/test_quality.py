"""The measures of a rewritten language model's quality."""

import copy
import math
from typing import Any

import pytest
import torch
from builders.models import VOCABULARY, gpt2, tokens
from torch import nn

from tardis_fx.measure.quality import DenseReference, Quality, compare_once
from tardis_fx.statistics.divergence import kl_divergence, logits_of

WINDOWS = tokens(20, 12)


def changed(model: nn.Module) -> nn.Module:
    """The model with other weights in its last layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.02 * torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))  # type: ignore[union-attr, operator]
    return other


@torch.no_grad()
def test_quality_is_that_of_all_windows_at_once() -> None:
    model = gpt2()
    other = changed(model)
    p, q = (form(WINDOWS).logits.double().log_softmax(-1) for form in (model, other))
    losses = [-form[:, :-1].gather(-1, WINDOWS[:, 1:, None]).mean() for form in (p, q)]
    dense, quality = compare_once(model, other, WINDOWS)
    assert dense.perplexity == pytest.approx(losses[0].exp())
    assert quality.perplexity == pytest.approx(losses[1].exp())
    assert quality.rise == pytest.approx(float(losses[1].exp() / losses[0].exp()) - 1, abs=1e-5)
    assert quality.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert quality.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    reference = DenseReference(model, WINDOWS)
    assert (reference.dense, reference.quality(other)) == (dense, quality)


def test_a_model_is_like_itself() -> None:
    model = gpt2()
    dense, same = compare_once(model, model, WINDOWS)
    assert dense == same == Quality(dense.perplexity, 0, 1, 0)


def test_compared_once_only_the_logits_of_one_batch_are_in_memory() -> None:
    model, ran = gpt2(), list[str]()

    def form(name: str) -> Any:
        def run(batch: torch.Tensor, **options: Any) -> Any:
            ran.append(name)
            return model(batch, **options)

        return run

    compare_once(form("dense"), form("rewritten"), WINDOWS)
    assert ran == ["dense", "rewritten"] * 3


def test_the_divergence_of_two_distributions_is_that_of_the_formula() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert float(kl_divergence(q.log() + 3, p.log() - 1)) == pytest.approx(0.25 * math.log(2))


@pytest.mark.parametrize(
    "output", [torch.zeros(3), torch.zeros(2, 3).long(), (torch.zeros(2, 3),), {"loss": torch.zeros(2, 3)}, None]
)
def test_what_has_no_logits_gives_none(output: Any) -> None:
    assert logits_of(output) is None


def test_logits_are_an_item_or_an_attribute_or_the_output_itself() -> None:
    logits = gpt2()(WINDOWS)
    assert logits_of(logits) is logits.logits
    assert logits_of({"logits": logits.logits}) is logits_of(logits.logits) is logits.logits
