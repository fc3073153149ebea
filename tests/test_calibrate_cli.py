"""The command ``tardis calibrate``."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from builders.checkpoints import save_checkpoint
from builders.ffns import entries
from builders.models import gpt2, tokens
from typer.testing import CliRunner

from tardis_fx import (
    CalibrationError,
    CheckpointError,
    Config,
    ConfigError,
    Plan,
    PlanFileError,
    TardisError,
    calibrate,
)
from tardis_fx.cli.main import app
from tardis_fx.demo.model import cut

TEXT = tokens(2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 and a tokenizer of words, as files, and a text."""
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, gpt2().bfloat16(), TEXT)
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    text = str(folder / "text.txt")
    return ["calibrate", str(out), "--model", str(folder), "--text", text, "--windows", "20", *more]


def plans_of(plan: Plan) -> list[dict[str, object]]:
    return [
        vars(site) | {"tensors": {name: tensor.tolist() for name, tensor in site.tensors.items()}}
        for site in entries(plan)
    ]


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the only process that it starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name, value in (group | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("torchrun")
def test_the_command_writes_the_plan_that_the_function_returns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    initialise = dist.init_process_group

    def counted(*arguments: Any, **named: Any) -> None:
        groups.append(1)
        initialise(*arguments, **named)

    monkeypatch.setattr(dist, "init_process_group", counted)
    out, checkpoint = tmp_path / "plan", tmp_path / "checkpoint"
    method = ["--method", "wanda:budget=0.6", "--checkpoint", str(checkpoint)]
    result = CliRunner().invoke(app, arguments(folder, out, *method), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "2 wanda" in result.output
    assert len(groups) == 1
    assert not dist.is_initialized()
    plan = Plan.load(out)
    batches = list(cut(TEXT, 20, 64).split(8))
    config = Config(method="wanda", budget=0.6, progress=False)
    assert plans_of(plan) == plans_of(calibrate(gpt2().bfloat16(), batches, config=config))
    assert len(list(checkpoint.iterdir())) == 2
    other = arguments(folder, out, "--method", "wanda:budget=0.5", "--checkpoint", str(checkpoint))
    with pytest.raises(CheckpointError, match="another model, batches or config"):
        CliRunner().invoke(app, other, catch_exceptions=False)


def test_offloaded_the_command_runs_the_text_for_every_ffn_and_writes_the_same_plan(
    folder: Path, tmp_path: Path
) -> None:
    method, plans = ("--method", "wanda:budget=0.6,allocation=per_site"), []
    for name, more, runs in (("together", (), 2), ("apart", ("--offload",), 4)):
        more = (*more, "--checkpoint", str(tmp_path / f"{name}-runs"))
        CliRunner().invoke(app, arguments(folder, tmp_path / name, *method, *more), catch_exceptions=False)
        assert len(list((tmp_path / f"{name}-runs").iterdir())) == runs
        plans.append(Plan.load(tmp_path / name))
    assert plans_of(plans[0]) == plans_of(plans[1])


@pytest.mark.parametrize(
    ("more", "goal"),
    [
        (("--bits", "9.6"), {"bits": 9.6}),
        (("--target-kl", "0.2"), {"target_kl": 0.2}),
        (("--method", "wanda:bits=9.6"), {"bits": 9.6}),
    ],
)
def test_the_goal_may_be_bits_or_a_divergence(
    more: tuple[str, ...], goal: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    method = () if "--method" in more else ("--method", "wanda")
    result = CliRunner().invoke(app, arguments(folder, tmp_path / "plan", *method, *more), catch_exceptions=False)
    batches = list(cut(TEXT, 20, 64).split(8))
    wanted = calibrate(gpt2().bfloat16(), batches, config=Config(method="wanda", progress=False, **goal))
    plan = Plan.load(tmp_path / "plan")
    assert plans_of(plan) == plans_of(wanted)
    assert plan.kl == wanted.kl
    assert f"{wanted}, written to" in result.output


WRONG = {
    "a folder that is not there": (("--method", "wanda"), "nowhere/plan", PlanFileError),
    "two goals": (("--bits", "3", "--method", "wanda:budget=0.5"), "plan", ConfigError),
    "a goal given twice": (("--bits", "3", "--method", "wanda:bits=3"), "plan", ConfigError),
    "two goals as options": (("--bits", "3", "--target-kl", "0.1"), "plan", ConfigError),
    "two methods": (("--method", "wanda,gptq"), "plan", ConfigError),
    "a healing": (("--method", "wanda:healed=True"), "plan", ConfigError),
    "an unknown field": (("--method", "wanda:size=1"), "plan", ConfigError),
    "an unknown dtype": (("--dtype", "int3"), "plan", ConfigError),
    "an unknown device": (("--device", "tpu"), "plan", ConfigError),
    "no windows": (("--windows", "0"), "plan", ConfigError),
    "no text": (("--text", "nowhere"), "plan", CalibrationError),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_done_is_a_typed_error(wrong: str, folder: Path, tmp_path: Path) -> None:
    more, out, error = WRONG[wrong]
    assert issubclass(error, TardisError)
    with pytest.raises(error):
        CliRunner().invoke(app, arguments(folder, tmp_path / out, *more), catch_exceptions=False)
    assert not (tmp_path / out).exists()
