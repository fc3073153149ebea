import numpy as np
import torch
from builders.activations import largest_error
from builders.ffns import Oracle, classes, oracles
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.passes.guarded_fold import GuardedFold

BOUNDARY = 1e-4  # relative: sums in float32, and the kernel's inputs in 16 bits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=BOUNDARY, atol=BOUNDARY * max(1.0, b.abs().max().item() if b.numel() else 0))


@given(oracles(), st.data())
def test_guarding_every_neuron_with_no_hot_range_gives_the_original(oracle: Oracle, data: st.DataObject) -> None:
    never = torch.full_like(oracle.lower, torch.inf)
    cold = Oracle(
        oracle.weights, oracle.x, oracle.activation, oracle.codes, never, -never, oracle.slope, oracle.intercept
    )
    hidden = len(oracle.lower)
    close(cold.rewritten(data.draw(st.permutations(range(hidden))), []), oracle.dense())


@given(oracles(), st.data())
def test_computing_every_neuron_always_gives_the_original(oracle: Oracle, data: st.DataObject) -> None:
    close(oracle.rewritten([], data.draw(st.permutations(range(len(oracle.lower))))), oracle.dense())


@given(oracles())
def test_correcting_nothing_is_the_folded_map(oracle: Oracle) -> None:
    plan = oracle.plan([], [])
    close(oracle.rewritten([], []), F.linear(oracle.x, plan.tensors["folded_weight"], plan.tensors["folded_bias"]))


@given(oracles())
def test_an_endless_hot_range_corrects_nothing(oracle: Oracle) -> None:
    ends = torch.full_like(oracle.lower, torch.inf)
    hot = Oracle(oracle.weights, oracle.x, oracle.activation, oracle.codes, -ends, ends, oracle.slope, oracle.intercept)
    assert torch.equal(hot.rewritten(range(len(ends)), []), hot.rewritten([], []))


@given(oracles(identity=True), st.data())
def test_every_true_outlier_is_corrected_under_an_oracle_predictor(oracle: Oracle, data: st.DataObject) -> None:
    """W2 is the identity: output n is what neuron n contributes."""
    guarded, exact = data.draw(classes(len(oracle.lower)))
    down_bias = 0 if oracle.weights.down_bias is None else oracle.weights.down_bias
    contribution = oracle.rewritten(guarded, exact) - down_bias
    activated = ACTIVATIONS[oracle.activation].eager(oracle.z)
    corrected = torch.zeros_like(oracle.outlier)
    corrected[:, guarded] = oracle.outlier[:, guarded]
    corrected[:, exact] = True
    close(contribution[corrected], activated[corrected])


@given(oracles(identity=True), st.data())
def test_nothing_but_outliers_is_corrected_under_an_oracle_predictor(oracle: Oracle, data: st.DataObject) -> None:
    guarded, exact = data.draw(classes(len(oracle.lower)))
    down_bias = 0 if oracle.weights.down_bias is None else oracle.weights.down_bias
    contribution = oracle.rewritten(guarded, exact) - down_bias
    surrogate = oracle.slope * oracle.z + oracle.intercept
    left = torch.ones_like(oracle.outlier)
    left[:, guarded] = ~oracle.outlier[:, guarded]
    left[:, exact] = False
    close(contribution[left], surrogate[left])


@given(oracles(identity=True))
def test_under_an_oracle_predictor_the_error_stays_within_the_largest_on_the_hot_range(oracle: Oracle) -> None:
    up_bias = 0 if oracle.weights.up_bias is None else oracle.weights.up_bias
    down_bias = 0 if oracle.weights.down_bias is None else oracle.weights.down_bias
    activation = ACTIVATIONS[oracle.activation]
    error = (oracle.rewritten(range(len(oracle.lower)), []) - down_bias - activation.eager(oracle.z)).abs().double()
    ends = ((bound + up_bias).clamp(oracle.z.min(), oracle.z.max()) for bound in (oracle.lower, oracle.upper))
    bound = largest_error(activation, *(t.double().numpy() for t in (oracle.slope, oracle.intercept, *ends)))
    rounding = BOUNDARY * max(1.0, activation.eager(oracle.z).abs().max().item())
    assert np.all(error.numpy() <= bound + rounding)


@given(oracles(), st.data())
def test_the_order_of_the_neurons_does_not_matter(oracle: Oracle, data: st.DataObject) -> None:
    guarded, exact = data.draw(classes(len(oracle.lower)))
    shuffled = data.draw(st.permutations(guarded)), data.draw(st.permutations(exact))
    close(oracle.rewritten(*shuffled), oracle.rewritten(guarded, exact))


@given(oracles(), st.data())
def test_tokens_do_not_see_each_other(oracle: Oracle, data: st.DataObject) -> None:
    guarded, exact = data.draw(classes(len(oracle.lower)))
    together = oracle.rewritten(guarded, exact)
    for token, x in zip(together, oracle.x, strict=True):
        close(oracle.rewritten(guarded, exact, x), token)


@given(oracles(), st.data())
def test_constants_are_padded_to_the_hidden_size_whatever_the_classes(oracle: Oracle, data: st.DataObject) -> None:
    def shapes(guarded: list[int], exact: list[int]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        constants = GuardedFold().constants(oracle.plan(guarded, exact), oracle.weights)
        return {name: (t.shape, t.dtype) for name, t in constants.items()}

    hidden = len(oracle.lower)
    assert shapes(*data.draw(classes(hidden))) == shapes(*data.draw(classes(hidden)))
