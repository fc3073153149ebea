"""Healing that is interrupted and resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.healing import STEPS, TEXT, Language, healed, language_plan, same

from tardis_fx import (
    CheckpointError,
)
from tardis_fx.healing import checkpoint as checkpoints


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a healing leaves behind that stops after its first evaluation."""
    path, save = tmp_path_factory.mktemp("interrupted") / "healing", checkpoints.save

    def stop(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            healed(Language(), language_plan(4), checkpoint=path)
    return path


def test_a_resumed_healing_ends_where_an_uninterrupted_one_does(tmp_path: Path, interrupted: Path) -> None:
    model, plan, path = Language(), language_plan(4), tmp_path / "healing"
    shutil.copy(interrupted, path)
    resumed = healed(model, plan, checkpoint=path)
    assert path.read_bytes() != interrupted.read_bytes()
    assert same(resumed, healed(model, plan))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changed", [{"steps": STEPS + 1}, {"learning_rate": 0.02}, {"given": TEXT[1:]}, {"plan": language_plan}]
)
def test_a_checkpoint_of_another_healing_is_refused(interrupted: Path, changed: dict[str, Any]) -> None:
    arguments = {"plan": language_plan(4)} | changed
    if callable(arguments["plan"]):
        arguments["plan"] = language_plan()
    with pytest.raises(CheckpointError, match="another plan"):
        healed(Language(), checkpoint=interrupted, **arguments)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model, path = Language(), tmp_path / "healing"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        healed(model, language_plan(), checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        healed(Language(), language_plan(), checkpoint=tmp_path / "nowhere" / "healing", steps=1)
