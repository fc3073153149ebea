"""The example package is installed as a user would install it, and passes its own tests and the suite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "my_rewrite"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed package; built from a copy, so that neither its source nor its files interfere."""
    folder = tmp_path_factory.mktemp("scratch")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
    ]
    run([*pip, "--target", str(folder / "site"), str(source)])
    return folder / "site"


def run(arguments: list[str], *paths: Path) -> str:
    """Runs Python with more folders to import from, beside those of this process; returns its output."""
    found = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=paths[0].parent if paths else None,
        env=os.environ | {"PYTHONPATH": found},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_suite_passes_on_the_installed_rewrite(installed: Path) -> None:
    table = run(["-m", "tardis_fx.testing", "my_rewrite", "--examples", "2"], installed).splitlines()
    assert len(table) > 10
    assert all("| pass |" in line for line in table[2:])


def test_its_own_tests_pass(installed: Path) -> None:
    quick = ["--hypothesis-profile", "quick", "-p", "no:cacheprovider"]
    assert " passed" in run(["-m", "pytest", *quick, str(installed.parent / "source" / "tests")], installed)


def test_the_pass_is_under_60_lines() -> None:
    assert len((EXAMPLE / "my_rewrite.py").read_text().splitlines()) < 60
