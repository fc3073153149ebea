"""``python tests/fuzz``: looks for wrong answers, untyped errors and crashes.

Programs, plan files and changes of weights are drawn, each from a seed and a number, in a process of their own, so that
a crash is one more finding. What fails is made smaller and saved; ``--replay FILE`` runs it again.
"""

import itertools
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fuzz import plans as fuzz_plans
from fuzz import verdict as fuzz_verdict
from fuzz import weights as fuzz_weights
from fuzz.cases import Blocks, Failure, Judged, drawn, minimise
from fuzz.process import Worker
from tardis_fx.errors import TardisError

#: Steps of a case at the most.
_STEPS = {"program": 12, "weights": 8}

#: Failures with one fault that are made smaller and shown; the others are only counted.
_SHOWN = 3


def main(
    seed: Annotated[int | None, typer.Option(help="Of all cases; drawn where none is given.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Time for everything; no limit by default.")] = None,
    programs: Annotated[
        int | None, typer.Option(min=0, help="How many programs. [default: 1000, or for 1/2 of the time]")
    ] = None,
    weights: Annotated[
        int | None, typer.Option(min=0, help="How many histories of weights. [default: 200, or for 1/4]")
    ] = None,
    plans: Annotated[
        int | None, typer.Option(min=0, help="How many mutants of plans. [default: 1000, or for 1/4]")
    ] = None,
    inductor: Annotated[float, typer.Option(min=0, max=1, help="Share of programs that Inductor compiles.")] = 0.1,
    save: Annotated[Path | None, typer.Option(help="Folder for failing cases.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Run one saved case instead.")] = None,
) -> None:
    """Look for wrong answers, untyped errors and crashes; exit code 1 where one is found."""
    if replay is not None:
        _replay(replay)
        return
    seed = random.randrange(2**32) if seed is None else seed
    typer.echo(f"seed {seed}")
    until = None if minutes is None else time.monotonic() + 60 * minutes

    def left(share: float) -> float | None:
        """Seconds: a share of the time that is left."""
        return None if until is None else share * max(0.0, until - time.monotonic())

    def most(count: int | None, default: int) -> int | None:
        """How many cases: without limit where only the time is given."""
        return default if count is None and until is None else count

    worker = Worker(judge)
    try:
        route = partial(_route, inductor=inductor)
        failures = hunt("program", seed, most(programs, 1000), route, worker.judge, left(1 / 2), save)
        failures += hunt("weights", seed, most(weights, 200), _by_dynamo, worker.judge, left(1 / 2), save)
    finally:
        worker.close()
    seconds = left(1)
    mutants = fuzz_plans.run(seed, None if seconds is None else seconds / 60, most(plans, 1000), save)
    typer.echo(f"plans: {mutants.tried} tried, {len(mutants.failures)} failed")
    for failure in mutants.failures:
        typer.echo(failure)
    if failures or mutants.failures:
        raise typer.Exit(1)


def judge(kind: str, route: str, blocks: Blocks) -> Judged:
    """What becomes of a case."""
    with warnings.catch_warnings(action="ignore"):
        return fuzz_verdict.judge(blocks, route) if kind == "program" else fuzz_weights.judge(blocks)


def hunt(
    kind: str,
    seed: int,
    count: int | None,
    route: Callable[[int], str],
    judge: Callable[[str, str, Blocks], Judged],
    seconds: float | None = None,
    save: Path | None = None,
) -> list[Failure]:
    """Tries cases of one kind and tells what became of them.

    Args:
        kind: "program" or "weights".
        seed: of all cases.
        count: how many; None for no limit.
        route: the way of each, by its number.
        judge: of kind, route and blocks.
        seconds: for how long; None for no limit.
        save: folder for cases that fail.

    Returns:
        What failed, the first few of every fault made smaller.
    """
    failures: list[Failure] = []
    verdicts: Counter[str] = Counter()
    until = math.inf if seconds is None else time.monotonic() + seconds
    for number in itertools.count() if count is None else range(count):
        if time.monotonic() > until:
            break
        verdict, failure = judge(kind, route(number), drawn(seed, number, most=_STEPS[kind]))
        verdicts[verdict] += 1
        if failure is None:
            continue
        if sum(failure.fault == other.fault for other in failures) < _SHOWN:
            tries = 60 if verdict == "crashed" else 600  # every crash takes a new process
            failure = minimise(failure, partial(_again, judge, failure), tries=tries)
            typer.echo(f"case {number}: {failure}")
            if save is not None:
                typer.echo(f"saved: --replay {failure.save(save)}")
        failures.append(failure)
    told = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    typer.echo(f"{kind}: {verdicts.total()} tried: {told or 'none'}")
    return failures


def _again(judge: Callable[[str, str, Blocks], Judged], failure: Failure, blocks: Blocks) -> Failure | None:
    return judge(failure.kind, failure.route, blocks).failure


def _route(number: int, inductor: float) -> str:
    """Inductor for a share of the programs, evenly spread, in one of 16 with C++ of its own; Dynamo for one in 8."""
    before, now = int(number * inductor), int((number + 1) * inductor)
    if now > before:
        return "inductor_cpp" if now % 16 == 0 else "inductor"
    return "dynamo" if number % 8 == 0 else "backend"


def _by_dynamo(number: int) -> str:
    return "dynamo"


def _replay(path: Path) -> None:
    """Runs a saved case.

    Raises:
        typer.Exit: with code 1 where it fails still, with 2 where the file is none.
    """
    try:
        saved = Failure.load(path)
    except TardisError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    worker = Worker(judge)
    try:
        verdict, failure = worker.judge(saved.kind, saved.route, saved.blocks)
    finally:
        worker.close()
    typer.echo(verdict if failure is None else str(failure))
    if failure is not None:
        raise typer.Exit(1)
