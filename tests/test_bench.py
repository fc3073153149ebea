"""Comparisons of tiny shapes: what is shown and written, and that a plan reads what it says; no times."""

import copy
import csv
import math
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
from tardis_fx.bench.codes import CALIBRATED, FOUR_BITS, CodedRecipe, Reads
from tardis_fx.bench.ffn import MEMORY, TOGETHER, Shape, bench_ffn
from tardis_fx.bench.folds import GROUP_SIZE, FoldRecipe
from tardis_fx.bench.llama_cpp import llama_cpp
from tardis_fx.bench.model import FROZEN, MARGIN, bench_model
from tardis_fx.bench.plans import Recipe, ffn_sites, random_plans
from tardis_fx.bench.timings import COLD, Timing, report
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
from tardis_fx.partial_linear.precision import Widths
from tardis_fx.passes.base import stored_bytes
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.runtime import tables
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
def test_ffn_has_a_row_for_every_case_and_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tardis_fx.bench.ffn.ROUND", 1e-3)
    out = tmp_path / "ffn.csv"
    text = _run(
        "ffn", "--d", 64, "--dtype", "float32", "--tokens", "1,9", "--copies", 3, "--bits", "2,2/4/4", "--csv", out
    )

    rows = _rows(out)
    folds = ["guarded_fold, 2 bits, rows whole", "guarded_fold, 2/4/4 bits"]
    assert [(row["case"], row["contender"]) for row in rows] == [
        (f"{shape}, float32, {tokens}, 3 copies", contender)
        for shape, coded in (
            ("plain, d 64, 256 neurons", "partial_linear, 2/4/4 bits, 5%"),
            ("gated, d 64, 176 neurons", "partial_linear, 3/4 bits, 20% refined"),
        )
        for tokens in ("1 token", "9 tokens")
        for contender in ("Inductor", *folds, coded)
    ]
    table = re.sub(" +", " ", text)
    assert all(f"| {row['case']} | {row['contender']} |" in table for row in rows)
    assert "a processor, 2 threads" in text
    assert "times the byte floor" in text
    dense, fold, _, coded = rows[:4]
    assert float(dense["MB"]) * 1e6 == 4 * (8 * 64 * 64 + 5 * 64)
    costs, rate = Costs.from_sizes(64, 64, 2, 4, k=1, group_size=GROUP_SIZE, bias=True), float(fold["outliers"])
    expected = costs.fold + 256 * (costs.predictor + rate * costs.row)
    assert float(fold["MB"]) * 1e6 == pytest.approx(expected)
    assert float(fold["floor_ms"]) == pytest.approx(expected / 20e9 * 1e3)
    assert float(coded["outliers"]) == pytest.approx(0.05, rel=0.5)  # of 3 tokens
    assert all(row["rounds"] == "9" and float(row["ratio_min"]) <= float(row["ratio_max"]) for row in rows)
    assert float(rows[7]["MB"]) > float(coded["MB"])  # nine tokens, each with columns of its own


@pytest.mark.usefixtures("measured", "without_torchao")
def test_model_has_a_row_for_every_contender_or_says_why_not(tmp_path: Path) -> None:
    out = tmp_path / "model.csv"
    arguments = "model", "--shape", "demo", "--layers", 1, "--steps", 16, "--context", 16, "--dtype", "float32"
    text = _run(*arguments, "--method", "guarded_fold", "--bits", 2, "--csv", out)

    dense, fast, *_ = rows = _rows(out)
    assert [row["contender"] for row in rows] == [
        "Inductor",
        "guarded_fold, 2 bits, rows whole",
        "Inductor; freezing",
        "guarded_fold, 2 bits, rows whole; freezing",
    ]
    assert "No row for torchao's int8 weights: torchao cannot be imported" in text
    assert "which stays warm, by Inductor; guarded_fold" in text
    costs, rate = Costs.from_sizes(256, 256, 2, 4, k=1, group_size=GROUP_SIZE, bias=True), float(fast["outliers"])
    less = 4 * (8 * 256**2 + 5 * 256) - costs.fold - 1024 * (costs.predictor + rate * costs.row)
    assert float(dense["MB"]) - float(fast["MB"]) == pytest.approx(less / 1e6)
    assert rate == pytest.approx(0.05, rel=0.5)  # of 16 tokens; the next test asks for more


def _rewritten(model: torch.nn.Module, plan: Any) -> Any:
    options: dict[str, Any] = {"plan": plan, "inner": "eager", "prefill": "rewritten"}
    return torch.compile(model, backend="tardis", options=options)


@pytest.mark.parametrize(
    ("model", "recipe", "dtype"),
    [
        (ffn(64, 256), FoldRecipe(2), torch.float32),
        (ffn(64, 256), FoldRecipe(4), torch.bfloat16),
        (ffn(64, 256), FoldRecipe(3, rate=0.2), torch.float32),
        (ffn(64, 256), FoldRecipe(2, rate=0.01), torch.float32),
        (ffn(64, 256), FoldRecipe(2, 4, 8), torch.float32),
        (Gated(64, 172), FoldRecipe(2), torch.float32),
        (Gated(64, 172, bias=False), FoldRecipe(4, 4, 8, 0.2), torch.bfloat16),
        (Gated(64, 172, fused=True), FoldRecipe(3, 8), torch.float32),
    ],
)
def test_a_plan_has_the_outliers_that_were_asked_for(
    model: torch.nn.Module, recipe: FoldRecipe, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(dtype)
    plan = random_plans(model, inputs(1024, 64).to(dtype), [recipe])[recipe]
    fast, x = _rewritten(model, plan), inputs(2048, 64, seed=7).to(dtype)
    with torch.no_grad(), count_touched() as touched:
        output, exact = fast(x).float(), model(x).float()
    assert touched.outlier_rate == pytest.approx(recipe.rate, rel=0.1)
    assert touched.per_token == pytest.approx(plan.sites[0].touched_bytes, rel=0.1)
    assert (output - exact).norm() < 0.7 * exact.norm()  # a fold and not noise, so that inputs stay what they were


def _sorts_of_reads() -> list[Reads]:
    return [
        CALIBRATED.plain,
        Reads(Widths(2, 2, 4, 2, 4), 0.05, 0.05, 0.01),
        Reads(Widths(3, 5, 2, 1, 0), 0.3, 0.0, 0.3),
        CALIBRATED.gated,
        Reads(Widths(3, 2, 4, 2, 3), 0.2, 0.1, 0.2, up=0.5),
        FOUR_BITS.plain,
    ]


@pytest.mark.parametrize("reads", _sorts_of_reads(), ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_in_codes_reads_the_shares_that_were_asked_for(reads: Reads, gated: bool, dtype: torch.dtype) -> None:
    """And it passes the checks of a plan, runs in one op, and gives outputs of an ordinary size."""
    model = copy.deepcopy(Gated(96, 512) if gated else ffn(96, 512)).to(dtype)
    recipe = CodedRecipe("test", reads, reads)
    plan = random_plans(model, inputs(1024, 96).to(dtype), [recipe])[recipe]
    x = inputs(2048, 96, seed=7).to(dtype)
    with torch.no_grad(), count_touched() as touched:
        output = _rewritten(model, plan)(x).float()
    (entry,), (site,) = plan.rewritten, ffn_sites(model, x[:8])
    assert (touched.sites, touched.tokens) == (1, len(x))
    assert touched.outlier_rate == pytest.approx(reads.column, rel=0.1)
    assert touched.per_token == pytest.approx(entry.touched_bytes, rel=0.05)
    assert 0.1 < float(output.square().mean().sqrt()) < 10

    (hidden, d), w = site.weights.up.shape, reads.widths
    k = len(site.weights.projections)
    row = tables.row_bytes
    fixed = sum(entry.tensors[name].nbytes for name in ("bias", "signs", "out_signs", "noise", "thresholds"))
    fixed += entry.tensors["fold"].nbytes if w.fold_bits else 0
    neuron = row(d, w.bits) * (1 + (k - 1) * reads.up) + reads.column * row(d, w.column_bits)
    neuron += k * reads.row * row(d, w.low_bits) + reads.column_refinement * row(d, w.column_low_bits)
    neuron += 2 * k + dtype.itemsize * k + 2 * (k + 1) * (w.fold_bits > 0)
    assert entry.touched_bytes == pytest.approx(fixed + hidden * neuron, rel=0.01)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recipe", [FoldRecipe(2, 4, 4), CALIBRATED], ids=str)
def test_a_step_of_one_token_reads_what_is_counted_and_of_several_each_part_once(gated: bool, recipe: Recipe) -> None:
    model: torch.nn.Module = Gated(64, 172) if gated else ffn(64, 256)
    plan = random_plans(model, inputs(1024, 64), [recipe])[recipe]
    (entry,), (site,) = plan.rewritten, ffn_sites(model, inputs(8, 64))
    fast, x = _rewritten(model, plan), inputs(16, 64, seed=3)
    alone = []
    for token in x.split(1):
        with torch.no_grad(), count_touched() as touched:
            fast(token)
        read, share = recipe.step(entry, site.weights, token)
        assert read == touched.per_token
        assert share == pytest.approx(touched.outlier_rate)
        alone.append(read)
    together, share = recipe.step(entry, site.weights, x)
    assert max(alone) < together < sum(alone)
    assert together == recipe.step(entry, site.weights, torch.cat([x, x]))[0]


def test_a_model_without_an_ffn_that_can_be_rewritten_is_refused() -> None:
    without_activation = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
    with pytest.raises(BenchError, match="no FFN that guarded_fold can rewrite"):
        random_plans(without_activation.eval(), inputs(16, 8), [FoldRecipe(2)])


def _compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = lambda name, model, *_: [Timing(f"{len(model.ffns)} copies", "some", [1.0], [1.0], 1e6)]  # noqa: E731
    monkeypatch.setattr("tardis_fx.bench.ffn._case", case)


def test_copies_fill_the_cache_with_what_the_rewritten_ffns_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tardis_fx.bench.ffn.last_level_cache", lambda _: 1 << 18)
    _compiles_nothing(monkeypatch)
    (timing,), remarks = bench_ffn(Shape("plain", 256, 1024), torch.float32, [1], [FoldRecipe(2)], 9)
    costs = Costs.from_sizes(256, 256, 2, 4, k=1, group_size=GROUP_SIZE, bias=True)
    count = (COLD << 18) / (costs.fold + 1024 * (costs.predictor + 0.05 * costs.row))
    assert timing.case == f"{TOGETHER * math.ceil(count / TOGETHER)} copies"
    assert remarks == []


def test_copies_are_as_many_as_memory_allows_and_the_report_says_that_the_cache_stays_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape, recipe = Shape("gated", 64, 176), FoldRecipe(2)
    monkeypatch.setattr("tardis_fx.bench.ffn.last_level_cache", lambda _: 1 << 28)
    _compiles_nothing(monkeypatch)
    each = 2 * 3 * 64 * 176 * (1 + recipe.added(2))
    monkeypatch.setattr("tardis_fx.bench.ffn.available_memory", lambda _: 5.5 * each / MEMORY)
    (timing,), remarks = bench_ffn(shape, torch.bfloat16, [1], [recipe], 9)
    assert timing.case == "5 copies"
    assert "times the last-level cache is read, which stays warm, by some" in remarks[0]
    monkeypatch.setattr("tardis_fx.bench.ffn.available_memory", lambda _: each / 2 / MEMORY)
    with pytest.raises(BenchError, match="does not fit in memory"):
        bench_ffn(shape, torch.bfloat16, [1], [recipe], 9)


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
    assert values["ratio_of_medians"] == 1
    text = re.sub(" +", " ", report([row], HERE))
    assert "| 5.00% |" in text
    assert "| 1.00× (0.50 to 2.00) |" in text


def test_the_ratio_of_the_medians_is_shown_where_it_is_another() -> None:
    row = Timing("case", "name", [1.0, 1.0, 4.0], [1.0, 2.0, 4.0], 4e9)  # ratios 1, 2, 1; medians 1 and 2
    assert row.figures(HERE)["ratio_of_medians"] == 2
    assert "| 1.00× (1.00 to 2.00); of medians 2.00× |" in re.sub(" +", " ", report([row], HERE))


@pytest.mark.usefixtures("measured", "without_torchao")
def test_a_model_of_ones_own_decodes_by_ones_own_plan(tmp_path: Path) -> None:
    """Its weights, not random ones: a plan fits no others."""
    model = shapes.build(shapes.config_of("demo", 1), torch.float32, 1)
    model.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    tokens = torch.randint(256, (32, 16))
    plan = calibrate(model, tokens.split(8), config=Config(budget=0.4, progress=False))
    plan.save(tmp_path / "plan.safetensors")
    arguments, out = (
        ["model", "--model", tmp_path / "own", "--steps", 16, "--context", 16, "--dtype", "float32", "--csv"],
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
    assert [row["contender"] for row in _rows(out)[:3]] == ["Inductor", str(CALIBRATED), str(FOUR_BITS)]
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
    arguments = "model", "--shape", "demo", "--layers", 1, "--steps", 16, "--context", 16, "--dtype", "float32"
    text = _run(*arguments, "--method", "guarded_fold", "--bits", 2, "--csv", out)
    name = "guarded_fold, 2 bits, rows whole"
    assert [row["contender"] for row in _rows(out)] == ["Inductor", name, "Inductor; freezing"]
    assert f"No row for {name} with freezing: its copies of the weights do not fit" in text
    assert "No row for torchao's int8 weights: its copy of the weights does not fit" in text


def _program(folder: Path, body: str) -> Path:
    program = folder / "llama-bench"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
    program.chmod(0o755)
    return folder


@pytest.mark.usefixtures("measured", "without_torchao")
def test_llama_cpp_decodes_a_file_of_the_same_shape_in_the_same_rounds(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    calls = tmp_path / "calls"
    print_speed = (
        f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)); print(json.dumps([{{'avg_ts': 50}}]))"
    )
    program, out = _program(tmp_path, print_speed), tmp_path / "model.csv"
    arguments = "model", "--shape", "demo", "--layers", 1, "--steps", 16, "--context", 16
    _run(*arguments, "--llama-cpp", program, "--csv", out)
    rows = {row["contender"]: row for row in _rows(out)}
    assert all(float(rows[f"llama.cpp {kind}"]["ms"]) == pytest.approx(20) for kind in ("Q8_0", "Q4_0"))
    assert len(calls.read_text().splitlines()) == 2 * (9 + 1)
    assert re.search(r"-m \S+Q8_0.gguf -p 0 -n 16 -t \d+ -r 1 -o json\n", calls.read_text())


@pytest.mark.parametrize("shape", ["gpt2", "tinyllama-1.1b"])
def test_a_file_for_llama_cpp_has_the_weights_of_the_shape(shape: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = shapes.config_of(shape, 2)
    config.vocab_size = 96
    made = llama_cpp(_program(tmp_path, ""), config, 8, tmp_path)
    model = shapes.build(config, torch.bfloat16, 1)
    for kind, bits in (("Q8_0", 8.5), ("Q4_0", 4.5)):
        tensors = gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors
        assert sum(tensor.n_elements for tensor in tensors) == sum(p.numel() for p in model.parameters())
        assert made[f"llama.cpp {kind}"].touched == pytest.approx(shapes.step_bytes(model) * bits / 16, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "body", "message"),
    [
        ("gpt2", None, "no llama-bench in"),
        ("falcon-7b", "", "shapes of GPT-2 and Llama, not of falcon"),
        ("demo", "sys.exit('cannot load model')", "llama-bench failed with exit code 1: cannot load model"),
        ("demo", "print('[]')", "llama-bench failed with exit code 0: it printed no tokens per second"),
    ],
)
def test_a_llama_cpp_that_cannot_be_timed_is_a_typed_error(
    shape: str, body: str | None, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    if body is not None:
        _program(tmp_path, body)
    with pytest.raises(BenchError, match=message):
        llama_cpp(tmp_path, shapes.config_of(shape, 1), 8, tmp_path)["llama.cpp Q4_0"].run()


def test_without_gguf_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BenchError, match="pip install gguf"):
        llama_cpp(_program(tmp_path, ""), shapes.config_of("demo", 1), 8, tmp_path)


@given(st.sampled_from([2, 3, 4]), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))
def test_what_a_plan_adds_is_foretold(predictor: int, fold: int, rows: int) -> None:
    widths, added = FoldRecipe(predictor, fold, rows, 0.1), []
    for model in (ffn(512, 2048), Gated(512, 1366)):
        (entry,) = random_plans(model, inputs(64, 512), [widths])[widths].rewritten
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
        model, seen.append, excluded=ffn_sites(model, torch.arange(4)[None])[0].parameters
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
        (["ffn", "--shape", "round"], "Invalid value for '--shape': expected plain or gated"),
        (["ffn", "--reads", "2+3/4+2:0.5"], "Invalid value for '--reads': expected projections/columns/fold"),
        (["ffn", "--reads", "2+3/4+2/4:0.5/2/0.1"], "Invalid value for '--reads'"),
        (["ffn", "--reads", "2+0/4+2/4:0.5/0.2/0.1"], "Invalid value for '--reads'"),
        (["model", "--method", "wanda"], "Invalid value for '--method'"),
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
        bench_model("falcon-7b", torch.bfloat16, [FoldRecipe(2)], 9)


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
