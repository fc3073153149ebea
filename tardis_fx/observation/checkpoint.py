"""Stores the statistics of finished runs, so that an interrupted calibration resumes after the last finished run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tardis_fx.errors import CheckpointError
from tardis_fx.observation.merging import statistics
from tardis_fx.tensorfile import check_digest, read, write

_FORMAT = "tardis_fx.statistics"


class Checkpoint:
    """A folder with one numbered safetensors file for each run.

    A fit makes its decisions from statistics alone: equal statistics lead to equal runs.
    """

    def __init__(self, folder: str | os.PathLike[str], owner: str) -> None:
        """Opens the folder, and creates it if necessary.

        Args:
            folder: used by this calibration only.
            owner: hash of everything that the statistics depend on.

        Raises:
            CheckpointError: it is not a folder, or cannot be created.
        """
        self._folder, self._owner = Path(folder), owner
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot store checkpoints in {folder}: {error}") from error

    def restore(self, run: int, title: str, observers: Mapping[str, Any]) -> bool:
        """Loads the statistics of a finished run into new observers; returns whether the run was stored.

        Raises:
            CheckpointError: the file is damaged or belongs to another calibration.
        """
        path = self._path(run)
        if not path.exists():
            return False
        try:
            stored, header = read(path)
            check_digest(stored, header)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from error
        wanted = statistics(observers)
        if not self._header(title).items() <= header.items() or stored.keys() != wanted.keys():
            raise CheckpointError(
                f"{path} belongs to another model, batches or config: delete {self._folder}, or name another folder"
            )
        for name, statistic in wanted.items():
            if statistic.how != "joined" and stored[name].shape != statistic.value.shape:
                raise CheckpointError(f"{path} was written by another version of tardis_fx: delete {self._folder}")
            statistic.assign(stored[name])
        return True

    def store(self, run: int, title: str, observers: Mapping[str, Any]) -> None:
        """Writes the statistics of a finished run atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = {name: statistic.value.contiguous().clone() for name, statistic in statistics(observers).items()}
        try:
            write(self._path(run), tensors, self._header(title))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write checkpoint {self._path(run)}: {error}") from error

    def _path(self, run: int) -> Path:
        return self._folder / f"run-{run:03}.safetensors"

    def _header(self, title: str) -> dict[str, str]:
        return {"format": _FORMAT, "owner": self._owner, "what": title}
