"""Interleaved timing rounds, and the ratios between contenders within a round."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Fewer rounds say too little about the spread.
LEAST_ROUNDS = 9
_CPU = torch.device("cpu")


class Ratio(NamedTuple):
    """Least, median and greatest ratio over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def between(cls, base: Sequence[float], other: Sequence[float]) -> Ratio:
        """Base over other, round by round: above 1 where ``other`` takes less time."""
        ratios = [b / o for b, o in zip(base, other, strict=True)]
        return cls(min(ratios), statistics.median(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f} to {self.high:.2f})"


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender returns in each round; every round runs all of them, after one warm-up round."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            result = run()
            if turn:
                results[name].append(result)
    return results


def seconds(run: Callable[[], object], device: torch.device = _CPU, calls: int = 1) -> float:
    """Seconds of a call, as the mean of several in a row.

    Args:
        run: what is timed.
        device: on which it computes.
        calls: in a row.
    """
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - started) / calls


def wait(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
