"""Chooses a candidate for every site, within the bytes that all sites together may read."""

from collections.abc import Sequence

from tardis_fx.errors import CalibrationError
from tardis_fx.partial_linear.candidates import Candidate
from tardis_fx.partial_linear.coding import Coding
from tardis_fx.partial_linear.precision import Pricing, Sizes, Widths, check_floor, settle

#: Widths that are tried, for plain and for gated FFNs.
WIDTHS = {
    1: (
        Widths(2, 3, 3, 2, 3),
        Widths(2, 3, 4, 2, 4),
        Widths(2, 4, 4, 3, 0),
        Widths(3, 3, 4, 2, 4),
        Widths(3, 4, 5, 3, 0),
    ),
    2: (
        Widths(2, 3, 4, 2, 0),
        Widths(3, 2, 3, 2, 0),
        Widths(3, 3, 4, 2, 0),
        Widths(4, 2, 4, 2, 0),
        Widths(4, 4, 4, 4, 0),
    ),
}
#: Share by which the bytes of held-back tokens may differ from the budget, which is met on the sample.
TOLERANCE = 0.003
#: Number of times that the target for the sample is corrected.
FILLS = 2


def widths_of(coding: Coding) -> Sequence[Widths]:
    """Widths that are tried at a site."""
    return WIDTHS[len(coding.site.weights.projections)]


def choose(codings: Sequence[Coding], influences: Sequence[float], allowed: float) -> list[Candidate]:
    """The best candidates of sites that together read ``allowed`` bytes per token.

    Raises:
        CalibrationError: the budget is too small at all widths.
    """
    tried: list[list[Candidate]] = []
    refusals: list[CalibrationError] = []
    for number in range(len(WIDTHS[1])):
        widths = [widths_of(coding)[number] for coding in codings]
        most = sum(Sizes.from_coding(coding, w).most for coding, w in zip(codings, widths, strict=True))
        if most < allowed and number + 1 < len(WIDTHS[1]):
            continue
        try:
            tried.append(_at(codings, widths, influences, allowed))
        except CalibrationError as error:
            refusals.append(error)
    if not tried:
        raise refusals[0]
    chosen = _mixture(list(zip(*tried, strict=True)), allowed)
    widths, found = [candidate.widths for candidate in chosen], [chosen]
    latest = chosen if chosen in tried else tried[-1]  # fitted at one price for all sites
    target = allowed
    for _ in range(FILLS):
        missing = allowed / _touched(latest)
        if latest is found[-1] and abs(missing - 1) <= TOLERANCE:
            break
        target *= missing
        try:
            latest = _at(codings, widths, influences, target)
        except CalibrationError:  # at these widths, the base codes alone read more than the target
            break
        found.append(latest)
    return _least(found, allowed)


def _at(
    codings: Sequence[Coding], widths: Sequence[Widths], influences: Sequence[float], target: float
) -> list[Candidate]:
    """Candidates at given widths that read about ``target`` bytes per token, at one price for all sites.

    Raises:
        CalibrationError: the budget is too small.
    """
    check_floor([Sizes.from_coding(*of_site) for of_site in zip(codings, widths, strict=True)], target)
    pricings = [Pricing.from_coding(*of_site) for of_site in zip(codings, widths, influences, strict=True)]
    price = settle(pricings, target)
    return [Candidate.from_pricing(pricing, price) for pricing in pricings]


def _mixture(candidates: Sequence[Sequence[Candidate]], allowed: float) -> list[Candidate]:
    """One candidate for every site, with the least total error that the bytes allow."""
    prices = [0.0]
    for options in candidates:
        for a in options:
            for b in options:
                if a.touched > b.touched and b.error > a.error:
                    prices.append((b.error - a.error) / (a.touched - b.touched))
    mixed = [[min(o, key=lambda c: c.error + p * (1 + 1e-9) * c.touched) for o in candidates] for p in prices]
    return _least(mixed, allowed)


def _least(choices: Sequence[list[Candidate]], allowed: float) -> list[Candidate]:
    """The choice with the least total error among those within the bytes, or else the one with the fewest bytes."""
    within = [chosen for chosen in choices if _touched(chosen) <= (1 + TOLERANCE) * allowed]
    return min(within, key=_error) if within else min(choices, key=_touched)


def _touched(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.touched for candidate in candidates)


def _error(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.error for candidate in candidates)
