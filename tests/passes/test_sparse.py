"""Which weights pruning keeps."""

import pytest
import torch
from builders.ffns import FFN, batches, config, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.magnitude import Magnitude
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.passes.ria import Ria
from tardis_fx.passes.sparse import highest, two_of_four
from tardis_fx.passes.sparsegpt import SparseGPT, SparseGPT24
from tardis_fx.passes.wanda import Wanda
from tardis_fx.planning import plan_for

SCORES = [Magnitude(), Wanda(), Ria()]


def matrices(planned: dict[str, Tensor]) -> list[Tensor]:
    return [planned["up"], planned["down"]]


def correlated(columns: int, tokens: int = 600, seed: int = 0) -> Tensor:
    """Tokens whose columns depend on one another, and differ in size."""
    mixing = inputs(columns, columns, seed=seed + 1) / columns**0.5 + torch.eye(columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return inputs(tokens, columns, seed=seed) @ mixing * torch.linspace(0.3, 3, columns)[order]  # type: ignore[no-any-return]


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16), st.booleans(), st.data())
def test_the_right_number_of_weights_is_kept_and_none_kept_scores_less_than_one_that_is_not(
    rows: int, columns: int, seed: int, by_row: bool, data: st.DataObject
) -> None:
    score = inputs(rows, columns, seed=seed).abs()
    count = data.draw(st.integers(0, columns)) * rows
    kept = highest(score, count, by_row)
    assert int(kept.sum()) == count
    for own, mask in zip(score, kept, strict=True) if by_row else [(score, kept)]:
        assert int(mask.sum()) == (count // rows if by_row else count)
        if mask.any() and not mask.all():
            assert own[mask].min() >= own[~mask].max()


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**16))
def test_two_of_four_keeps_the_best_two_of_every_four(rows: int, fours: int, seed: int) -> None:
    score = inputs(rows, 4 * fours, seed=seed).abs()
    kept = two_of_four(score).view(rows, fours, 4)
    assert torch.all(kept.sum(2) == 2)
    score = score.view(rows, fours, 4)
    assert torch.all(torch.where(kept, score, torch.inf).amin(2) >= torch.where(kept, -torch.inf, score).amax(2))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_2_4_plans_keep_exactly_two_of_each_four_of_both_matrices(method: str, activation: str) -> None:
    model = ffn(20, 80, activation)
    for weight in pruned(model, f"{method}_2_4", 0.6):
        assert torch.all((weight.view(len(weight), -1, 4) != 0).sum(2) == 2)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_what_is_kept_is_left_as_it_was(method: str) -> None:
    model = ffn(20, 80)
    for weight, original in zip(pruned(model, method, 0.4), (model.up.weight, model.down.weight), strict=True):
        assert torch.equal(weight[weight != 0], original[weight != 0])


def pruned(model: FFN, method: str, budget: float) -> list[Tensor]:
    observation = BatchObservation(model, batches(d=20), progress=False)
    (plan,) = plan_for(observation, config(method=method, budget=budget)).rewritten
    weights = SiteWeights(*(p.detach() for p in model.parameters()))
    constants = rewrite_named(method).constants(plan, weights)
    return [constants["up"], constants["down"]]


def test_wanda_keeps_as_many_weights_in_every_row() -> None:
    for weight in pruned(ffn(20, 80), "wanda", 0.4):
        assert len(set((weight != 0).sum(1).tolist())) == 1


def test_sizes_without_2_4s_multiples_are_refused() -> None:
    observation = BatchObservation(ffn(18, 80), batches(d=18), progress=False)
    assert "multiples of 4" in str(rewrite_named("wanda_2_4").refuse(observation.sites[0].site))


@given(st.integers(0, 2**16), st.floats(0.1, 10))
def test_scores_weigh_a_column_by_what_it_is_multiplied_with(seed: int, factor: float) -> None:
    weight, norms = inputs(4, 6, seed=seed), inputs(6, seed=seed + 1).abs() + 0.1
    larger = norms * torch.tensor([factor, 1, 1, 1, 1, 1])
    for rewrite, power in zip(SCORES, (0, 1, 0.5), strict=True):
        ratio = rewrite.score(weight, larger) / rewrite.score(weight, norms)
        torch.testing.assert_close(ratio[:, 0], torch.full((4,), factor**power))
        torch.testing.assert_close(ratio[:, 1:], torch.ones(4, 5))


@given(st.integers(0, 2**16), st.floats(0.1, 10))
def test_the_relative_importance_of_a_column_does_not_depend_on_its_scale_alone(seed: int, factor: float) -> None:
    """One row: the share of the column is 1 whatever its scale, that of the row is not."""
    weight = inputs(1, 6, seed=seed)
    score = Ria().score(weight, torch.ones(6))
    torch.testing.assert_close(score, 1 + weight.abs() / weight.abs().sum())


@pytest.mark.parametrize("rewrite", [SparseGPT(), SparseGPT24()], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("columns", [64, 200])
def test_sparsegpt_errs_less_than_a_mask_on_what_the_matrix_multiplies(rewrite: SparseGPT, columns: int) -> None:
    x, weight = correlated(columns), inputs(40, columns, seed=5)
    found = rewrite.pruned(weight, x.T @ x, 0.5).weight
    assert int((found != 0).sum()) == weight.numel() // 2
    score = Wanda().score(weight, x.norm(dim=0))
    kept = two_of_four(score) if rewrite.two_of_four else highest(score, weight.numel() // 2, by_row=True)
    errors = [(x @ (w - weight).T).norm() for w in (found, weight * kept)]
    assert errors[0] < 0.95 * errors[1]


def test_sparsegpt_is_magnitude_pruning_where_columns_do_not_depend_on_one_another() -> None:
    weight = inputs(30, 100, seed=5)
    found = SparseGPT().pruned(weight, torch.eye(100), 0.3).weight
    torch.testing.assert_close(found, weight * highest(weight.abs(), 900, by_row=False))
