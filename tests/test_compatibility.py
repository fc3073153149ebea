"""The table of tested releases, as `nox -s oldest newest` writes it."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "compatibility.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    return runpy.run_path(str(SCRIPT))["main"]()


def report(folder: Path, failures: int) -> Path:
    path = folder / "report.xml"
    path.write_text(
        f'<testsuites><testsuite tests="9" errors="0" failures="{failures}" skipped="2"></testsuite></testsuites>'
    )
    return path


def test_every_dependency_with_a_lower_bound_is_pinned_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "bounds", tmp_path / "oldest.txt")
    lines = (tmp_path / "oldest.txt").read_text().splitlines()
    assert {"torch==2.13", "transformers==5.22", "pytest==8"} <= set(lines)
    assert all(line.count("==") == 1 for line in lines)


def test_a_column_is_replaced_and_the_other_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "compatibility.md"
    for lane, failures, code in (("oldest", 0, 0), ("newest", 3, 1), ("newest", 0, 0)):
        arguments = ["record", lane, report(tmp_path, failures), "--page", page]
        assert run(monkeypatch, *arguments) == code
        result = f"{7 - failures} passed, 2 skipped" + (", 3 failed" if failures else "")
        column = 3 if lane == "oldest" else 4
        rows = {line.split("|")[1].strip(): line.split("|") for line in page.read_text().splitlines() if "|" in line}
        assert rows["result"][column].strip() == result
        assert rows["result"][3].strip() == "7 passed, 2 skipped"
    assert rows["torch"][2].strip() == "<2.14,>=2.13"
    assert rows["torch"][3].strip() == rows["torch"][4].strip() != ""
