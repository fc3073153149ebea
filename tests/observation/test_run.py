"""How the runs of a fit are made: what is remembered, what is changed, and who is told of an error."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from builders.ffns import batches, ffn
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Fit, Run, changed, drive, forgotten, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.testing.observation import SiteObservation


class Tokens:
    """Counts."""

    made = 0

    def __init__(self) -> None:
        self.count = 0
        Tokens.made += 1

    def update(self, x: Tensor) -> None:
        self.count += len(x)


@pytest.fixture
def observation() -> SiteObservation:
    Tokens.made = 0
    return SiteObservation([ffn(seed=1), ffn(seed=2)], batches())


def counted(sites: Sequence[ObservedSite], key: Any = None, finished: list[str] | None = None) -> Run:
    def finish(site: ObservedSite, tokens: Tokens) -> int:
        if finished is not None:
            finished.append(site.fingerprint)
        return tokens.count

    return Run("tokens", lambda _: Tokens(), sites, finish, key=key)


def asked(*runs: Run) -> Fit[list[Mapping[str, Any]]]:
    found = []
    for run in runs:
        found.append((yield run))
    return found


def test_a_fit_is_sent_what_its_runs_found(observation: SiteObservation) -> None:
    ((found,),) = [drive(observation, asked(counted(observation.sites)))]
    assert found == {site.fingerprint: 4 * 256 for site in observation.sites}


def test_a_fit_that_measures_nothing_may_be_its_result(observation: SiteObservation) -> None:
    assert drive(observation, steps([1, 2])) == [1, 2]


def test_an_equal_key_for_the_same_sites_is_answered_from_memory(observation: SiteObservation) -> None:
    sites, finished = observation.sites, list[str]()
    run, other = counted(sites, "key", finished), counted(sites, "key", finished)
    first, second = drive(observation, asked(run, other))
    assert first == second
    assert drive(observation, asked(counted(sites, "key", finished))) == [first]
    assert Tokens.made == 2
    assert finished == [site.fingerprint for site in sites], "finished once"


@pytest.mark.parametrize("differing", ["key", "sites", "weights"])
def test_any_other_run_is_made(observation: SiteObservation, differing: str) -> None:
    sites, key = observation.sites, "key"
    drive(observation, asked(counted(sites, key)))
    if differing == "key":
        key = "another"
    else:
        sites = sites[1:] if differing == "sites" else [replace(site, weights=site.weights) for site in sites]
    drive(observation, asked(counted(sites, key)))
    assert Tokens.made == 2 + len(sites)


def test_a_run_that_is_forgotten_is_made_again(observation: SiteObservation) -> None:
    for _ in range(2):
        drive(observation, changed(asked(counted(observation.sites, "key")), forgotten))
    assert Tokens.made == 4


def test_what_a_run_raises_is_raised_where_the_fit_waits(observation: SiteObservation) -> None:
    def fit() -> Fit[str]:
        try:
            yield Run("fails", lambda _: 1 / 0, observation.sites)  # type: ignore[arg-type]
        except ZeroDivisionError as error:
            raise CalibrationError("told") from error
        return "no"

    with pytest.raises(CalibrationError, match="told"):
        drive(observation, fit())
