"""The demo's text: the source of the running Python's standard library, split by module name.

The split depends only on a module's name, so that a module held out in training is held out on every machine and with
every Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tardis_fx.errors import DemoError

Split = Literal["train", "calibration", "test"]

#: Tables and generated text, which are not ordinary source code.
EXCLUDED = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib", "turtledemo", "lib2to3"})


def split_of(path: Path) -> Split:
    """The split of a module: 80% train, 10% calibration, 10% test, by a hash of its name.

    A module and its unit test (``textwrap`` and ``test_textwrap``) fall into the same split, so that no test of a
    held-out module is trained on. The path is relative to the standard library.
    """
    name = path.parent.name if path.stem in ("__init__", "__main__") else path.stem
    bucket = hashlib.sha256(name.removeprefix("test_").lstrip("_").encode()).digest()[0] / 256
    return "test" if bucket < 0.1 else "calibration" if bucket < 0.2 else "train"


def modules(split: Split, root: Path | None = None, *, unit_tests: bool = False) -> Iterator[tuple[Path, str]]:
    """The modules of one split, as (path relative to ``root``, source), in the order of their paths.

    Args:
        split: to read.
        root: folder of a standard library; None means that of the running Python.
        unit_tests: whether the library's own unit tests are included (used for training only).

    Raises:
        DemoError: ``root`` holds no source of this split (a Python installed without its sources).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    empty = True
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED.intersection(relative.parts) or split_of(relative) != split:
            continue
        if not unit_tests and {"test", "tests"}.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a test fixture in another encoding
            continue
        empty = False
        yield relative, text
    if empty:
        raise DemoError(
            f"no Python source for the {split} split under {root}: is the standard library installed as .py files?"
        )
