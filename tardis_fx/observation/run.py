"""What a fit asks for, one pass over the calibration text, and how the passes of a fit are made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from torch import Tensor

    from tardis_fx.observation.observe import ObservedSite, RepeatableObservation

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Run:
    """One pass over the calibration text, which shows the inputs of every site to an observer of that site.

    A fit is a generator: it yields a run and is sent what the run found, by the fingerprints of the sites.

    Attributes:
        title: what is measured, for progress bars and checkpoints.
        make: makes the observer of a site.
        sites: the sites to observe.
        finish: turns a site and its observer into what the fit is sent; the observer itself by default.
        key: where given, an equal key for the same sites of one observation is answered from memory, without a pass:
            it names whatever ``make`` and ``finish`` depend on.
        replaced: functions that replace the outputs of some sites during the pass, [..., d] to [..., d_out], by
            fingerprint.
    """

    title: str
    make: Callable[[ObservedSite], Any]
    sites: Sequence[ObservedSite]
    finish: Callable[[ObservedSite, Any], Any] = lambda site, observer: observer
    key: Hashable = None
    replaced: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


#: A fit in progress: it yields runs, is sent what each run found by fingerprint, and returns its result.
Fit = Generator[Run, Mapping[str, Any], T]


@overload
def drive(observation: RepeatableObservation, fit: Fit[list[T]] | list[T]) -> list[T]: ...


@overload
def drive(observation: RepeatableObservation, fit: Fit[T]) -> T: ...


def drive(observation: RepeatableObservation, fit: Any) -> Any:
    """The result of a fit, after every run that it asks for; what a run raises is raised where the fit waits for it.

    Args:
        observation: of the sites.
        fit: a generator, or its result where it measures nothing.

    Raises:
        CalibrationError: as :meth:`RepeatableObservation.answer`.
        Exception: the fit's own.
    """
    fit, answer = steps(fit), None
    failure: Exception | None = None
    while True:
        try:
            run = fit.send(answer) if failure is None else fit.throw(failure)
        except StopIteration as done:
            return done.value
        try:
            answer, failure = observation.answer(run), None
        except Exception as error:
            failure = error


def steps(fit: Fit[T] | T) -> Fit[T]:
    """A fit as a generator, also where it measures nothing and is its result."""
    return (yield from fit) if isinstance(fit, Generator) else fit


def changed(fit: Fit[T], change: Callable[[Run], Run]) -> Fit[T]:
    """A fit whose runs are changed before they are made."""
    answer: Any = None
    while True:
        try:
            run = fit.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        answer = yield change(run)


def forgotten(run: Run) -> Run:
    """The run, not to be remembered: no other fit of the observation will ask for the same."""
    return replace(run, key=None)
