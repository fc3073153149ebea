"""The fuzzer of plan files finds what is wrong, and finds nothing."""

import random
from pathlib import Path

import pytest
import torch
from fuzz import plans as fuzz_plans
from fuzz.mutations import MUTATIONS
from fuzz.plans import SUBJECTS, Mutant, Worker, drawn, minimised, run, verdict_of

from tardis_fx import Plan

LOW_RANK = next(i for i, (method, _) in enumerate(SUBJECTS) if method == "low_rank")


def mutants(count: int, *names: str, is_signed: bool) -> list[Mutant]:
    return [Mutant(LOW_RANK, ((name, seed),), is_signed) for seed in range(count) for name in names]


def test_no_mutant_does_harm() -> None:
    found = run(0, None, 60, None)
    assert found.tried == 60
    assert not found.failures


def test_the_plans_themselves_are_accepted(tmp_path: Path) -> None:
    """Or else every mutant would be refused for no fault of its own."""
    for subject in range(len(SUBJECTS)):
        for is_signed in (False, True):
            assert verdict_of(Mutant(subject, (), is_signed), tmp_path / "plan", thorough=False) is None
        Plan.load(tmp_path / "plan")
        assert torch.isfinite(fuzz_plans._subject(subject).output).all()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_the_file_and_can_be_made_again(name: str) -> None:
    whole = Mutant(LOW_RANK, (), is_signed=False).content
    made = [mutant.content for mutant in mutants(20, name, is_signed=False)]
    assert made == [mutant.content for mutant in mutants(20, name, is_signed=False)]
    assert sum(content != whole for content in made) >= 10


def test_without_the_digest_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tardis_fx.planfile.check_digest", lambda *_: None)
    found = [verdict_of(m, tmp_path / "plan", thorough=False) for m in mutants(40, "copy", "flip", is_signed=False)]
    assert any(verdict and "wrong by" in verdict for verdict in found)


def test_without_the_check_of_entries_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tardis_fx.passes.pipeline.check_entry", lambda *_: None)
    found = [verdict_of(m, tmp_path / "plan", thorough=False) for m in mutants(40, "layout", "content", is_signed=True)]
    assert any(verdict and "Error" in verdict for verdict in found)


def test_a_mutant_that_ends_the_process_is_reported_and_the_next_one_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    try:
        good = Mutant(LOW_RANK, (), is_signed=False)
        assert worker.judge(good) is None
        worker._process.kill()
        assert "SIGKILL" in str(worker.judge(good))
        assert worker.judge(good) is None
        monkeypatch.setattr(fuzz_plans, "_PATIENCE", 0.0)
        assert "no answer" in str(worker.judge(good))
    finally:
        worker.close()


class Fake:
    """A worker that finds fault with every mutant that flips bytes."""

    def judge(self, mutant: Mutant) -> str | None:
        return "flipped" if "flip" in dict(mutant.mutations) else None

    def close(self) -> None:
        pass


def test_a_failing_mutant_is_made_smaller_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = Mutant(LOW_RANK, (("cut", 1), ("flip", 2), ("values", 3), ("flip", 4)), is_signed=False)
    smallest = minimised(mutant, Fake())  # type: ignore[arg-type]
    assert len(smallest.mutations) == 1
    assert smallest.mutations[0][0] == "flip"
    monkeypatch.setattr(fuzz_plans, "Worker", Fake)
    monkeypatch.setattr(fuzz_plans, "drawn", lambda _: mutant)
    found = run(0, None, 1, tmp_path / "failing")
    (line,) = found.failures
    (path,) = (tmp_path / "failing").iterdir()
    assert path.read_bytes() == smallest.content
    assert str(path) in line
    assert "flip" in line


def test_time_ends_a_run() -> None:
    assert run(0, 0.0, None, None).tried == 0


def test_the_same_seed_draws_the_same_mutants() -> None:
    first, second = ([drawn(draw) for _ in range(50)] for draw in (random.Random(3), random.Random(3)))
    assert first == second
    assert {name for mutant in first for name, _ in mutant.mutations} == set(MUTATIONS)
