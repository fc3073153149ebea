"""Damages plan files and sees that nobody is hurt: the right answer, or an error that says that the plan is at fault.

1. A mutant is a plan of a small model, changed by one to four mutations (:mod:`fuzz.mutations`). Most
   of them get the digest of what they then hold, as an attacker would write it.
2. It is loaded, compiled with the inner backend ``eager``, and called, in a process of its own, so that a crash shows.
   One in 25 goes through ``torch.compile``, ``explain`` and ``release`` as well.
3. A mutant with the old digest must be refused, or give what the plan gave. One with a digest of its own may give other
   numbers, for a plan holds numbers, and nobody can tell those of an attacker from those of a calibration. It must not
   end the process, raise anything but ``PlanFileError`` and ``PlanMismatchError``, nor give another shape or dtype; and
   where no number of a tensor was changed, the output must be finite.
"""

import copy
import hashlib
import logging
import multiprocessing
import random
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from builders.plan_files import signed
from torch import Tensor, nn

from fuzz.mutations import HARMLESS_TO_NUMBERS, MUTATIONS
from tardis_fx import backend
from tardis_fx.calibrate import calibrate
from tardis_fx.config import Config
from tardis_fx.errors import PlanFileError, PlanMismatchError
from tardis_fx.explain import explain
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan
from tardis_fx.release import release
from tardis_fx.testing.assertions import relative_error
from tardis_fx.testing.capture import capture
from tardis_fx.testing.ffn import ffn, gated_ffn, inputs

#: What is damaged: a method with fields of the config, ``gated`` among them.
SUBJECTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("guarded_fold", {"options": {"fold_bits": 16, "row_bits": 16}}),
    ("guarded_fold", {"options": {"fold_bits": 4, "row_bits": 4}}),
    ("guarded_fold", {"options": {"fold_bits": 16, "row_bits": 16}, "gated": True}),
    ("guarded_fold", {"options": {"fold_bits": 8, "row_bits": 8, "group_size": 32}, "gated": True}),
    ("partial_linear", {}),
    ("partial_linear", {"gated": True}),
    ("paper", {"budget": 0.9}),
    ("hot_fold", {}),
    ("ffsplit", {}),
    ("low_rank", {"gated": True}),
    ("low_rank+finetuned", {}),
    ("gptq", {}),
    ("gptq_rotated", {"gated": True}),
    ("wanda", {}),
    ("sparsegpt", {}),
    ("share_ffn", {}),
    ("token_gate", {}),
    ("linear_replace", {}),
    ("drop_bias+hot_fold", {"budget": 0.8}),
    ("hot_fold+int8_ffn", {}),
    ("int4_ffn", {}),
)
_D, _HIDDEN, _TOKENS = 16, 32, 4
#: Seconds without an answer after which a mutant is said to hang.
_PATIENCE = 120.0


class Mutant(NamedTuple):
    """A plan file as it can be made again: a subject's number, mutations with their seeds, and the kind of digest."""

    subject: int
    mutations: tuple[tuple[str, int], ...]
    is_signed: bool

    @property
    def content(self) -> bytes:
        """The file."""
        found = _subject(self.subject).content
        for name, seed in self.mutations:
            try:
                found = MUTATIONS[name](found, random.Random(seed)) or b"\0"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
                continue  # those before it left nothing that it could change
        return signed(found) if self.is_signed else found

    def __str__(self) -> str:
        """One line."""
        kind = "signed" if self.is_signed else "unsigned"
        return f"{SUBJECTS[self.subject]}, {kind}, {', '.join(f'{name}({seed})' for name, seed in self.mutations)}"


@dataclass
class Result:
    """What came of a run.

    Attributes:
        tried: mutants.
        failures: a line for each that failed.
    """

    tried: int = 0
    failures: list[str] = field(default_factory=list)


def run(seed: int, minutes: float | None, count: int | None, save: Path | None) -> Result:
    """Tries mutants until time or number is reached.

    Args:
        seed: of all of them.
        minutes: how long, or None.
        count: how many, or None.
        save: folder for failing ones, made as small as they get, or None.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    found, draw, worker = Result(), random.Random(seed), Worker()
    try:
        while (count is None or found.tried < count) and (deadline is None or time.monotonic() < deadline):
            mutant = drawn(draw)
            found.tried += 1
            if worker.judge(mutant):
                smallest = minimised(mutant, worker)
                where = ""
                if save is not None:
                    save.mkdir(parents=True, exist_ok=True)
                    path = save / f"plan-{hashlib.sha256(smallest.content).hexdigest()[:12]}.safetensors"
                    path.write_bytes(smallest.content)
                    where = f", saved as {path}"
                found.failures.append(f"{smallest}: {worker.judge(smallest)}{where}")
    finally:
        worker.close()
    return found


def drawn(draw: random.Random) -> Mutant:
    """A mutant."""
    names = [draw.choice(list(MUTATIONS)) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    subject = draw.randrange(len(SUBJECTS))
    return Mutant(subject, tuple((name, draw.getrandbits(32)) for name in names), draw.random() < 0.7)


def minimised(mutant: Mutant, worker: "Worker") -> Mutant:
    """The mutant with as few mutations as still fail."""
    for i in reversed(range(len(mutant.mutations))):
        smaller = mutant._replace(mutations=mutant.mutations[:i] + mutant.mutations[i + 1 :])
        if worker.judge(smaller):
            mutant = smaller
    return mutant


class Worker:
    """A process that judges mutants, begun anew when one of them ended it."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._folder = tempfile.TemporaryDirectory()
        self._process: Any = None
        self._pipe: Connection | None = None

    def judge(self, mutant: Mutant) -> str | None:
        """What is wrong with a mutant's fate, or None."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self._folder.name), daemon=True)
            self._process.start()
            other.close()
        assert self._pipe is not None
        try:
            self._pipe.send(mutant)
            if self._pipe.poll(_PATIENCE):
                verdict: str | None = self._pipe.recv()
                return verdict
            verdict = f"no answer within {_PATIENCE:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            verdict = f"the process died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        self._end()
        return verdict

    def close(self) -> None:
        """Ends the process."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            assert self._pipe is not None
            self._pipe.close()
            self._process.join(timeout=5)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("tardis_fx").setLevel(logging.CRITICAL)
    for number in range(10**9):
        try:
            mutant = pipe.recv()
        except (EOFError, ConnectionError):
            return
        pipe.send(verdict_of(mutant, Path(folder, "plan"), thorough=number % 25 == 0))


def verdict_of(mutant: Mutant, path: Path, *, thorough: bool) -> str | None:
    """What is wrong with a mutant's fate, or None; see the module's docstring.

    Args:
        mutant: to be judged in this process, which it may end.
        path: of a file to write it to.
        thorough: compile by Dynamo, explain and release, too.
    """
    subject = _subject(mutant.subject)
    path.write_bytes(mutant.content)
    found: list[Tensor] = []
    try:
        plan = Plan.load(path)
        assert str(plan)
        options: dict[str, Any] = {"plan": plan, "inner": "eager", "select": "always"}
        with torch.no_grad():
            compiled = backend.tardis(subject.gm, list(subject.values), options=options)
            found += compiled(*subject.values)
            if thorough:
                torch._dynamo.reset()
                model = copy.deepcopy(subject.model)
                assert str(explain(model, path, subject.x))
                found.append(torch.compile(model, backend="tardis", options={**options, "plan": str(path)})(subject.x))
                release(model, path, subject.x)
                torch._dynamo.reset()
                found.append(torch.compile(model, backend="tardis", options=options)(subject.x))
    except (PlanFileError, PlanMismatchError):
        return None
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"[:500]
    for output in found:
        if (output.shape, output.dtype) != (subject.output.shape, subject.output.dtype):
            return f"the output is {output.dtype} {tuple(output.shape)}"
        if not mutant.is_signed and relative_error(output, subject.output) > 1e-4:
            return f"the output is wrong by {relative_error(output, subject.output):.3g}"
        if {name for name, _ in mutant.mutations} <= HARMLESS_TO_NUMBERS and not output.isfinite().all():
            return "the output holds NaN or infinity"
    return None


class Block(nn.Module):
    """Two FFNs in a row, so that one plan has two entries."""

    def __init__(self, *, gated: bool) -> None:
        """Makes small FFNs."""
        super().__init__()
        make = gated_ffn if gated else ffn
        self.first, self.second = (make(_D, _HIDDEN, seed=seed) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(self.first(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Subject:
    """A model with the file of its plan, its graph, and what the compiled model gives."""

    model: nn.Module
    x: Tensor
    content: bytes
    gm: torch.fx.GraphModule
    values: list[Tensor]
    output: Tensor


@cache
def _subject(number: int) -> _Subject:
    method, options = SUBJECTS[number]
    options = {"budget": 0.6, "prefill": "rewritten", "progress": False, **options}
    model = Block(gated=options.pop("gated", False)).eval()
    trained = method.removesuffix("+finetuned")
    batches = [inputs(256, _D, seed=seed) for seed in (3, 4)]
    plan = calibrate(model, batches, config=Config(method=trained, **options))
    x = inputs(_TOKENS, _D, seed=5)
    gm, values, sites = capture(model, x)
    if trained != method:
        values_of = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True))
        weights = [SiteWeights.from_site(site, [values_of[node] for node in site.parameters]) for site in sites]
        plan = replace(
            plan,
            sites=tuple(
                replace(
                    entry,
                    method=method,
                    settings={"inner": entry.settings},
                    tensors=rewrite_named(trained).constants(entry, own),
                )
                for entry, own in zip(plan.rewritten, weights, strict=True)
            ),
        )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plan.save(Path(folder, "plan"))
        content = Path(folder, "plan").read_bytes()
        (output,) = backend.tardis(gm, list(values), options={"plan": plan, "inner": "eager", "select": "always"})(
            *values
        )
    return _Subject(model, x, content, gm, values, output)
