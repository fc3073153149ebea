"""Comparisons of tiny shapes: what is shown and written, and that a plan reads what it says; no times."""

import copy
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.ffns import ffn, inputs
from builders.gated import Gated
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tardis_fx.bench import shapes
from tardis_fx.bench.ffn import COLD, copies_for
from tardis_fx.bench.model import FROZEN, MARGIN, bench_model
from tardis_fx.bench.plans import GROUP_SIZE, Widths, ffn_weights, random_plans
from tardis_fx.bench.timings import Timing, report
from tardis_fx.calibrate import calibrate
from tardis_fx.cli import main as cli
from tardis_fx.config import Config
from tardis_fx.errors import BenchError, PlanMismatchError
from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.measure import machine, weight_only
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.measure.machine import Machine
from tardis_fx.measure.tables import write_csv
from tardis_fx.measure.timing import interleave
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.base import stored_bytes
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.runtime.touched import count_touched

HERE = Machine("a processor", 2, 1 << 20, 10.0, 20.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "measured", classmethod(lambda _: HERE))


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, too: one that another test has imported is found without the package."""
    for name in ["torchao", *(name for name in sys.modules if name.startswith("torchao."))]:
        monkeypatch.setitem(sys.modules, name, None)


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("measured")
def test_ffn_has_a_row_for_every_case_and_contender(tmp_path: Path) -> None:
    out = tmp_path / "ffn.csv"
    text = _run("ffn", "--d", 64, "--dtype", "float32", "--tokens", "1,9", "--bits", "2,4", "--copies", 3, "--csv", out)

    rows = _rows(out)
    assert [(row["case"], row["contender"]) for row in rows] == [
        ("d 64, float32, 1 token, 3 copies", "Inductor"),
        ("d 64, float32, 1 token, 3 copies", "tardis, 2 bits"),
        ("d 64, float32, 1 token, 3 copies", "tardis, 4 bits"),
        ("d 64, float32, 9 tokens, 3 copies", "Inductor"),
        ("d 64, float32, 9 tokens, 3 copies", "tardis, 2 bits (original runs)"),
        ("d 64, float32, 9 tokens, 3 copies", "tardis, 4 bits (original runs)"),
    ]
    table = re.sub(" +", " ", text)
    assert all(f"| {row['case']} | {row['contender']} |" in table for row in rows)
    assert "a processor, 2 threads" in text
    dense = 4 * (8 * 64 * 64 + 5 * 64)
    assert [float(row["MB"]) * 1e6 for row in rows if row["outliers"] == ""] == pytest.approx([dense] * 4)
    costs, rate = Costs.from_sizes(64, 64, 2, 4, k=1, group_size=GROUP_SIZE, bias=True), float(rows[1]["outliers"])
    expected = costs.fold + 256 * (costs.predictor + rate * costs.row)
    assert float(rows[1]["MB"]) * 1e6 == pytest.approx(expected)
    assert float(rows[1]["floor_ms"]) == pytest.approx(expected / 20e9 * 1e3)
    assert all(row["rounds"] == "9" and float(row["ratio_min"]) <= float(row["ratio_max"]) for row in rows)


@pytest.mark.usefixtures("measured", "without_torchao")
def test_model_has_a_row_for_every_contender_or_says_why_not(tmp_path: Path) -> None:
    out = tmp_path / "model.csv"
    text = _run("model", "--shape", "demo", "--layers", 1, "--steps", 16, "--context", 16, "--csv", out)

    dense, fast, *_ = rows = _rows(out)
    assert [row["contender"] for row in rows] == [
        "Inductor",
        "tardis, 2 bits",
        "Inductor; freezing",
        "tardis, 2 bits; freezing",
    ]
    assert "No row for torchao's int8 weights: torchao cannot be imported" in text
    assert "do not fill the last-level cache" in text
    costs, rate = Costs.from_sizes(256, 256, 2, 4, k=1, group_size=GROUP_SIZE, bias=True), float(fast["outliers"])
    less = 4 * (8 * 256**2 + 5 * 256) - costs.fold - 1024 * (costs.predictor + rate * costs.row)
    assert float(dense["MB"]) - float(fast["MB"]) == pytest.approx(less / 1e6)
    assert rate == pytest.approx(0.05, rel=0.5)  # of 16 tokens; the next test asks for more


@pytest.mark.parametrize(
    ("model", "widths", "rate", "dtype"),
    [
        (ffn(64, 256), Widths(2), 0.05, torch.float32),
        (ffn(64, 256), Widths(4), 0.05, torch.bfloat16),
        (ffn(64, 256), Widths(3), 0.2, torch.float32),
        (ffn(64, 256), Widths(2), 0.01, torch.float32),
        (ffn(64, 256), Widths(2, 4, 8), 0.05, torch.float32),
        (Gated(64, 172), Widths(2), 0.05, torch.float32),
        (Gated(64, 172, bias=False), Widths(4, 4, 8), 0.2, torch.bfloat16),
        (Gated(64, 172, fused=True), Widths(3, 8), 0.05, torch.float32),
    ],
)
def test_a_plan_has_the_outliers_that_were_asked_for(
    model: torch.nn.Module, widths: Widths, rate: float, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(dtype)
    plan = random_plans(model, inputs(1024, 64).to(dtype), [widths], rate)[widths]
    options: dict[str, Any] = {"plan": plan, "inner": "eager", "prefill": "rewritten"}
    fast, x = torch.compile(model, backend="tardis", options=options), inputs(2048, 64, seed=7).to(dtype)
    with torch.no_grad(), count_touched() as touched:
        output, exact = fast(x).float(), model(x).float()
    assert touched.outlier_rate == pytest.approx(rate, rel=0.1)
    assert touched.per_token == pytest.approx(plan.sites[0].touched_bytes, rel=0.1)
    assert (output - exact).norm() < 0.7 * exact.norm()  # a fold and not noise, so that inputs stay what they were


def test_a_model_without_an_ffn_that_can_be_rewritten_is_refused() -> None:
    without_activation = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
    with pytest.raises(BenchError, match="no FFN that the guarded fold accepts"):
        random_plans(without_activation.eval(), inputs(16, 8), [Widths(2)], 0.05)


def test_copies_fill_the_cache_with_what_the_rewritten_ffns_read() -> None:
    costs = Costs.from_sizes(256, 256, 2, 4, k=1, group_size=GROUP_SIZE, bias=True)
    read = costs.fold + 1024 * (costs.predictor + 0.05 * costs.row)
    count = copies_for(256, 4, Widths(2), 0.05, 1 << 25)
    assert (count - 1) * read < COLD << 25 <= count * read
    assert copies_for(8192, 4, Widths(2), 0.05, 1 << 20) == 2


def test_contenders_run_in_turn_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def runs(name: str) -> Any:
        def run() -> float:
            order.append(name)
            return len(order)

        return run

    assert interleave({"a": runs("a"), "b": runs("b")}, 2) == {"a": [3, 5], "b": [4, 6]}
    assert order == ["a", "b"] * 3


def test_ratios_are_taken_round_by_round() -> None:
    row = Timing("case", "name", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0], 4e9, 0.05)
    values = row.figures(HERE)
    assert (values["ratio_min"], values["ratio"], values["ratio_max"]) == (0.5, 1.0, 2.0)
    assert (values["ms"], values["GB/s"], values["floor_ms"]) == (2000, 2, 200)
    assert "| 5.00% |" in re.sub(" +", " ", report([row], HERE))


@pytest.mark.usefixtures("measured", "without_torchao")
def test_a_model_of_ones_own_decodes_by_ones_own_plan(tmp_path: Path) -> None:
    """Its weights, not random ones: a plan fits no others."""
    model = shapes.build(shapes.config_of("demo", 1), torch.float32, 1)
    model.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    tokens = torch.randint(256, (32, 16))
    plan = calibrate(model, tokens.split(8), config=Config(budget=0.4, progress=False))
    plan.save(tmp_path / "plan.safetensors")
    arguments, out = (
        ["model", "--model", tmp_path / "own", "--steps", 16, "--context", 16, "--csv"],
        tmp_path / "own.csv",
    )
    _run(*arguments, out, "--plan", tmp_path / "plan.safetensors")
    dense, fast, *_ = rows = _rows(out)
    assert [row["contender"] for row in rows if "freezing" not in row["contender"]] == ["Inductor", "tardis, plan"]
    (site,) = plan.sites
    assert rows[0]["case"].startswith("own, 1 layer, float32")
    assert (float(dense["MB"]) - float(fast["MB"])) * 1e6 == pytest.approx(
        site.dense_bytes - site.touched_bytes, rel=0.2
    )
    _run(*arguments, out)
    assert _rows(out)[1]["contender"] == "tardis, 2 bits"
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight").mul_(2)
    model.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    with pytest.raises(PlanMismatchError, match=r"transformer\.h\.0\.mlp"):
        _run(*arguments, out, "--plan", tmp_path / "plan.safetensors")


@pytest.mark.usefixtures("measured")
def test_copies_for_which_there_is_no_memory_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the plan and one frozen graph: what is compiled later counts, too."""
    size = shapes.weight_bytes(shapes.build(shapes.config_of("demo", 1), torch.float32, 1))
    monkeypatch.setattr("tardis_fx.bench.model.available_memory", lambda _: (MARGIN * FROZEN + 1) * size)
    out = tmp_path / "model.csv"
    text = _run("model", "--shape", "demo", "--layers", 1, "--steps", 16, "--context", 16, "--csv", out)
    assert [row["contender"] for row in _rows(out)] == ["Inductor", "tardis, 2 bits", "Inductor; freezing"]
    assert "No row for tardis, 2 bits with freezing: its copies of the weights do not fit" in text
    assert "No row for torchao's int8 weights: its copy of the weights does not fit" in text


@given(st.sampled_from([2, 3, 4]), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))
def test_what_a_plan_adds_is_foretold(predictor: int, fold: int, rows: int) -> None:
    widths, added = Widths(predictor, fold, rows), []
    for model in (ffn(512, 2048), Gated(512, 1366)):
        (entry,) = random_plans(model, inputs(64, 512), [widths], 0.1)[widths].rewritten
        (site,) = BatchObservation(model, [inputs(64, 512)], progress=False).sites
        added.append(stored_bytes(site, GuardedFold().constants(entry, site.weights)) / site.weights.bytes - 1)
    assert added[0] == pytest.approx(widths.added(4), rel=0.15)
    assert added[1] < 1.2 * widths.added(4)


def test_int4_leaves_a_layer_whose_rows_it_does_not_take() -> None:
    model, seen = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Linear(24, 32)), list[torch.nn.Module]()
    copied, saved, left = weight_only.quantise_model(model, seen.append, 4)
    assert left == ["0"]
    assert seen == [copied.get_submodule("1")]
    assert saved == 24 * 32 * 7 // 2 - 2 * (24 * 32 // 128) * 4


def test_int8_takes_every_projection_and_counts_what_it_saves() -> None:
    model = shapes.build(shapes.config_of("demo", 1), torch.float32, 1)
    seen: list[torch.nn.Module] = []
    copied, saved, _ = weight_only.quantise_model(model, seen.append)
    tokens = torch.arange(8)[None]
    linears = [m for m in copied.modules() if isinstance(m, torch.nn.Linear)]
    assert set(linears) == set(seen)
    assert len(linears) == 5  # attention's two, the FFN's two, the head
    assert saved == sum(3 * m.weight.numel() - 4 * len(m.weight) for m in linears)
    torch.testing.assert_close(copied(tokens).logits, model(tokens).logits)


def test_what_is_left_out_of_int8_shares_its_weights_with_the_model() -> None:
    model = shapes.build(shapes.config_of("demo", 1), torch.float32, 1)
    seen: list[torch.nn.Module] = []
    copied, saved, _ = weight_only.quantise_model(
        model, seen.append, excluded=ffn_weights(model, torch.arange(4)[None])
    )
    pairs = [m.get_submodule("transformer.h.0.mlp").parameters() for m in (copied, model)]
    assert all(p is q for p, q in zip(*pairs, strict=True))
    assert len(seen) == 3
    assert 0 < saved < weight_only.quantise_model(model, seen.append)[1]


def test_a_step_reads_all_but_the_tables_of_embeddings() -> None:
    tied = shapes.build(shapes.config_of("demo", 1), torch.float32, 1)
    assert shapes.step_bytes(tied) == shapes.weight_bytes(tied) - 4 * 256 * 256  # of positions


class _Named(torch.nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


class _NamedBefore(torch.nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(_Named(), "cache"), (_NamedBefore(), "past_key_values")])
def test_a_cache_is_passed_by_the_name_that_the_model_gives_it(model: torch.nn.Module, name: str) -> None:
    assert cache_argument(model) == name
    assert cache_argument(torch.compile(model)) == name


def test_a_model_that_takes_no_cache_is_refused() -> None:
    with pytest.raises(BenchError, match=r"Linear\.forward takes no key-value cache"):
        cache_argument(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ffn", "--d", "many"], "Invalid value for '--d': expected positive whole numbers"),
        (["ffn", "--d", "0"], "Invalid value for '--d': expected positive whole numbers"),
        (["ffn", "--dtype", "float64"], "Invalid value for '--dtype': expected float32"),
        (["ffn", "--bits", "2,5"], "Invalid value for '--bits': expected 2, 3, 4 or 8"),
        (["ffn", "--bits", "2/4"], "Invalid value for '--bits': expected 2, 3, 4 or 8, or predictor/fold/rows"),
        (["ffn", "--outliers", "0.5"], "Invalid value for '--outliers': 0.5"),
        (["ffn", "--rounds", "8"], "Invalid value for '--rounds'"),
        (["ffn", "--copies", "0"], "Invalid value for '--copies'"),
        (["ffn", "--csv", "/nowhere/at/all.csv"], "cannot write"),
        (["model", "--shape", "gpt9"], "no shape 'gpt9'"),
        (["model", "--model", "nowhere"], "no config.json in nowhere"),
        (["model", "--model", "nowhere", "--shape", "gpt2"], "--model takes the place of --shape"),
        (["model", "--plan", "plan.safetensors"], "--plan needs a model of your own"),
        (["model", "--shape", "demo", "--layers", "99"], "layers must lie between"),
        (["model", "--dtype", "float32,bfloat16"], "Invalid value for '--dtype'"),
        (["model", "--steps", "200"], "steps must lie between"),
    ],
)
def test_wrong_options_are_typed_errors_and_exit_code_1(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tardis", "bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(f"tardis: {message}")


def test_a_model_that_does_not_fit_in_memory_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "available_memory", lambda _: 1 << 20)
    with pytest.raises(BenchError, match="choose fewer layers"):
        bench_model("falcon-7b", torch.bfloat16, [Widths(2)], 0.05, 9)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BenchError, match=r"needs transformers: pip install 'tardis-fx\[demo\]'"):
        shapes.config_of("gpt2")


@pytest.mark.parametrize(("library", "needed"), [("psutil", machine.available_memory), ("cpuinfo", machine.processor)])
def test_a_machine_is_not_described_without_the_library_that_knows_it(
    library: str, needed: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    machine.processor.cache_clear()
    with pytest.raises(BenchError, match=rf"needs {library}: pip install 'tardis-fx\[demo\]'"):
        needed()


def test_a_csv_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot write"):
        write_csv([Timing("case", "name", [1.0], [1.0], 1.0).figures(HERE)], tmp_path)


def test_the_machine_is_measured_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 1 << 20)
    measured = Machine.measured(rounds=2)
    assert measured.bandwidth == max(measured.copy, measured.read) * 1e9 > 0
    assert "last-level cache 1 MiB" in str(measured)
    monkeypatch.undo()
    assert machine.last_level_cache() > 0
