"""Runs: the passes over the calibration text that a fit requests, and the driver that makes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor
from tqdm import tqdm

from tardis_fx.observation.site import ObservedSite

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Run:
    """One pass over the calibration text, which shows the inputs of every site to an observer of that site.

    A fit is a generator: it yields a run and is sent the run's result, by the fingerprints of the sites.

    Attributes:
        title: names the measurement in progress bars and checkpoints.
        make: makes the observer of a site.
        sites: the sites to observe.
        finish: turns a site and its observer into the result that the fit is sent; the observer itself by default.
        key: identifies everything that ``make`` and ``finish`` depend on. A run with an equal key for the same sites of
            one observation is answered from memory, without a pass.
        replaced: functions that replace the outputs of some sites during the pass, [..., d] to [..., d_out], by
            fingerprint.
        moved: makes this a trial: ``make`` gives a function that replaces the output of a site, the sites are replaced
            one at a time on a few rows of a batch, and the result is how far the model's output has moved, as
            ``moved`` measures it from the function, the rows, the original output and the changed one. If it gives
            None, or the observation does not have the model's output, the trial is answered with nothing.
    """

    title: str
    make: Callable[[ObservedSite], Any]
    sites: Sequence[ObservedSite]
    finish: Callable[[ObservedSite, Any], Any] = lambda site, observer: observer
    key: Hashable = None
    replaced: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    moved: Callable[[Any, Any, Any, Any], float | None] | None = None


#: A fit in progress: it yields runs, is sent the result of each by fingerprint, and returns its own result.
Fit = Generator[Run, Mapping[str, Any], T]


@dataclass(frozen=True)
class Seen:
    """Numbers of tokens that a run has shown at a site.

    Attributes:
        tokens: number of tokens without padding.
        held_back: number of tokens that are not used to fit.
    """

    tokens: int
    held_back: int


class Observation(ABC):
    """Base class of observations: the sites whose inputs the runs of a fit show to observers.

    Attributes:
        warned: whether the user was warned that there are few tokens.
    """

    def __init__(self, *, progress: bool = False) -> None:
        self.warned, self._progress = False, progress
        self._memory: dict[tuple[Hashable, ...], Mapping[str, Any]] = {}

    @property
    @abstractmethod
    def sites(self) -> Sequence[ObservedSite]:
        """All sites, including refused ones."""

    def seen(self, site: ObservedSite) -> Seen | None:
        """Numbers of tokens that runs have shown at a site, or None if unknown."""
        return None

    def recall(self, run: Run) -> Mapping[str, Any] | None:
        """The remembered result of an equal run, or None."""
        return None if run.key is None else self._memory.get((run.key, *run.sites))

    def conclude(self, run: Run, observers: dict[str, Any]) -> Mapping[str, Any]:
        """Finishes the observers of a run into its result, by fingerprint; remembered if the run has a key.

        Each observer leaves ``observers`` before it is finished, so that its memory is free for what is made of it.
        """
        sites = [site for site in run.sites if site.fingerprint in observers]
        bar = tqdm(sites, desc=run.title, unit="site", disable=not self._progress, leave=False, delay=1)
        results = {site.fingerprint: run.finish(site, observers.pop(site.fingerprint)) for site in bar}
        if run.key is not None:
            self._memory[run.key, *run.sites] = results
        return results


class RepeatableObservation(Observation):
    """An observation that can make any number of runs immediately."""

    def answer(self, run: Run) -> Mapping[str, Any]:
        """Makes a run and returns its result by fingerprint.

        Raises:
            CalibrationError: a site's inputs are NaN or infinite, or it saw no token.
        """
        remembered = self.recall(run)
        return self.conclude(run, self._shown(run)) if remembered is None else remembered

    @abstractmethod
    def _shown(self, run: Run) -> dict[str, Any]:
        """Observers of a run, by fingerprint, that have seen all inputs of their sites."""


@dataclass(frozen=True)
class Finished(Generic[T]):
    """The end of a fit."""

    result: T


def advance(fit: Fit[T], answer: Mapping[str, Any] | Exception | None = None) -> Run | Finished[T]:
    """Continues a fit up to its next run or its end.

    Args:
        fit: the fit.
        answer: the result of the last run, or an error to raise inside the fit; None at the beginning.
    """
    try:
        return fit.throw(answer) if isinstance(answer, Exception) else fit.send(answer)  # type: ignore[arg-type]
    except StopIteration as done:
        return Finished(done.value)


def drive(observation: RepeatableObservation, fit: Fit[T]) -> T:
    """Makes every run that a fit requests and returns its result; an error of a run is raised inside the fit."""
    step = advance(fit)
    while isinstance(step, Run):
        answer: Mapping[str, Any] | Exception
        try:
            answer = observation.answer(step)
        except Exception as error:
            answer = error
        step = advance(fit, answer)
    return step.result


def steps(fit: Fit[T] | T) -> Fit[T]:
    """Wraps a fit as a generator, even if it makes no runs and is given as its result."""
    return (yield from fit) if isinstance(fit, Generator) else fit


def changed(fit: Fit[T], change: Callable[[Run], Run]) -> Fit[T]:
    """Changes the runs of a fit before they are made."""
    step = advance(fit)
    while isinstance(step, Run):
        step = advance(fit, (yield change(step)))
    return step.result


def forgotten(run: Run) -> Run:
    """A copy of the run without a key, because no other fit of the observation will request it."""
    return replace(run, key=None)
