"""Columns of down that are fitted together with the fold."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders.ffns import ACTIVATIONS as NAMES
from builders.ffns import config, ffn, fitted, inputs
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.guarded_fold import residuals
from tardis_fx.guarded_fold.residuals import ResidualObserver
from tardis_fx.guarded_fold.widths import Fitted
from tardis_fx.observation.run import Run
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import SitePlan
from tardis_fx.testing.ffn import FFN, GatedFFN, gated_ffn
from tardis_fx.testing.observation import SiteObservation

D, HIDDEN = 32, 128


class Rounded(GuardedFold):
    """With down's own columns, rounded."""

    def _fitted(self, observer: ResidualObserver) -> Fitted:
        return self._folded(observer.settled, observer)


def texts() -> list[Tensor]:
    """Inputs of which a few directions hold most, so that neurons fire together."""
    mixing = inputs(6, D, seed=1)
    return [3 * inputs(512, 6, seed=10 + i) @ mixing / D**0.5 + 0.2 * inputs(512, D, seed=20 + i) for i in range(4)]


def fit(rewrite: GuardedFold, ffns: Sequence[FFN | GatedFFN], budget: float = 0.2, row_bits: int = 4) -> list[SitePlan]:
    observation, chosen = SiteObservation(ffns, texts()), config(budget=budget, fold_bits=8, row_bits=row_bits)
    return fitted(observation, rewrite, chosen)


@settings(max_examples=examples(6))
@given(st.sampled_from(NAMES), st.booleans(), st.sampled_from([0.15, 0.3]), st.sampled_from([3, 4, 8]))
def test_fitted_columns_miss_less_and_change_nothing_else_but_the_fold(
    activation: str, gated: bool, budget: float, row_bits: int
) -> None:
    model = gated_ffn(D, HIDDEN, activation) if gated else ffn(D, HIDDEN, activation)
    (fitted,), (rounded,) = (fit(rewrite, [model], budget, row_bits) for rewrite in (GuardedFold(), Rounded()))
    assert fitted.error <= rounded.error
    assert (fitted.touched_bytes, fitted.stored_bytes) == (rounded.touched_bytes, rounded.stored_bytes)
    for name, tensor in rounded.tensors.items():
        if name not in ("columns", "folded_weight", "folded_bias"):
            assert torch.equal(fitted.tensors[name], tensor), name


@pytest.mark.parametrize("gated", [False, True])
def test_where_neurons_fire_together_a_corrected_one_stands_in_for_those_that_are_folded(gated: bool) -> None:
    model = gated_ffn(D, HIDDEN, "silu") if gated else ffn(D, HIDDEN, "gelu")
    (fitted,), (rounded,) = (fit(rewrite, [model]) for rewrite in (GuardedFold(), Rounded()))
    assert fitted.error < 0.8 * rounded.error


def test_columns_of_the_original_weights_are_not_copied() -> None:
    (fitted,), (rounded,) = (fit(rewrite, [ffn(D, HIDDEN)], row_bits=16) for rewrite in (GuardedFold(), Rounded()))
    assert fitted.error == rounded.error
    assert "columns" not in fitted.tensors


def test_sites_whose_sums_do_not_fit_in_memory_take_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ffns, runs = [ffn(D, HIDDEN, seed=seed) for seed in range(3)], []
    together = fit(GuardedFold(), ffns)
    shown = SiteObservation._shown

    def counted(self: SiteObservation, run: Run) -> Any:
        runs.append((run.title, len(run.sites)))
        return shown(self, run)

    monkeypatch.setattr(SiteObservation, "_shown", counted)
    sizes = [8 * (D + len(plan.tensors["neurons"])) ** 2 for plan in together]
    for memory, sites in ((sum(sizes), [3]), (sum(sizes[:2]), [2, 1]), (1, [1, 1, 1])):
        runs.clear()
        monkeypatch.setattr(residuals, "MEMORY", memory)
        apart = fit(GuardedFold(), ffns)
        assert [count for title, count in runs if title.startswith("residuals")] == sites
        for one, other in zip(together, apart, strict=True):
            assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_so_do_the_widths_of_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    observation = SiteObservation([ffn(D, HIDDEN)], texts())
    every = config(budget=0.3, fold_bits=None, row_bits=None)
    (together,) = fitted(observation, GuardedFold(), every)
    monkeypatch.setattr(residuals, "MEMORY", 1)
    (apart,) = fitted(observation, GuardedFold(), every)
    assert together.settings == apart.settings
    assert together.error == pytest.approx(apart.error)
