"""The fuzzer: it finds faults that are put into the product, makes them small, and finds none in the product as it is."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from builders import killing
from fuzz import hunt as fuzz
from fuzz import runs as fuzz_runs
from fuzz.cases import Blocks, Choices, Failure, Judged, drawn, minimise
from fuzz.hunt import hunt, judge
from fuzz.process import Worker
from typer.testing import CliRunner

from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.snapshot import Snapshot

command = typer.Typer()
command.command()(fuzz.main)


def backend(_number: int) -> str:
    return "backend"


def dynamo(_number: int) -> str:
    return "dynamo"


# ---- Cases


def test_choices_are_zero_where_a_block_has_ended() -> None:
    choices = Choices(b"\x05")
    assert [choices.below(4), choices.below(4), choices.pick("xyz"), choices.once_in(2)] == [1, 0, "x", False]


def test_a_case_is_drawn_by_its_seed_and_number() -> None:
    assert drawn(1, 2, most=9) == drawn(1, 2, most=9)
    assert drawn(1, 2, most=9) != drawn(1, 3, most=9)


def test_the_smallest_case_with_the_same_fault_is_found() -> None:
    def attempt(blocks: Blocks) -> Failure | None:
        large = [block for block in blocks[1:] if block[:1] > b"\x40" and len(block) > 2]
        return Failure("program", "backend", blocks, "two", "") if len(large) > 1 else None

    failure = attempt((b"header", *(bytes([200 - i]) * 20 for i in range(9))))
    assert failure is not None
    smallest = minimise(failure, attempt)
    assert smallest.blocks[0] == b""
    assert sorted(map(len, smallest.blocks[1:])) == [3, 3] or len(smallest.blocks) == 3


def test_a_saved_case_is_read_again(tmp_path: Path) -> None:
    failure = Failure("weights", "dynamo", (b"\x00\xff", b""), "wrong answer", "by 2", "code")
    assert Failure.load(failure.save(tmp_path)) == failure
    (tmp_path / "other").write_text("{}")
    for name in ("other", "missing"):
        with pytest.raises(ConfigError, match="no saved case"):
            Failure.load(tmp_path / name)


# ---- What is put into the product is found


def found(kind: str, count: int, save: Path, route: Any = backend) -> list[Failure]:
    return hunt(kind, 1, count, route, judge, save=save)


def test_programs_find_a_wrong_bias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rewrite = rewrite_named("guarded_fold")
    constants = rewrite.constants

    def wrong(plan: SitePlan, weights: SiteWeights) -> Mapping[str, Any]:
        made = constants(plan, weights)
        return made | {"folded_bias": made["folded_bias"] + 1} if len(made["folded_bias"]) < 8 else made

    monkeypatch.setattr(rewrite, "constants", wrong)
    failures = found("program", 24, tmp_path)
    wrong_answers = [failure for failure in failures if failure.fault == "wrong answer"]
    assert wrong_answers
    smallest = min(wrong_answers, key=lambda failure: len(failure.code))
    assert len([line for line in smallest.code.splitlines() if " = " in line]) <= 5, "one FFN and what it is added to"
    assert any(tmp_path.iterdir())


def test_what_inductor_does_wrong_is_tried_as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "holds", lambda *_: 1 / 0)
    _, failure = judge("program", "inductor", drawn(3, 0, most=12))
    assert failure is not None
    assert failure.route == "inductor_cpp"


def test_programs_find_an_error_of_no_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(Snapshot, "holds", fails)
    failures = found("program", 8, tmp_path)
    assert any("KeyError" in failure.fault for failure in failures)


def test_histories_find_a_guard_that_sees_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Snapshot, "holds", lambda self, tensors: True)
    failures = found("weights", 2, tmp_path, dynamo)
    assert any(failure.fault.startswith("wrong answer after") for failure in failures)
    assert any(tmp_path.iterdir())


# ---- The product as it is


def test_programs_are_rewritten_more_often_than_not() -> None:
    verdicts = Counter(judge("program", "backend", drawn(2, number, most=12)).verdict for number in range(60))
    assert verdicts["rewritten"] > 36, verdicts
    assert verdicts["invalid"] < 6, verdicts


@pytest.mark.parametrize("route", ["dynamo", "inductor"])
def test_programs_run_every_way(route: str) -> None:
    verdicts = Counter(judge("program", route, drawn(3, number, most=12)).verdict for number in range(6))
    assert verdicts["rewritten"] > 2, verdicts


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "layout",
    [lambda x: x, lambda x: x[..., 1:], lambda x: x[:, :1], lambda x: x.t().contiguous().t(), lambda x: x[None]],
)
def test_a_second_call_has_twice_the_tokens_in_the_same_layout(
    layout: Callable[[torch.Tensor], torch.Tensor], tokens: int
) -> None:
    x = layout(torch.randn(tokens, 4))
    doubled = fuzz_runs._doubled(x)
    assert torch.equal(doubled, torch.cat([x, x]))
    assert doubled.is_contiguous() == x.is_contiguous()


# ---- The command


def test_the_command_passes_and_tells_its_seed() -> None:
    result = CliRunner().invoke(command, ["--seed", "6", "--programs", "12", "--weights", "2", "--plans", "5"])
    assert result.exit_code == 0, result.output
    assert "seed 6" in result.output
    for kind, count in (("program", 12), ("weights", 2), ("plans", 5)):
        assert f"{kind}: {count} tried" in result.output


def test_a_saved_case_is_run_again(tmp_path: Path) -> None:
    path = Failure("program", "backend", drawn(2, 0, most=12), "wrong answer", "").save(tmp_path)
    result = CliRunner().invoke(command, ["--replay", str(path)])
    assert (result.exit_code, result.output.strip()) == (0, "rewritten")
    assert CliRunner().invoke(command, ["--replay", str(tmp_path / "none")]).exit_code == 2


# ---- Crashes


def test_a_case_that_kills_its_process_is_one_that_is_known(tmp_path: Path) -> None:
    worker = Worker(killing.judge, timeout=60)
    try:
        assert worker.judge("program", "backend", (b"\1",)) == Judged("right")
        verdict, failure = worker.judge("program", "backend", (b"\1", b"\2\xff"))
        assert verdict == "crashed"
        assert failure is not None
        assert failure.fault == "died of SIGSEGV"
        assert worker.judge("program", "backend", (b"\3",)) == Judged("right"), "a new process"
    finally:
        worker.close()


def test_a_case_without_an_answer_is_a_failure() -> None:
    worker = Worker(killing.judge, timeout=60)
    try:
        assert worker.judge("program", "backend", (b"\1",)) == Judged("right")  # by now the process has begun
        worker.timeout = 0.5
        verdict, failure = worker.judge("program", "backend", (b"\xfe",))
        assert verdict == "crashed"
        assert failure is not None
        assert failure.fault == "no answer"
    finally:
        worker.close()
