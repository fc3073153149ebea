from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gated
from builders.ffns import ffn, inputs
from torch import Tensor

from tardis_fx import CalibrationError, CheckpointError
from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.histogram import Histogram
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.guarded_fold.residuals import WidthResiduals
from tardis_fx.guarded_fold.settled import Settled
from tardis_fx.observation.checkpoint import Checkpoint
from tardis_fx.observation.merging import statistics
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.drop_bias import BiasEffect
from tardis_fx.statistics.affine import Outputs
from tardis_fx.statistics.check import Check
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.operands import ColumnNorms, Grams
from tardis_fx.statistics.surrogates import SurrogateSums
from tardis_fx.testing.observation import observed

D = 16
BATCHES = [inputs(n, D, seed=n) for n in (70, 9, 40, 1)]
MERGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "least": torch.minimum,
    "greatest": torch.maximum,
}


def seen(observer: Any, batches: Sequence[Tensor]) -> Any:
    for batch in batches:
        observer.update(batch)
    return observer


def drafted(site: ObservedSite) -> Draft:
    return Draft.from_observer(site, seen(DraftObserver(site), BATCHES), Quantisation(2, 64, "gptq"))


def settled(draft: Draft, bits: int) -> Settled:
    """Half of the neurons guarded, on half of their bins."""
    histogram = seen(Histogram(draft), BATCHES)
    hot = torch.zeros_like(histogram.sums.count, dtype=torch.bool)
    hot[24:72] = True
    guarded = torch.arange(hot.shape[1]) % 2 == 0
    importance, costs = torch.ones(hot.shape[1], dtype=torch.float64), draft.costs(bits, bits)
    site = PricedSite.from_sums(histogram.sums, draft.guard, importance, costs).refit(hot)
    ranges = Ranges(hot, guarded, torch.zeros_like(guarded), 0)
    return Settled.from_choice(draft, (bits, bits), site, ranges, histogram.edges)


SITE, GATED = observed(ffn()), gated.observed(gated.Gated(D))
DRAFT, GATED_DRAFT = drafted(SITE), drafted(GATED)
OBSERVERS: dict[str, Callable[[], Any]] = {
    "Moments": lambda: Moments(D),
    "DraftObserver": lambda: DraftObserver(GATED),
    "Histogram": lambda: Histogram(DRAFT),
    "Histogram of scores": lambda: Histogram(GATED_DRAFT),
    "WidthResiduals": lambda: WidthResiduals([settled(DRAFT, 16), settled(DRAFT, 8)]),
    "ColumnNorms": lambda: ColumnNorms(SITE),
    "Grams": lambda: Grams(SITE),
    "SurrogateSums": lambda: SurrogateSums(SITE),
    "Outputs": lambda: Outputs(SITE),
    "BiasEffect": lambda: BiasEffect(GATED),
    "Check": lambda: Check(SITE, lambda x: x, held_back=True),
}


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_what_two_observers_saw_is_in_sum_what_one_saw(make: Callable[[], Any]) -> None:
    whole, one, other = (statistics({"a": seen(make(), batches)}) for batches in (BATCHES, BATCHES[::2], BATCHES[1::2]))
    untouched = statistics({"a": make()})
    for name, statistic in whole.items():
        merged = MERGED[statistic.how](one[name].value, other[name].value)
        torch.testing.assert_close(merged, statistic.value, rtol=1e-13, atol=1e-12, msg=name)
        assert torch.equal(MERGED[statistic.how](statistic.value, untouched[name].value), statistic.value), name


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_every_tensor_or_number_that_a_batch_changes_is_a_statistic(make: Callable[[], Any]) -> None:
    def held(observer: Any) -> dict[str, Any]:
        """All tensors and numbers of an observer and of what it holds, except of the site, the draft and the weights."""
        found: dict[str, Any] = {}
        for name, value in vars(observer).items():
            for i, part in enumerate(value if isinstance(value, list) else [value]):
                if type(part).__module__ in (
                    "tardis_fx.statistics.regression",
                    "tardis_fx.statistics.moments",
                    "tardis_fx.statistics.surrogates",
                ) or (type(part).__name__ == "ResidualObserver"):
                    found |= {f"{name}.{i}.{key}": inner for key, inner in held(part).items()}
                elif isinstance(part, (torch.Tensor, int, float)):
                    found[name] = torch.as_tensor(part).clone()
        return found

    before, observer = held(make()), seen(make(), BATCHES)
    changed = {name for name, value in held(observer).items() if not torch.equal(value, before[name])}
    assert changed == {name.removeprefix("a.") for name in statistics({"a": observer})}


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_a_checkpoint_gives_back_what_was_stored(make: Callable[[], Any], tmp_path: Path) -> None:
    whole, fresh = {"a": seen(make(), BATCHES)}, {"a": make()}
    Checkpoint(tmp_path / "run", "owner").store(1, "what", whole)
    again = Checkpoint(tmp_path / "run", "owner")
    assert again.restore(1, "what", fresh)
    assert not again.restore(2, "what", fresh)
    for name, statistic in statistics(whole).items():
        assert torch.equal(statistics(fresh)[name].value, statistic.value)
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "owner").store(1, "what", {"a": Moments(D)})
    for owner, what, given in (
        ("another", "what", {"a": Moments(D)}),
        ("owner", "else", {"a": Moments(D)}),
        ("owner", "what", {"b": Moments(D)}),
        ("owner", "what", {"a": Moments(D + 1)}),
    ):
        with pytest.raises(CheckpointError, match=r"delete .*" + tmp_path.name):
            Checkpoint(tmp_path, owner).restore(1, what, given)


def test_a_damaged_or_impossible_checkpoint_is_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "owner")
    checkpoint.store(1, "what", {"a": Moments(D)})
    path = tmp_path / "run-001.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.restore(1, "what", {"a": Moments(D)})
    with pytest.raises(CheckpointError, match="cannot store"):
        Checkpoint(path, "owner")
    tmp_path.joinpath("run-002.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.store(2, "what", {"a": Moments(D)})


def test_an_observer_that_does_not_say_how_it_is_merged_is_named() -> None:
    class Silent:
        def update(self, x: Tensor) -> None: ...

    with pytest.raises(CalibrationError, match="Silent cannot be stored or shared"):
        statistics({"a": Silent()})
