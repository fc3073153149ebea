"""Measures what each choice of partial linearity gives: one change per row, on models that others trained.

    python benchmarks/ablations.py 0.19 --gemma --text FILE    budgets, as shares of the bfloat16 FFN bytes
    python benchmarks/ablations.py 0.15 --whisper

Models, calibration and text are those of ``benchmarks/quality.py``, at one calibration seed; of Whisper, 160 clips are
measured, because a tenth of the KL is noise on 32.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch
from jaxtyping import Float, Float64, Int64
from quality import subject_of
from torch import Tensor
from tqdm import tqdm

from tardis_fx import Config, TardisError
from tardis_fx.compare.cases import Planned, Trial
from tardis_fx.graph import matcher
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.tables import markdown
from tardis_fx.partial_linear import choice, coding, refit
from tardis_fx.partial_linear.candidates import Candidate
from tardis_fx.passes import partial_linear
from tardis_fx.quantisation import Feedback, Rows, code_columns, code_rows, factor
from tardis_fx.runtime import rotation, tables

#: Standard deviations of a Gaussian variable at which the largest of equally spaced levels has the least squared error.
EQUAL_PEAKS = {1: 0.8, 2: 1.49, 3: 2.05, 4: 2.51}


@contextlib.contextmanager
def equal_levels() -> Iterator[None]:
    """Levels at equal distances instead of the Gaussian ones."""
    with mock.patch.dict(tables._GAUSSIAN, clear=True), mock.patch.dict(tables.PEAKS, EQUAL_PEAKS):
        tables.levels.cache_clear()
        yield
    tables.levels.cache_clear()


@contextlib.contextmanager
def nearest() -> Iterator[None]:
    """Codes rounded to nearest."""

    def rows(weight: Float[Tensor, "rows d"], feedback: Feedback | None, bits: int) -> Rows:
        return code_rows(weight, None, bits)

    def columns(weight: Float[Tensor, "h d"], feedback: Feedback | None, bits: int) -> Rows:
        return code_columns(weight, None, bits)

    with (
        mock.patch.object(coding, "code_rows", rows),
        mock.patch.object(coding, "code_columns", columns),
        mock.patch.object(refit, "code_columns", columns),
    ):
        yield


def in_order() -> AbstractContextManager[object]:
    """Columns are rounded in their own order."""
    from_factor = Feedback.from_factor

    def ordered(rising: Int64[Tensor, " d"], lower: Float64[Tensor, "d d"]) -> Feedback:
        own = torch.empty_like(lower)
        own[rising[:, None], rising] = lower @ lower.T
        return from_factor(torch.arange(len(own)).flip(0), factor(own.flip(0, 1), damping=0.0))

    return mock.patch.object(Feedback, "from_factor", ordered)


def own_columns() -> AbstractContextManager[object]:
    """Nothing is fitted to the values that neurons add, but a fold and a bias on the sample of tokens."""
    return mock.patch.object(Candidate, "refitted", lambda candidate: candidate)


def alike() -> AbstractContextManager[object]:
    """Errors of all sites count alike."""
    return mock.patch.object(partial_linear, "weighed", lambda found: [1.0] * len(found))


def variants(*, gated: bool) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Changes by label."""
    unfolded = {1: tuple(widths for widths in choice.WIDTHS[1] if not widths.fold_bits)}
    of_kind: dict[str, Callable[[], AbstractContextManager[object]]] = (
        {"the same thresholds for all tokens": lambda: mock.patch.object(matcher, "is_normalised", return_value=False)}
        if gated
        else {
            "all sites count alike": alike,
            "no fold": lambda: mock.patch.dict(choice.WIDTHS, unfolded),
        }
    )
    return {
        "none": contextlib.nullcontext,
        "no rotation": lambda: mock.patch.object(rotation, "_transform", lambda x: x),
        "levels at equal distances": equal_levels,
        "codes rounded to nearest": nearest,
        "columns coded in their own order": in_order,
        "the columns of down": own_columns,
        **of_kind,
    }


def main() -> None:
    """Measures and prints a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", type=float, nargs="+")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--whisper", nargs="?", const="tiny.en", choices=("tiny.en", "base"))
    models.add_argument("--gemma", action="store_true")
    parser.add_argument("--text", type=Path, metavar="FILE", help="as for quality.py")
    parser.set_defaults(encoder=False, model=None, measured=160)
    options = parser.parse_args()
    rows = []
    try:
        _, amount, subject = subject_of(options)
        for budget, (label, change) in tqdm(
            [*itertools.product(options.budgets, variants(gated=options.gemma).items())]
        ):
            with change():
                rewritten = Planned(label, Config(budget=budget)).prepare(Trial(subject, 1))
                metrics = subject.evaluate(rewritten.every_token())
            cells = {metric.heading: format(metrics[metric.name], metric.form) for metric in subject.metrics}
            rows.append({"change": label, "budget": f"{budget:.1%}", "touched": f"{rewritten.touched:.1%}", **cells})
            print(rows[-1], file=sys.stderr, flush=True)
    except TardisError as error:
        sys.exit(f"ablations: {error}")
    finally:  # an interrupted run shows its finished rows
        print(markdown(rows))
    print(f"\n{subject.name}; calibrated on {amount}; {conditions()}")


if __name__ == "__main__":
    main()
