"""Calibration by two processes, spawned once for all that must hold between them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.ffns import config, entries
from builders.ranks import CONFIGS, given, main, model
from torch.multiprocessing.spawn import spawn

from tardis_fx import Plan, calibrate


@dataclass(frozen=True)
class Outcome:
    """What two processes left behind."""

    folder: Path
    seconds: float

    def plans(self, name: str) -> list[Plan]:
        return [Plan.load(self.folder / f"{name}-{rank}") for rank in range(2)]

    def said(self, what: str) -> list[Any]:
        return [json.loads((self.folder / f"said-{rank}").read_text())[what] for rank in range(2)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it
    try:
        for name, chosen in CONFIGS.items():
            calibrate(model(), given(), config=chosen).save(folder / f"{name}-alone")
        calibrate(model(), given(), config=config(), checkpoint=folder / "checkpoint").save(folder / "resumed-alone")
    finally:
        torch.set_num_threads(threads)
    (folder / "checkpoint" / "run-003.safetensors").unlink()
    (folder / "file-0").touch()
    started = time.monotonic()
    context = spawn(main, (folder,), nprocs=2, join=False)
    for process in context.processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    return Outcome(folder, time.monotonic() - started)


@pytest.mark.parametrize("name", [*CONFIGS, "resumed"])
def test_two_ranks_return_the_plan_of_one_process(name: str, outcome: Outcome) -> None:
    alone = Plan.load(outcome.folder / f"{name}-alone")
    for plan in outcome.plans(name):
        for found, wanted in zip(entries(plan), entries(alone), strict=True):
            assert found.tensors.keys() == wanted.tensors.keys()
            for key, tensor in wanted.tensors.items():
                torch.testing.assert_close(
                    found.tensors[key], tensor, rtol=1e-5 if tensor.is_floating_point() else 0, atol=1e-6, msg=key
                )
            kept = {"tensors": None, "error": None, "touched_bytes": None, "outlier_rate": None}
            assert vars(found) | kept == vars(wanted) | kept
            assert found.touched_bytes == pytest.approx(wanted.touched_bytes, rel=1e-12)
            assert found.error == pytest.approx(wanted.error, rel=1e-5)


def test_both_ranks_return_the_same_plan_to_the_bit(outcome: Outcome) -> None:
    for name in (*CONFIGS, "partial_linear"):
        one, other = outcome.plans(name)
        for a, b in zip(entries(one), entries(other), strict=True):
            assert vars(a) | {"tensors": None} == vars(b) | {"tensors": None}
            assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def test_what_the_ranks_measure_in_a_trial_is_averaged(outcome: Outcome) -> None:
    assert outcome.said("trial") == [[2.0, 2.0]] * 2


def test_what_one_rank_cannot_use_is_an_error_on_both(outcome: Outcome) -> None:
    here, there = outcome.said("nan")
    assert "NaN" in here
    assert here == there.replace("Error: ", "Error: rank 1: ")
    assert here.startswith("CalibrationError: rank 1:")
    for said in outcome.said("checkpoint"):
        assert said.startswith("CheckpointError")


def test_a_rank_that_fails_with_an_error_of_its_own_tells_the_others(outcome: Outcome) -> None:
    here, there = outcome.said("batches that fail")
    assert there == "OSError: the disk is gone"
    assert here == "CalibrationError: rank 1: OSError: the disk is gone"
    here, there = outcome.said("a rewrite that fails")
    assert there.startswith("RewriteError: ")
    assert "ZeroDivisionError: a bug (" in there
    assert here == there.replace("RewriteError: ", "RewriteError: rank 1: ")
    assert outcome.seconds < 100, "nobody waits for a rank that has failed"


@pytest.mark.parametrize("what", ["batches", "configs", "threads"])
def test_ranks_that_differ_are_told_so(what: str, outcome: Outcome) -> None:
    for said in outcome.said(what):
        assert said.startswith("CalibrationError")
        assert "of rank 1 and of rank 0 differ" in said


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(outcome: Outcome) -> None:
    for shown in outcome.said("shown"):
        assert shown == "residuals at a budget of 0.5, part 1"


def test_a_rank_that_dies_ends_the_calibration_without_a_plan(outcome: Outcome) -> None:
    survivor, dead = (json.loads((outcome.folder / f"said-{rank}").read_text()) for rank in range(2))
    assert survivor["dying"].startswith("CalibrationError: another process of the calibration died")
    assert "dying" not in dead
    assert not list(outcome.folder.glob("dying*"))
