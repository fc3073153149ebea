"""Rows of a comparison, side by side in time, and how they are shown."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tardis_fx.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tardis_fx.measure.machine import Machine

#: Fewer rounds say too little about the spread.
LEAST_ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: what all contenders of the case have in common.
        name: of the contender.
        seconds: of one step, round by round.
        base: the same of the contender that it is compared with, in the same rounds.
        touched: weight and cache bytes that one step reads.
        outliers: share of (token, neuron) pairs corrected, or None where nothing is corrected.
    """

    case: str
    name: str
    seconds: Sequence[float]
    base: Sequence[float]
    touched: float
    outliers: float | None = None

    def values(self, machine: Machine) -> dict[str, str | float | None]:
        """What is shown, by heading; times in milliseconds.

        Args:
            machine: whose bandwidth gives the floor.
        """
        low, median, high = ratio(self.base, self.seconds)
        step = statistics.median(self.seconds)
        floor = self.touched / machine.bandwidth
        return {
            "case": self.case,
            "contender": self.name,
            "ms": step * 1e3,
            "ratio": median,
            "ratio_min": low,
            "ratio_max": high,
            "outliers": self.outliers,
            "MB": self.touched / 1e6,
            "GB/s": self.touched / step / 1e9,
            "floor_ms": floor * 1e3,
            "of_floor": step / floor,
        }


def ratio(base: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and greatest of base over other, round by round."""
    ratios = [b / o for b, o in zip(base, other, strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender returned in each round, one after the other in turn, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            result = run()
            if turn:
                found[name].append(result)
    return found


def markdown(rows: Sequence[Row], machine: Machine) -> str:
    """A table, with the machine below it.

    Args:
        rows: in the order in which they are shown.
        machine: on which they were measured.
    """
    lines = [
        "| case | contender | ms | against Inductor (min to max) | outliers | MB touched | GB/s | floor, ms "
        "| of floor |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        v = row.values(machine)
        share = "" if row.outliers is None else f"{row.outliers:.2%}"
        lines.append(
            f"| {row.case} | {row.name} | {v['ms']:.3f} | {v['ratio']:.2f}× ({v['ratio_min']:.2f} to "
            f"{v['ratio_max']:.2f}) | {share} | {v['MB']:.2f} | {v['GB/s']:.1f} | {v['floor_ms']:.3f} "
            f"| {v['of_floor']:.2f}× |"
        )
    rounds = min((len(row.seconds) for row in rows), default=0)
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {rounds} rounds in turn after one to warm up. Roofline: floor = MB touched over "
            f"{machine.roof}.",
            str(machine),
        ]
    )


def write_csv(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Writes the same figures, one line a row, the machine's in each.

    Args:
        rows: at least one.
        machine: on which they were measured.
        path: where to; an existing file is replaced.

    Raises:
        BenchError: the file cannot be written.
    """
    described = {
        "machine": machine.name,
        "threads": machine.threads,
        "copy_GB/s": machine.copy,
        "sum_GB/s": machine.read,
    }
    lines = [row.values(machine) | {"rounds": len(row.seconds)} | described for row in rows]
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error}") from error
