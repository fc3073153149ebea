"""Checks that need an environment of their own: `nox -s oldest newest lint types docs`.

`oldest` and `newest` install the oldest and the newest release of every dependency that pyproject.toml admits, run the
suite, and write the result to docs/compatibility.md. `deprecations` runs the suite with every warning as an error,
to find the source of a warning that .ci/run reports. Arguments behind `--` go to pytest.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "docs"]

EVERYTHING = ".[test,bench]"


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The suite with the oldest releases, Python's too."""
    bounds = Path(session.create_tmp(), "oldest.txt")
    session.install("packaging")
    session.run("python", "scripts/compatibility.py", "bounds", str(bounds))
    session.install(EVERYTHING, "-c", str(bounds))
    _test_and_record(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The suite with the newest releases, Python's too."""
    session.install("packaging")
    session.install("--upgrade", "--upgrade-strategy", "eager", EVERYTHING)
    _test_and_record(session)


@nox.session
def deprecations(session: nox.Session) -> None:
    """The suite with the newest releases, every warning an error."""
    session.install("--upgrade", "--upgrade-strategy", "eager", EVERYTHING)
    session.run("python", "-m", "pytest", "-W", "error", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install(".[dev]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; a broken link is an error."""
    session.install(".[docs]")
    site = Path(session.create_tmp(), "site")
    session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site), env={"NO_MKDOCS_2_WARNING": "1"})


def _test_and_record(session: nox.Session) -> None:
    report = Path(session.create_tmp(), "report.xml").absolute()
    session.run("python", "-m", "pytest", f"--junitxml={report}", *session.posargs, success_codes=[0, 1])
    session.run("python", "scripts/compatibility.py", "record", session.name.partition("-")[0], str(report))
