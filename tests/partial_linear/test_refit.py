"""Columns, fold and bias that are fitted together to what the neurons add."""

import pytest
import torch
from builders.ffns import ACTIVATIONS, config, ffn, fitted, inputs
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.partial_linear import refit as module
from tardis_fx.partial_linear.candidates import Candidate
from tardis_fx.partial_linear.coding import Coding, CodingObserver
from tardis_fx.partial_linear.precision import Widths
from tardis_fx.partial_linear.refit import Values, refit
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.runtime import tables
from tardis_fx.runtime.rotation import rotate_back
from tardis_fx.testing.ffn import FFN, GatedFFN, gated_ffn
from tardis_fx.testing.observation import SiteObservation, observed

D, HIDDEN = 32, 64


def model_of(*, gated: bool, activation: str = "gelu", hidden: int = HIDDEN) -> FFN | GatedFFN:
    return (gated_ffn if gated else ffn)(D, hidden, activation)


@pytest.fixture(autouse=True)
def all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token that is kept is used, as for regressions of many terms."""
    monkeypatch.setattr(module, "PER_TERM", 10**6)


def coding_of(model: FFN | GatedFFN, tokens: int = 2048) -> Coding:
    site = observed(model)
    observer = CodingObserver(site)
    observer.update(inputs(tokens, D, seed=3))
    return Coding.from_observer(site, observer)


def refitted(coding: Coding, columns: Tensor, values: Values, *, fold: bool) -> Values:
    """The output of a site after a refit in codes of 8 bits, as a function of tokens."""
    tensors, bias = refit(coding, Widths(8, 8, 8, 8, 8 * fold), columns, torch.zeros(D, dtype=torch.float32), values)
    coded = sum(tables.weights(tensors[name], 8, D) for name in ("columns", "columns_refinement"))
    columns = rotate_back(torch.as_tensor(coded), coding.out_signs)
    assert ("fold" in tensors) == fold
    if not fold:
        return lambda x: values(x) @ columns + bias
    matrix = rotate_back(rotate_back(tables.weights(tensors["fold"], 8, D), coding.signs).T, coding.out_signs)
    return lambda x: values(x) @ columns + x @ matrix + bias


def miss(coding: Coding, output: Values) -> float:
    """Root-mean-square error of outputs for new tokens, relative to the exact ones."""
    x = inputs(1024, D, seed=4)
    exact = coding.outputs(x)
    return float((output(x) - exact).norm() / exact.norm())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_from_exact_values_the_columns_of_down_and_its_bias_are_found_again(gated: bool, fold: bool) -> None:
    coding = coding_of(model_of(gated=gated))
    neurons = coding.neurons
    wrong = neurons.down.T + 0.1 * inputs(HIDDEN, D, seed=5) * neurons.down.std()
    output = refitted(coding, wrong, lambda x: neurons.evaluate(x)[1], fold=fold)
    assert miss(coding, lambda x: neurons.evaluate(x)[1] @ wrong) > 0.08
    assert miss(coding, output) < 0.02


def test_without_values_the_fold_is_the_regression_of_the_output() -> None:
    coding = coding_of(model_of(gated=False))
    output = refitted(coding, coding.neurons.down.T, lambda x: torch.zeros(len(x), HIDDEN, dtype=x.dtype), fold=True)
    x = torch.cat([coding.tokens, torch.ones_like(coding.tokens[:, :1])], 1)
    solved = torch.linalg.lstsq(x, coding.outputs(coding.tokens)).solution
    best = miss(coding, lambda x: x @ solved[:-1] + solved[-1])
    assert miss(coding, output) == pytest.approx(best, rel=0.01)


@settings(max_examples=examples(8))
@given(st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.integers(1, HIDDEN))
def test_columns_stand_in_for_the_neurons_that_add_nothing(activation: str, gated: bool, fold: bool, read: int) -> None:
    coding = coding_of(model_of(gated=gated, activation=activation))
    neurons = coding.neurons

    def values(x: Tensor) -> Tensor:
        response = neurons.evaluate(x)[1]
        return torch.where(torch.arange(HIDDEN, dtype=torch.int64) < read, response, 0)

    output = refitted(coding, neurons.down.T, values, fold=fold)
    x, exact = coding.tokens, coding.outputs(coding.tokens)
    terms = torch.cat([values(x)[:, :read], torch.ones_like(x[:, :1]), *[x] * fold], 1)
    best = exact - terms @ torch.linalg.lstsq(terms, exact).solution
    assert float((exact - output(x)).norm()) <= 1.05 * float(best.norm()) + 0.02 * float(exact.norm())


@pytest.mark.parametrize("gated", [False, True])
def test_few_tokens_move_the_columns_little(gated: bool) -> None:
    coding = coding_of(model_of(gated=gated, hidden=256), tokens=64)
    neurons = coding.neurons

    def values(x: Tensor) -> Tensor:
        response = neurons.evaluate(x)[1]
        return torch.where(response.abs() > response.abs().median(), response, 0)

    own = neurons.down.T
    output = refitted(coding, own, values, fold=False)
    assert miss(coding, output) < 1.1 * miss(coding, lambda x: neurons.output(values(x)))


def together() -> list[Tensor]:
    """Inputs of which a few directions hold most, so that neurons fire together."""
    mixing = inputs(6, D, seed=1)
    return [3 * inputs(512, 6, seed=10 + i) @ mixing / D**0.5 + 0.2 * inputs(512, D, seed=20 + i) for i in range(4)]


@settings(max_examples=examples(6))
@given(st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from([0.15, 0.25]))
def test_a_plan_misses_less_and_nothing_else_changes(activation: str, gated: bool, budget: float) -> None:
    observation = SiteObservation([model_of(gated=gated, activation=activation, hidden=128)], together())
    chosen = config(method="partial_linear", budget=budget)
    (plan,) = fitted(observation, PartialLinear(), chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidate, "refitted", lambda self: self)
        (own,) = fitted(observation, PartialLinear(), chosen)
    assert plan.error < own.error
    assert (plan.touched_bytes, plan.stored_bytes, plan.settings) == (own.touched_bytes, own.stored_bytes, own.settings)
    for name, tensor in own.tensors.items():
        if name not in ("columns", "columns_refinement", "fold", "bias"):
            assert torch.equal(plan.tensors[name], tensor), name
