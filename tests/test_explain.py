import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import models
from builders.compiled import compiled
from builders.ffns import Block, Broken, batches, config, ffn, ffn_of, inputs, planned
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx import CalibrationError, ConfigError, Plan, PlanFileError, Report, calibrate, explain
from tardis_fx.explain import SiteReport

X = inputs(4, 16)


class Mixed(nn.Module):
    """FFNs with as many fates as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.done, self.leaking, self.strange = ffn(seed=1), ffn(seed=2), ffn(seed=3)
        self.gate, self.up, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.done(F.layer_norm(x, (16,)))
        hidden = F.gelu(self.leaking.up(x))
        x = x + self.leaking.down(hidden) + self.strange.down(torch.sin(self.strange.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x)), hidden


@pytest.fixture(scope="module")
def mixed() -> tuple[Mixed, Plan]:
    model = Mixed()
    return model, planned(model, method="paper", budget=0.6)


# ---- Fields


def test_a_rewritten_site_reports_what_its_plan_says() -> None:
    model = nn.Sequential(Block(ffn(seed=1)), Block(ffn(activation="relu", seed=2))).eval()
    plan = planned(model)
    report = explain(model, plan, X)
    assert [(s.name, s.activation) for s in report.sites] == [("0.ffn", "gelu"), ("1.ffn", "relu")]
    for site, entry in zip(report.sites, plan.sites, strict=True):
        assert (site.kind, site.status, site.reason, site.method) == ("plain", "rewritten", "", "guarded_fold")
        for name in ("stored_bytes", "touched_bytes", "dense_bytes", "outlier_rate", "error"):
            assert getattr(site, name) == getattr(entry, name)
        assert site.dense_bytes == 4 * (2 * 16 * 64 + 64 + 16) == 4 * site.weights
        assert 0 < site.touched_bytes < site.dense_bytes < site.stored_bytes
        assert 0 < site.outlier_rate < 1
        assert 0 < site.error < 1
    assert report.missing == ()


def test_a_report_has_the_fields_that_are_promised() -> None:
    promised = "name kind activation status reason method stored_bytes touched_bytes dense_bytes weights "
    promised += "outlier_rate error parts"
    assert {field.name for field in fields(SiteReport)} == set(promised.split())


def test_every_refused_site_is_listed_with_its_reason(mixed: tuple[Mixed, Plan]) -> None:
    report = explain(*mixed, X)
    reasons = {site.name: site.reason for site in report.sites}
    assert list(reasons) == ["done", "leaking", "strange", "up"]  # the last one's weights share no module
    assert reasons["done"] == ""
    assert "intermediate value" in reasons["leaking"]
    assert "not in the registry" in reasons["strange"]
    (gated,) = [site for site in report.sites if site.kind == "gated"]
    assert "gated" in gated.reason
    assert gated.activation == "silu"
    for site in report.sites:
        if site.reason:
            assert (site.status, site.method, site.outlier_rate, site.error) == ("refused", "", 0, 0)
            assert site.touched_bytes == site.stored_bytes == site.dense_bytes > 0
            assert site.touched_bits == site.stored_bits == 32


def test_a_gated_model_that_the_plan_does_not_know_is_listed_and_refused() -> None:
    model = models.llama()
    plan = Plan((), config())
    report = explain(model, plan, models.tokens(2, 5))
    assert [(s.name, s.kind, s.status) for s in report.sites] == [
        (f"model.layers.{i}.mlp", "gated", "refused") for i in range(2)
    ]
    assert all(site.dense_bytes == 3 * 32 * 96 * 4 for site in report.sites)


def test_a_site_that_the_plan_does_not_know_is_refused_and_one_that_the_model_lacks_is_missing() -> None:
    second = Block(ffn(seed=2))
    model = nn.Sequential(Block(ffn(seed=1)), second).eval()
    plan = planned(model)
    with torch.no_grad():
        ffn_of(second).up.weight[0, 0] += 1
    report = explain(model, plan, X)
    assert [site.status for site in report.sites] == ["rewritten", "refused"]
    assert "changed since calibration" in report.sites[1].reason
    assert report.missing == ("1.ffn",)
    assert "in the plan, not in the model: 1.ffn" in str(report)


def test_another_dtype_is_the_reason() -> None:
    model = Block(ffn())
    plan = planned(model)
    (site,) = explain(model.bfloat16(), plan, X.bfloat16()).sites
    assert "torch.float32" in site.reason
    assert "torch.bfloat16" in site.reason
    assert site.dense_bytes == 2 * (2 * 16 * 64 + 64 + 16)


def test_a_site_that_the_model_has_but_refuses_is_not_missing() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(), nn.Linear(64, 16)).eval()
    plan = planned(model)
    report = explain(model.train(), plan, X)
    assert "training mode" in report.sites[0].reason
    assert report.missing == ()
    mixed = Mixed()
    assert explain(mixed, planned(mixed, budget=0.6), X).missing == ()


def test_names_are_the_models_own_whatever_wraps_it() -> None:
    model = ffn()
    plan = planned(model)
    (site,) = explain(nn.ModuleDict({"inner": Block(model)})["inner"], plan, X).sites
    assert site.name == "ffn"


def test_two_sites_of_equal_weights_are_two_sites() -> None:
    model = nn.Sequential(Block(ffn()), Block(ffn())).eval()
    report = explain(model, planned(model), X)
    assert [site.status for site in report.sites] == ["rewritten", "rewritten"]
    assert [site.name for site in report.sites] == ["0.ffn", "1.ffn"]


def test_one_site_that_runs_twice_is_one_site() -> None:
    block = Block(ffn())
    assert len(explain(nn.Sequential(block, block).eval(), planned(block), X).sites) == 1


# ---- Graphs that several blocks share


def test_every_block_of_a_shared_graph_is_listed_by_its_name() -> None:
    model = Broken([Block(ffn(seed=i)) for i in range(4)])
    plan = planned(model, method={"blocks.2*": None, "*": "guarded_fold"})
    report = explain(model, plan, X)
    assert [(site.name, site.status) for site in report.sites] == [
        (f"blocks.{i}.ffn", "refused" if i == 2 else "rewritten") for i in range(4)
    ]
    assert report.missing == ()


def test_a_block_that_the_plan_does_not_know_is_refused_among_those_that_share_its_graph() -> None:
    blocks = [Block(ffn(seed=i)) for i in range(3)]
    plan = planned(Broken(blocks[:2]))
    report = explain(Broken(blocks), plan, X)
    assert [site.status for site in report.sites] == ["rewritten", "rewritten", "refused"]
    assert report.missing == ()


def test_blocks_of_equal_weights_in_one_graph_are_listed_and_one_that_runs_twice_is_listed_once() -> None:
    block = Block(ffn())
    model = Broken([block, Block(ffn()), block])
    report = explain(model, planned(model), X)
    assert [(site.name, site.status) for site in report.sites] == [
        ("blocks.0.ffn", "rewritten"),
        ("blocks.1.ffn", "rewritten"),
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    model = Block(ffn())
    with mode():
        plan = planned(model)
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        report = explain(model, plan, inputs(4, 16))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert [site.status for site in report.sites] == ["rewritten"]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in plan.rewritten[0].tensors.values())
    torch.testing.assert_close(plan.rewritten[0].tensors, planned(model).rewritten[0].tensors)


# ---- Output


def test_the_table_has_one_line_a_site_and_a_sum(mixed: tuple[Mixed, Plan]) -> None:
    report = explain(*mixed, X)
    head, rule, *rest = str(report).splitlines()
    rows, last = rest[: len(report.sites)], rest[len(report.sites)]
    assert {"site", "kind", "activation", "status", "touched", "stored", "outliers", "error"} <= set(head.split())
    assert set(rule) <= {"-", " "}
    for row, site in zip(rows, report.sites, strict=True):
        assert row.startswith(site.name)
        assert site.status in row
        assert (site.method or site.reason) in row
    done = report.sites[0]
    assert f"{done.touched_bytes / done.dense_bytes:.1%}" in rows[0]
    assert f"{done.outlier_rate:.1%}" in rows[0]
    touched, dense = sum(s.touched_bytes for s in report.sites), sum(s.dense_bytes for s in report.sites)
    assert last.startswith("1 of 4 sites rewritten")
    assert f"{touched / dense:.1%}" in last
    assert f"{done.touched_bits:.3g}" in rows[0].split()
    assert f"{done.stored_bits:.3g}" in rows[0].split()
    stored = sum(s.stored_bytes for s in report.sites)
    assert last.endswith(f"{32 * touched / dense:.3g} bits per weight ({32 * stored / dense:.3g} stored)")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bits_per_weight_are_the_shares_of_the_weights_own_bits(dtype: torch.dtype, bits: int) -> None:
    model = nn.Sequential(Block(ffn(seed=1)), Block(ffn(hidden=32, seed=2))).eval().to(dtype)
    plan = calibrate(model, [x.to(dtype) for x in batches()], config=config(method="wanda", budget=0.6))
    stored = sum(site.stored_bytes for site in plan.sites) / sum(site.dense_bytes for site in plan.sites)
    assert plan.touched_bits == pytest.approx(bits * plan.touched_fraction)
    assert plan.stored_bits == pytest.approx(bits * stored)
    assert f"{plan.touched_bits:.3g} bits per weight" in str(plan)
    for site in Report.from_plan(plan).sites:
        assert site.touched_bits == pytest.approx(bits * site.touched_bytes / site.dense_bytes)
        assert site.stored_bits == pytest.approx(bits * site.stored_bytes / site.dense_bytes)


def test_the_columns_of_the_table_are_aligned(mixed: tuple[Mixed, Plan]) -> None:
    report = explain(*mixed, X)
    head, _, *rows = str(report).splitlines()
    for name in ("kind", "activation", "status"):
        cells = [row[head.index(name) :].split()[0] for row in rows[: len(report.sites)]]
        assert cells == [getattr(site, name) or "unknown" for site in report.sites]


def test_a_report_round_trips_through_json(mixed: tuple[Mixed, Plan]) -> None:
    report = explain(*mixed, X)
    plain = json.loads(json.dumps(report.to_dict()))
    assert Report(tuple(SiteReport(**site) for site in plain["sites"]), tuple(plain["missing"])) == report
    assert set(plain) == {"sites", "missing"}


def test_a_model_without_ffns_has_an_empty_report() -> None:
    report = explain(nn.Linear(16, 16).eval(), Plan((), config()), X)
    assert report.sites == ()
    assert "0 of 0 sites" in str(report)


def test_a_report_of_the_plan_alone_lists_its_sites(mixed: tuple[Mixed, Plan]) -> None:
    model, plan = mixed
    of_plan, of_model = Report.from_plan(plan), explain(model, plan, X)
    planned_sites = {site.name: site for site in of_plan.sites}
    assert planned_sites["done"] == of_model.sites[0]
    refused = plan.sites[0].kept("for a test")
    (site,) = Report.from_plan(Plan((refused,), plan.config)).sites
    assert (site.status, site.reason, site.touched_bytes) == ("refused", "for a test", site.dense_bytes)


# ---- Arguments


def test_plan_and_example_come_in_several_forms(tmp_path: Path) -> None:
    model, path = models.gpt2(), tmp_path / "plan"
    tokens = models.tokens(2, 8)
    plan = calibrate(model, [tokens], config=config(budget=0.6))
    plan.save(path)
    report = explain(model, plan, tokens)
    assert len(report.sites) == 2
    forms: list[tuple[Any, Any]] = [
        (path, tokens),
        (str(path), {"input_ids": tokens}),
        (plan, {"input_ids": tokens, "use_cache": False}),
    ]
    for form, example in forms:
        assert explain(model, form, example) == report


def test_explaining_changes_nothing() -> None:
    model = Block(ffn())
    plan = planned(model)
    before = {name: p._version for name, p in model.named_parameters()}
    explain(model, plan, X)
    assert {name: p._version for name, p in model.named_parameters()} == before
    assert not model._forward_hooks
    assert not model.training
    with torch.no_grad():
        fast = compiled(model, plan)
        assert not torch.equal(fast(X), model(X))


def test_a_wrong_example_is_a_calibration_error() -> None:
    model = ffn()
    for wrong in (3, "text", [torch.zeros(3, 16)], None):
        with pytest.raises(CalibrationError, match="a batch must be a tensor or a dict"):
            explain(model, Plan((), config()), wrong)  # type: ignore[arg-type]


def test_a_wrong_plan_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        explain(ffn(), 3, X)  # type: ignore[arg-type]
    with pytest.raises(PlanFileError, match="none"):
        explain(ffn(), tmp_path / "none", X)
