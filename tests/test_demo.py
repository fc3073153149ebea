"""The demo, on less text and with fewer rounds."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tardis_fx.bench import large, shapes
from tardis_fx.cli import main as cli
from tardis_fx.demo import corpus, run
from tardis_fx.errors import DemoError
from tardis_fx.measure.progress import steps
from tardis_fx.measure.timing import LEAST_ROUNDS
from tardis_fx.runtime.touched import count_touched


def test_the_demo_measures_every_method_writes_its_picture_and_beats_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WINDOWS", 8)
    monkeypatch.setattr(run, "ROUNDS", 1)
    monkeypatch.setattr(run, "NEW_TOKENS", 8)
    monkeypatch.setattr(run, "PARETO", {"paper": (0.2,), "partial_linear": (0.06, 0.2)})
    monkeypatch.setattr(run, "SHOWN", [("paper", 0.2), ("partial_linear", 0.06)])
    console = Console(record=True, width=160)

    results = run.run_demo(tmp_path / "pareto.png", console)

    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    qualities = {key: quality for key, (_, quality) in results.plans.items()}
    assert results.dense.agreement == 1
    ours, smaller, paper = (
        qualities[key] for key in (("partial_linear", 0.2), ("partial_linear", 0.06), ("paper", 0.2))
    )
    assert ours.perplexity < smaller.perplexity < paper.perplexity
    assert ours.perplexity < 1.01 * results.dense.perplexity
    assert ours.agreement > smaller.agreement > paper.agreement
    assert all(plan.touched_fraction <= budget + 1e-3 for (_, budget), (plan, _) in results.plans.items())
    assert len(results.texts) == len(results.seconds) == 3
    table = console.export_text()
    assert all(label in table for label in ("dense (Inductor)", "TARDIS (paper)", "TARDIS (ours)", "tokens of prompt"))
    finished = ["TARDIS (ours), 6.0% calibrated and measured", "TARDIS (ours), 6.0% compiled", "decoded"]
    assert [line for line in table.splitlines() if line in finished] == finished  # where no bar can be drawn


def test_the_large_row_is_a_plan_against_inductor_with_freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "gpt2-xl", ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 48}))
    monkeypatch.setattr(large, "LAYERS", 2)
    console = Console(record=True, width=200)
    with count_touched() as touched:
        dense, ours = large.large_decoding(console)
    assert [dense.name, ours.name] == ["Inductor; freezing", "partial_linear, as calibrated; freezing"]
    rounds = LEAST_ROUNDS + 2  # one compiles and one warms up
    assert touched.tokens == 2 * large.STEPS * (rounds + 1)  # the first are counted for the bytes
    assert touched.outlier_rate == pytest.approx(0.25, rel=0.1)
    assert ours.touched < dense.touched
    text = console.export_text()
    assert "2 of the 48 layers of GPT-2 XL" in text
    assert "stay in the processor's cache" in text


def test_the_large_row_does_without_freezing_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "gpt2-xl", ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 48}))
    monkeypatch.setattr(large, "available_memory", lambda: large.LAYER)
    monkeypatch.setattr("tardis_fx.bench.model.available_memory", lambda _: 0)
    rows = large.large_decoding(Console(quiet=True))
    assert [row.name for row in rows] == ["Inductor", "partial_linear, as calibrated"]
    assert "1 of 48 layers" in rows[0].case


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    for terminal in (False, True):
        file = io.StringIO()
        with steps(Console(file=file, force_terminal=terminal), 1) as done:
            done("something [measured]")
        assert (file.getvalue() == "something [measured]\n") is not terminal


def test_no_module_is_in_two_splits_and_a_unit_test_is_where_its_module_is() -> None:
    splits = [{path for path, _ in corpus.modules(split)} for split in ("train", "calibration", "test")]
    assert all(splits)
    assert not any(a & b for i, a in enumerate(splits) for b in splits[:i])
    assert corpus.split_of(Path("test/test_textwrap.py")) == corpus.split_of(Path("textwrap.py"))
    assert corpus.split_of(Path("json/__init__.py")) == corpus.split_of(Path("test/test_json/__init__.py"))


def test_a_standard_library_without_sources_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no Python source"):
        list(corpus.modules("test", tmp_path))


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="cannot write .*pareto.png"):
        run.run_demo(tmp_path / "missing" / "pareto.png", Console(quiet=True))


def test_a_users_mistake_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tardis", "inspect", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("tardis: no plan file")


def test_the_commands_say_what_they_do() -> None:
    text = CliRunner().invoke(cli.app, ["--help"]).output
    assert "demo" in text
    assert "inspect" in text
