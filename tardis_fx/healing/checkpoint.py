"""Saves the state of healing to a file, so that it can resume after an interruption."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tardis_fx.digest import digest
from tardis_fx.errors import CheckpointError
from tardis_fx.observation.batches import Batch
from tardis_fx.plan import Plan
from tardis_fx.tensorfile import replacing


@dataclass
class State:
    """State of healing after some steps.

    Attributes:
        best: loss of the best evaluation.
        best_step: step of the best evaluation; 0 is the unhealed plan.
    """

    step: int
    best: float
    best_step: int
    best_parameters: list[Tensor]
    parameters: list[Tensor]
    optimiser: dict[str, Any]


def identity(plan: Plan, batches: Sequence[Batch], **settings: float) -> str:
    """Hash of everything that healing depends on except the model, whose weights the plan identifies."""
    entries = [(site.fingerprint, dict(site.tensors)) for site in plan.rewritten]
    return digest(settings, entries, pytree.tree_leaves(list(batches)))


def save(path: str | os.PathLike[str], owner: str, state: State) -> None:
    """Writes a state to a file, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            torch.save({"identity": owner, **vars(state)}, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}") from error


def load(path: str | os.PathLike[str], owner: str) -> State | None:
    """Reads a state, or returns None if there is no file.

    Raises:
        CheckpointError: the file is not a checkpoint, or belongs to another healing.
    """
    if not Path(path).exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored_owner = content.pop("identity")
        state = State(**content)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {type(error).__name__}: {error}") from error
    if stored_owner != owner:
        raise CheckpointError(
            f"{path} belongs to another plan, other batches or other settings: delete it, or name another checkpoint"
        )
    return state
