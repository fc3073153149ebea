"""Comparisons on tiny models: what is run again and what is not, what is shown, and that nothing lost reads as nothing."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders.checkpoints import save_checkpoint
from builders.exact import Exact
from builders.models import VOCABULARY, gpt2, tokens
from torch import Tensor
from typer.testing import CliRunner

from tardis_fx import Config, Plan
from tardis_fx.cli import compare as compare_cli
from tardis_fx.cli import main as cli
from tardis_fx.compare import cases, report
from tardis_fx.compare.cases import Case, Dense, Planned, Torchao, Trial
from tardis_fx.compare.compare import compare_rewrites
from tardis_fx.compare.records import Record, Records
from tardis_fx.compare.subjects import RewrittenModel, Subject, encoder, language_model
from tardis_fx.demo.model import DemoModel, cut, load
from tardis_fx.digest import digest
from tardis_fx.errors import BenchError, CalibrationError, ConfigError, DemoError, TardisError
from tardis_fx.measure import weight_only
from tardis_fx.runtime.packing import row_bytes

TEXT = tokens(2000)


def subject(model: hf.PreTrainedModel | None = None, text: Tensor = TEXT) -> Subject:
    demo = DemoModel(gpt2() if model is None else model, None, 64, {})
    return language_model("tiny", demo, text, text.flip(0), windows=3)


@dataclasses.dataclass(frozen=True)
class Noted(Case):
    """The original, and a note of every time that it is run."""

    label: str
    runs: list[tuple[str, int]] = dataclasses.field(compare=False)
    fails: type[BaseException] | None = None

    @property
    def identity(self) -> str:
        return digest(self.label)

    def check(self) -> None:
        pass

    def prepare(self, trial: Trial) -> RewrittenModel:
        self.runs.append((self.label, trial.seed))
        if self.fails:
            raise self.fails("as it was told to")
        return RewrittenModel(trial.subject.model)


def run(
    cases: Sequence[Case], path: Path, seeds: Sequence[int] = (1, 2), **changed: hf.PreTrainedModel
) -> list[Record]:
    return compare_rewrites(subject(**changed), cases, seeds, Records(path), progress=False)


def joined(batches: Sequence[Tensor | Mapping[str, Any]]) -> Tensor:
    """Batches of tokens in one."""
    tokens = [batch for batch in batches if isinstance(batch, Tensor)]
    assert len(tokens) == len(batches)
    return torch.cat(tokens)


def test_an_interrupted_run_goes_on_and_repeats_no_finished_case(tmp_path: Path) -> None:
    runs: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        run([Noted("a", runs), Noted("b", runs, KeyboardInterrupt)], tmp_path / "r.jsonl")
    assert runs == [("a", 1), ("b", 1)]

    cases = [Noted("a", runs), Noted("b", runs)]
    first = run(cases, tmp_path / "r.jsonl")
    assert runs[2:] == [("b", 1), ("a", 2), ("b", 2)]

    assert run(cases, tmp_path / "r.jsonl") == first
    assert len(runs) == 5
    assert [(r.label, r.seed) for r in first] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_other_weights_or_other_text_reuse_no_record(tmp_path: Path) -> None:
    runs: list[tuple[str, int]] = []
    cases, records = [Noted("a", runs)], Records(tmp_path / "r.jsonl")
    compare_rewrites(subject(), cases, [1], records, progress=False)
    changed = gpt2()
    with torch.no_grad():
        changed.transformer.h[0].mlp.c_fc.bias[0] += 1
    for other in (subject(changed), subject(text=TEXT.roll(1))):
        compare_rewrites(other, cases, [1], records, progress=False)
    assert len(runs) == 3


@pytest.mark.parametrize("size", [1, 9, 40])
def test_a_truncated_last_line_loses_that_record_alone(tmp_path: Path, size: int) -> None:
    path, runs = tmp_path / "r.jsonl", list[tuple[str, int]]()
    cases = [Noted("a", runs), Noted("b", runs)]
    whole = run(cases, path, [1])
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:size])
    again = run(cases, path, [1])
    assert runs[2:] == [("b", 1)]
    assert [r.metrics for r in again] == [r.metrics for r in whole]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


@pytest.mark.parametrize("content", ["# A heading", "notes\nof mine\n", '{"key": "but nothing else"}\n', "[1]\n"])
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(content)
    with pytest.raises(BenchError, match="of a comparison"):
        Records(path)
    assert path.read_text() == content


def test_what_is_out_of_reach_is_recorded_and_shown_with_its_reason(tmp_path: Path) -> None:
    runs: list[tuple[str, int]] = []
    cases = [Dense(), Noted("far", runs, CalibrationError)]
    for _ in range(2):
        records = run(cases, tmp_path / "r.jsonl")
    assert len(runs) == 2
    lines = report.table(records, subject()).splitlines()
    assert [line for line in lines if "far" in line] == [lines[-1]]
    assert "out of reach: as it was told to" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1
    report.draw(records, subject(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_two_cases_of_one_label_and_budget_are_two_rows_and_the_seeds_of_a_case_are_one(tmp_path: Path) -> None:
    def record(case: str, seed: int, kl: float) -> Record:
        metrics = {"perplexity": 2.0, "rise": 0.5, "agreement": 0.75, "kl": kl}
        return Record(f"{case}{seed}", case, "tiny", "label", 0.2, seed, touched=0.2, metrics=metrics)

    records = [record(case, seed, kl) for case, kl in (("a", 0.25), ("b", 4.0)) for seed in (1, 2)]
    records[1] = record("a", 2, 0.75)
    first, second = re.sub(" +", " ", report.table(records, subject())).splitlines()[2:]
    assert "| 0.5000 (0.2500 to 0.7500) |" in first
    assert "| 4.0000 |" in second


def test_torchao_quantises_the_matrices_of_the_ffns_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Linear] = []
    monkeypatch.setattr(weight_only, "ffn_quantiser", lambda bits: seen.append)
    tiny = subject(gpt2(width=64).bfloat16())
    rewritten = Torchao("torchao", 4).prepare(Trial(tiny, 1))
    assert [(layer.in_features, layer.out_features) for layer in seen] == [(64, 256), (256, 64)] * 2
    codes, dense = 256 * row_bytes(64, 4, 64) + 64 * row_bytes(256, 4, 64), 2 * 2 * 64 * 256
    biases = 2 * (256 + 64)
    assert rewritten.touched == pytest.approx((codes + biases) / (dense + biases))
    assert tiny.evaluate(rewritten.every_token())["agreement"] > 0.99
    with pytest.raises(CalibrationError, match="groups of 64"):
        Torchao("torchao", 4).prepare(Trial(subject(), 1))


def test_a_healed_case_is_another_one_and_heals_on_the_calibration_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    healed: list[Sequence[Tensor]] = []

    def heal(model: object, plan: Plan, batches: Sequence[Tensor], *, progress: bool) -> Plan:
        healed.append(batches)
        return dataclasses.replace(plan)

    monkeypatch.setattr(cases, "heal", heal)
    config = Config(budget=0.9)
    plain, case = Planned("ours", config), Planned("ours, healed", config, healed=True)
    assert plain.identity != case.identity
    trial = Trial(subject(), 1)
    assert case.prepare(trial).touched <= 0.9
    assert len(healed) == 1
    assert all(len(batch) <= 2 for batch in healed[0])
    assert torch.equal(torch.cat(list(healed[0])), joined(trial.batches))


def test_the_dense_model_loses_nothing(tmp_path: Path) -> None:
    (record,) = run([Dense()], tmp_path / "r.jsonl", [0])
    assert (record.metrics["kl"], record.metrics["agreement"], record.metrics["rise"]) == (0, 1, 0)
    text = joined(subject().text)
    with torch.no_grad():
        loss = gpt2()(text, labels=text).loss
    assert record.metrics["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


@torch.no_grad()
def test_a_model_whose_every_neuron_is_corrected_is_the_dense_one_and_a_wrong_one_is_not() -> None:
    tiny = subject()
    same = tiny.evaluate(torch.compile(tiny.model, backend=Exact()))
    assert same["kl"] == pytest.approx(0, abs=1e-8)
    assert same["agreement"] == 1
    assert same["rise"] == pytest.approx(0, abs=1e-5)
    torch.compiler.reset()
    other = tiny.evaluate(torch.compile(tiny.model, backend=Exact(wrong=0.5)))
    assert other["kl"] > 1e-5


def test_kl_is_that_of_the_dense_distribution_to_the_other_in_nats_per_token() -> None:
    tiny, flat = subject(), gpt2()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        text = joined(tiny.text)
        p = tiny.call(tiny.model, text).double().softmax(-1)
    metrics = tiny.evaluate(flat)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert metrics["kl"] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item() - entropy, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(VOCABULARY, rel=1e-4)


def test_an_encoder_is_judged_by_direction_and_by_nearest_neighbour() -> None:
    points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    dense = torch.nn.Identity()

    def embed(model: object, batch: Mapping[str, Tensor]) -> Tensor:
        embeddings = batch["x"] if model is dense else batch["x"] * torch.tensor([1.0, 0.0])
        return torch.nn.functional.normalize(embeddings + 1e-6, dim=-1)

    text = [{"x": points[:2]}, {"x": points[2:]}]
    subject = encoder("points", dense, lambda _: text, text, embed)
    assert subject.evaluate(dense) == pytest.approx({"cosine": 1, "distance": 0, "neighbours": 1}, abs=1e-6)
    metrics = subject.evaluate(torch.nn.Identity())
    assert metrics["cosine"] < 0.8
    assert metrics["neighbours"] < 1


def test_a_seed_draws_its_own_windows_again_and_again() -> None:
    drawn = {seed: cut(TEXT, 4, 64, seed) for seed in (0, 1, 2)}
    assert all(torch.equal(windows, cut(TEXT, 4, 64, seed)) for seed, windows in drawn.items())
    assert len({digest(windows) for windows in drawn.values()}) == 3
    assert torch.equal(drawn[0][-1], TEXT[-64:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a tokenizer of words, as files, and a text."""
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, gpt2(), TEXT)
    return path


def test_the_command_compares_a_folder_on_a_text_and_goes_on(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "compare", "--model", folder, "--text", folder / "text.txt", "--windows", 2, "--dtype", "float32",
        "--methods", "guarded_fold:fold_bits=4,row_bits=4,paper", "--budgets", "0.9",
        "--out", tmp_path / "c.jsonl", "--plot", tmp_path / "c.png",
    ]  # fmt: skip
    shown = []
    for _ in range(2):
        result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown.append([line for line in result.stdout.splitlines() if line.startswith("|")])
    assert shown[0] == shown[1]
    assert [line.split("|")[1].strip() for line in shown[0][2:]] == [
        "dense", "guarded_fold fold_bits=4 row_bits=4", "paper",
    ]  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(records) == 3
    ours = records[1]
    assert ours["touched"] <= 0.9
    assert ours["counted"] == pytest.approx(ours["touched"], rel=0.2)
    assert ours["flops"] > 1
    assert ours["metrics"]["kl"] > 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "no rewrite named 'magic'"),
        (["--methods", "paper:colour=3"], "unknown field 'colour' of paper"),
        (["--methods", "wanda:fold_bits=3"], "unknown field 'fold_bits' of wanda"),
        (["--methods", "paper:fold_bits"], "name:field=value"),
        (["--methods", "paper:fold_bits=5"], "fold_bits must be 3, 4, 8 or 16"),
        (["--methods", "paper:healed=3"], "healed must be True or False"),
        (["--methods", "budget=0.3"], "name:field=value"),
        (["--budgets", "few"], "Invalid value for '--budgets': expected numbers"),
        (["--budgets", "1.5"], "budget must be less than or equal to 1"),
        (["--seeds", "one"], "Invalid value for '--seeds': expected whole numbers"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
        (["--windows", "0"], "Invalid value for '--windows'"),
        (["--plot", "/nowhere/at/all.png"], "cannot write"),
        (["--out", "/nowhere/at/all.jsonl"], "cannot keep records"),
        (["--text", "/nowhere.txt"], "cannot read text"),
    ],
)
def test_a_mistake_is_a_typed_error_before_anything_is_measured(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    base = ["compare", "--model", folder, "--text", folder / "text.txt", "--out", tmp_path / "c.jsonl"]
    with pytest.raises(TardisError, match=message):
        CliRunner().invoke(cli.app, [*map(str, base), *options], catch_exceptions=False)
    assert not (tmp_path / "c.jsonl").exists() or not (tmp_path / "c.jsonl").read_text()


def test_a_short_text_and_a_folder_without_a_whole_model_are_typed_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="less than one window"):
        subject(text=TEXT[:10])
    with pytest.raises(DemoError, match="no checkpoint"):
        load(tmp_path)
    state = {k: v for k, v in gpt2().state_dict().items() if "h.1.mlp.c_fc" not in k and k != "lm_head.weight"}
    gpt2().save_pretrained(tmp_path, state_dict=state)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(DemoError, match="lacks"):
        load(tmp_path)


def test_methods_are_crossed_with_budgets_unless_they_bring_their_own() -> None:
    composed = compare_cli.cases("drop_bias+low_rank:allocation=per_site,int8_ffn", [0.5])[1:]
    assert [case.config.method for case in composed] == ["drop_bias+low_rank", "int8_ffn"]  # type: ignore[attr-defined]
    assert len({case.identity for case in composed}) == 2
    given = "paper,guarded_fold:target_error=0.1,row_bits=None,paper:budget=0.4,rtn:bits=4,rtn:target_kl=0.1"
    rows = compare_cli.cases(given, [0.2, 0.3])
    assert [(case.label, case.budget) for case in rows] == [
        ("dense", None), ("paper", 0.2), ("paper", 0.3), ("guarded_fold target_error=0.1 row_bits=None", None),
        ("paper", 0.4), ("rtn bits=4", None), ("rtn target_kl=0.1", None),
    ]  # fmt: skip
    planned = [case for case in rows if isinstance(case, Planned)]
    chosen = Config(method="guarded_fold", target_error=0.1, options={"row_bits": None}, progress=False)
    assert planned[2].config == chosen
    assert len({case.identity for case in rows}) == 7


def test_a_target_divergence_is_met_on_the_calibration_text() -> None:
    trial = Trial(dataclasses.replace(subject(), calibration=lambda seed: list(tokens(6, 32).split(2))), 0)
    plan = Planned("", Config(method="rtn", target_kl=0.1)).prepare(trial).plan
    assert plan is not None
    assert plan.rewritten
    assert plan.kl is not None
    assert plan.kl <= 0.1


def test_a_name_that_no_rewrite_has_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rewrite named"):
        run([Dense(), Planned("?", Config(method="magic"))], tmp_path / "r.jsonl")
