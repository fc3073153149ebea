"""The cache folder: ``$TARDIS_FX_CACHE``, else ``$XDG_CACHE_HOME/tardis_fx``, else ``~/.cache/tardis_fx``.

Folder and files are trusted only if they belong to the user or to root, and nobody else may write them.
"""

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, created if necessary; an OSError or RuntimeError if that fails or others can write it."""
    path = os.environ.get("TARDIS_FX_CACHE")
    folder = Path(path or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tardis_fx"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    if not is_trusted(folder):
        raise PermissionError(f"the cache folder {folder} belongs to another user, or others can write it")
    return folder


def is_trusted(path: Path) -> bool:
    """Whether only this user and root can change a file or folder."""
    status = path.lstat()
    mine = status.st_uid in (0, os.geteuid())
    return mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not path.is_symlink()
