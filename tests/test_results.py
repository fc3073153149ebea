"""The page of results is made from its data files."""

from types import ModuleType

import pytest
from builders.scripts import load_script


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load_script("benchmarks/results.py")


def test_the_page_is_what_the_command_makes_of_the_data(results: ModuleType) -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), "run `python benchmarks/results.py`"


def test_every_data_file_is_shown_and_says_how_it_was_measured(results: ModuleType) -> None:
    prose = (results.DATA / "prose.md").read_text(encoding="utf-8")
    for path in results.DATA.glob("*.json"):
        assert f"{{{{ {path.stem} }}}}" in prose
        table = results.json.loads(path.read_text(encoding="utf-8"))
        assert table["command"]
        assert table["conditions"]


def test_figures_are_put_into_the_form_that_has_as_many_places(results: ModuleType) -> None:
    forms = ["{:+.1%}", "{:+.1%} ({:+.1%} to {:+.1%})"]
    assert results.cell("out of reach", forms) == "out of reach"
    assert results.cell(-0.0, forms) == "-0.0%"
    assert results.cell([0.25, 0.125, 0.5], forms) == "+25.0% (+12.5% to +50.0%)"
