"""What a fit asks for: one pass over the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from tardis_fx.observation.observe import ObservedSite

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
        key: where given, an equal key for the same sites of one observation is answered from memory, without a pass.
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
