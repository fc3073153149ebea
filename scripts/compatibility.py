"""The oldest releases that pyproject.toml admits, and docs/compatibility.md, the table of tested releases.

python scripts/compatibility.py bounds FILE            writes a constraint `name==oldest` for every dependency
python scripts/compatibility.py record LANE REPORT     writes the column `oldest` or `newest` from this environment

Run by `nox -s oldest newest`. Exits with 1 where a test of the report failed.
"""

import argparse
import datetime
import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("gpu", "demo", "testing", "test", "bench")
LANES = ("oldest", "newest")
HEAD = """# Compatibility

The releases that the test suite was last run with: the oldest and the newest that `pyproject.toml` admits. Written by
`nox -s oldest newest`.

| | promised | oldest tested | newest tested |
|---|---|---|---|
"""


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bounds").add_argument("file", type=Path)
    record = commands.add_parser("record")
    record.add_argument("lane", choices=LANES)
    record.add_argument("report", type=Path)
    record.add_argument("--page", type=Path, default=ROOT / "docs" / "compatibility.md")
    arguments = parser.parse_args()
    if arguments.command == "bounds":
        lower = [(r.name, s) for r in requirements() for s in r.specifier if s.operator in (">=", "==")]
        arguments.file.write_text("".join(f"{name}=={specifier.version}\n" for name, specifier in lower))
        return 0
    suite = ElementTree.parse(arguments.report).getroot().find("testsuite")
    assert suite is not None, f"{arguments.report} is no report of pytest"
    tests = suite.attrib
    failed = int(tests["failures"]) + int(tests["errors"])
    passed = int(tests["tests"]) - failed - int(tests["skipped"])
    result = f"{passed} passed, {tests['skipped']} skipped" + (f", {failed} failed" if failed else "")
    write(arguments.page, arguments.lane, tested(result))
    return 1 if failed else 0


def requirements() -> list[Requirement]:
    """Requirements in pyproject.toml, without development tools."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, lines) if not requirement.name.startswith("tardis")]


def tested(result: str) -> dict[str, tuple[str, str]]:
    """Rows of the table: name, promised and tested release."""
    rows = {
        "date": ("", datetime.datetime.now(datetime.UTC).date().isoformat()),
        "result": ("", result),
        "platform": ("", f"{platform.system()}, {platform.machine()}"),
        "Python": (PROJECT["requires-python"], platform.python_version()),
    }
    for requirement in sorted(requirements(), key=lambda r: r.name):
        try:
            release = version(requirement.name)
        except PackageNotFoundError:
            release = "not installed"
        rows[requirement.name] = (str(requirement.specifier) or "any", release)
    return rows


def write(page: Path, lane: str, rows: dict[str, tuple[str, str]]) -> None:
    """Replaces a lane's column; the other stays."""
    before = {}
    if page.exists():
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
        before = {row[0]: dict(zip(LANES, row[2:], strict=True)) for row in cells if len(row) == 4}
    lines = []
    for name, (promised, release) in rows.items():
        columns = before.get(name, {}) | {lane: release}
        lines.append(f"| {name} | {promised} | {' | '.join(columns.get(key) or 'not run' for key in LANES)} |\n")
    page.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    sys.exit(main())
