"""Interleaved timing rounds, and the ratios between contenders within a round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

#: Minimum number of rounds for an estimate of the spread.
LEAST_ROUNDS = 9
_CPU = torch.device("cpu")


class Ratio(NamedTuple):
    """Smallest, median and largest ratio over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def between(cls, base: Sequence[float], contender: Sequence[float]) -> "Ratio":
        """Ratio of base to contender, round by round: above 1 if the contender takes less time."""
        ratios = [b / c for b, c in zip(base, contender, strict=True)]
        return cls(min(ratios), statistics.median(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f} to {self.high:.2f})"


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs all contenders in each round, after one warm-up round, and returns their results by contender."""
    turns = [[run() for run in contenders.values()] for _ in range(rounds + 1)]
    return {name: list(results[1:]) for name, results in zip(contenders, zip(*turns, strict=True), strict=True)}


def seconds(run: Callable[[], object], device: torch.device = _CPU, calls: int = 1) -> float:
    """Seconds per call, as the mean of consecutive calls that compute on a device."""
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
