"""Compares cases on one model: fits and measures each, and records it immediately."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from tardis_fx.compare.cases import Case, Trial
from tardis_fx.compare.records import Record, Records
from tardis_fx.compare.subjects import RewrittenModel, Subject
from tardis_fx.digest import digest
from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.measure.timing import LEAST_ROUNDS, Ratio, interleave
from tardis_fx.plan import Plan
from tardis_fx.runtime.touched import count_touched

#: Number of leading test batches in which touched bytes are counted.
COUNTED = 2


def compare_rewrites(
    subject: Subject,
    cases: Sequence[Case],
    seeds: Sequence[int],
    records: Records,
    *,
    decode: bool = False,
    progress: bool = True,
) -> list[Record]:
    """Runs the cases without a record, and returns all records, seed by seed, in the order of the cases.

    Args:
        subject: the model, its calibration text and its test text.
        cases: the rows of the comparison.
        seeds: each selects different calibration text.
        records: of finished cases; new ones are added.
        decode: whether decoding is timed against Inductor.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: a case names an unregistered rewrite.
        BenchError: a case cannot run here, or the records cannot be written.
    """
    for case in cases:
        case.check()
    results = []
    with tqdm(total=len(seeds) * len(cases), unit="case", disable=not progress) as bar:
        for seed in seeds:
            trial = Trial(subject, seed)  # freed before the next seed
            for case in cases:
                bar.set_description(f"{case.label}{'' if case.budget is None else f' {case.budget:.1%}'}, seed {seed}")
                key = digest(trial.identity, case.identity)
                record = records.get(key)
                if record is None or (decode and record.reason is None and record.decode is None):
                    record = _measure(key, case, trial, decode=decode)
                    records.add(record)
                results.append(record)
                bar.update()
    return results


def _measure(key: str, case: Case, trial: Trial, *, decode: bool) -> Record:
    """Fits and measures one case."""
    subject = trial.subject
    record = Record(key, case.identity, subject.name, case.label, case.budget, trial.seed)
    started = time.perf_counter()
    try:
        rewritten = case.prepare(trial)
    except CalibrationError as error:
        return replace(record, reason=str(error))
    fitted = time.perf_counter()
    run = rewritten.every_token()
    metrics, counted = subject.evaluate(run), _count(subject, rewritten.plan, run)
    measured = time.perf_counter()
    return replace(
        record,
        stored=rewritten.stored,
        touched=rewritten.touched,
        counted=counted,
        flops=rewritten.flops,
        metrics=metrics,
        decode=list(_decode(subject, rewritten)) if decode else None,
        seconds=[fitted - started, measured - fitted],
    )


@torch.no_grad()
def _count(subject: Subject, plan: Plan | None, run: Callable[..., Any]) -> float | None:
    """Counted bytes per token as a fraction of those of the dense FFNs; None if a site cannot be counted."""
    if plan is None:
        return None
    with count_touched() as touched:
        for batch in subject.text[:COUNTED]:
            subject.call(run, batch)
    if touched.sites < len(plan.rewritten):
        return None
    refused = sum(site.dense_bytes for site in plan.sites if site not in plan.rewritten)
    return (touched.per_token + refused) / sum(site.dense_bytes for site in plan.sites)


def _decode(subject: Subject, rewritten: RewrittenModel) -> Ratio:
    """Ratio of Inductor's seconds per token to those of the rewritten model, in interleaved rounds."""
    if subject.decoder is None:
        raise BenchError(f"{subject.name} does not decode: leave out --decode")
    torch.compiler.reset()
    forms = {"Inductor": RewrittenModel(subject.model), "rewritten": rewritten}
    seconds = interleave({name: subject.decoder(form) for name, form in forms.items()}, LEAST_ROUNDS)
    return Ratio.between(seconds["Inductor"], seconds["rewritten"])
