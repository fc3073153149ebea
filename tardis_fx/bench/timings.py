"""Timings of contenders in interleaved rounds, with the bytes that bound them, and their report."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tardis_fx.measure.machine import Machine
from tardis_fx.measure.tables import markdown
from tardis_fx.measure.timing import Ratio

#: Bytes that a step reads of weights in turn, as a multiple of the last-level cache, so that the cache stays cold.
COLD = 4
#: Relative difference from which the median of the ratios and the ratio of the medians are both shown.
DIFFERENT = 0.05
#: Columns of the table: heading, and format of the figures.
COLUMNS = {
    "case": "{case}",
    "contender": "{contender}",
    "ms": "{ms:.3f}",
    "against Inductor (min to max)": "{speed}",
    "outliers": "{share}",
    "MB touched": "{MB:.2f}",
    "GB/s": "{GB/s:.1f}",
    "floor, ms": "{floor_ms:.3f}",
    "times the byte floor": "{of_floor:.2f}×",
}


@dataclass(frozen=True)
class Timing:
    """One contender in one case.

    Attributes:
        case: description shared by all contenders of the case.
        name: of the contender.
        seconds: of one step, round by round.
        base: seconds of the contender for comparison, in the same rounds.
        touched: weight and cache bytes that one step reads.
        outliers: share of (token, neuron) pairs corrected, or None without corrections.
    """

    case: str
    name: str
    seconds: Sequence[float]
    base: Sequence[float]
    touched: float
    outliers: float | None = None

    def figures(self, machine: Machine) -> dict[str, Any]:
        """All figures, by heading of the CSV file; times in milliseconds."""
        ratio = Ratio.between(self.base, self.seconds)
        step, floor = statistics.median(self.seconds), self.touched / machine.bandwidth
        return {
            "case": self.case,
            "contender": self.name,
            "ms": step * 1e3,
            "ratio": ratio.median,
            "ratio_min": ratio.low,
            "ratio_max": ratio.high,
            "ratio_of_medians": statistics.median(self.base) / step,
            "outliers": self.outliers,
            "MB": self.touched / 1e6,
            "GB/s": self.touched / step / 1e9,
            "floor_ms": floor * 1e3,
            "of_floor": step / floor,
            "rounds": len(self.seconds),
            "machine": machine.name,
            "threads": machine.threads,
            "copy_GB/s": machine.copy,
            "sum_GB/s": machine.read,
        }


def report(timings: Sequence[Timing], machine: Machine) -> str:
    """Formats a Markdown table in the given order, with the conditions below it."""
    rows = []
    for timing in timings:
        share = "" if timing.outliers is None else f"{timing.outliers:.2%}"
        figures = timing.figures(machine)
        speed, of_medians = str(Ratio.between(timing.base, timing.seconds)), figures["ratio_of_medians"]
        if abs(of_medians / figures["ratio"] - 1) > DIFFERENT:
            speed += f"; of medians {of_medians:.2f}×"
        rows.append({h: form.format(share=share, speed=speed, **figures) for h, form in COLUMNS.items()})
    rounds = min((len(timing.seconds) for timing in timings), default=0)
    return (
        f"{markdown(rows, titles=2)}\n\nMedians of {rounds} interleaved rounds after one warm-up round. "
        f"Ratios are medians of the rounds' ratios, followed by the ratio of the medians if that differs by more than "
        f"{DIFFERENT:.0%}. The byte floor is MB touched over {machine.roof}.\n{machine}"
    )


def warm_cache(timings: Sequence[Timing], cache: int, copies: int = 1) -> list[str]:
    """A remark on the contenders of a case that read too little to keep a last-level cache cold, if there are any.

    ``copies`` is the number of weights of one shape that a contender reads in turn, and ``cache`` is in bytes.
    """
    warm = [timing.name for timing in timings if timing.touched * copies < COLD * cache]
    remark = f"{timings[0].case}: less than {COLD} times the last-level cache is read, which stays warm, by"
    return [f"{remark} {'; '.join(warm)}."] if warm else []
