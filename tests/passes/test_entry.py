"""Entries that no fit could have made are refused before anything is made of them, by every rewrite."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tardis_fx import Config, Plan, PlanFileError, PlanMismatchError, calibrate, explain
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes import entry as entries
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.testing.assertions import assert_equivalent
from tardis_fx.testing.capture import capture
from tardis_fx.testing.ffn import ffn, gated_ffn, inputs

D, HIDDEN = 16, 32
METHODS: dict[str, dict[str, Any]] = {
    "guarded_fold": {"options": {"fold_bits": 16, "row_bits": 16}},
    "guarded_fold in codes": {"options": {"fold_bits": 4, "row_bits": 4}},
    "guarded_fold gated": {"options": {"fold_bits": 16, "row_bits": 16}},
    "guarded_fold gated in codes": {"options": {"fold_bits": 8, "row_bits": 3}},
    "partial_linear": {},
    "partial_linear gated": {},
    "paper": {"budget": 0.9},
    "hot_fold": {},
    "ffsplit gated": {},
    "low_rank": {},
    "rtn gated": {},
    "gptq": {},
    "gptq_rotated": {},
    "gptq_rotated gated": {},
    "magnitude": {},
    "wanda_2_4 gated": {"budget": 0.7},
    "sparsegpt": {},
    "share_ffn": {},
    "token_gate": {},
    "bilinear": {},
    "linear_replace": {},
    "drop_ffn": {},
    "drop_bias": {"budget": 1.0},
    "drop_bias+low_rank": {"budget": 0.8},
    "low_rank+int8_ffn gated": {},
    "int4_ffn": {},
    "low_rank+finetuned": {},
}


def model_of(case: str) -> nn.Module:
    make = gated_ffn if "gated" in case else ffn
    return torch.nn.Sequential(make(D, HIDDEN, seed=1), make(D, HIDDEN, seed=2)).eval()


@cache
def plan_of(case: str) -> Plan:
    method = case.split()[0]
    trained = method.removesuffix("+finetuned")
    options: dict[str, Any] = {"budget": 0.6, "prefill": "rewritten", "progress": False} | METHODS[case]
    plan = calibrate(model_of(case), [inputs(256, D, seed=s) for s in (3, 4)], config=Config(method=trained, **options))
    if trained == method:
        return plan
    sites = []
    for site, module in zip(plan.rewritten, model_of(case).children(), strict=True):
        weights = SiteWeights(*(p.detach() for p in module.parameters()))
        tensors = rewrite_named(trained).constants(site, weights)
        sites.append(replace(site, method=method, settings={"inner": site.settings}, tensors=tensors))
    return replace(plan, sites=tuple(sites))


def run(case: str, plan: Plan) -> Tensor:
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "inner": "eager"}
    compiled = torch.compile(model_of(case), backend="tardis", options=options)
    with torch.no_grad():
        return compiled(inputs(4, D))  # type: ignore[no-any-return]


def changed(case: str, **fields: Any) -> Plan:
    """The plan with fields of its first rewritten entry changed."""
    plan = plan_of(case)
    first = next(site for site in plan.sites if site.method)
    return replace(plan, sites=tuple(replace(site, **fields) if site is first else site for site in plan.sites))


def first_of(case: str) -> SitePlan:
    return next(site for site in plan_of(case).rewritten if site.method)


def with_value(tensor: Tensor, value: float) -> Tensor:
    found = tensor.clone()
    found.view(-1)[0] = value
    return found


def bad_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Every way to damage any tensor of an entry."""
    found: dict[str, dict[str, Tensor]] = {"one more": {**tensors, "more": torch.zeros(1)}}
    for name, tensor in tensors.items():
        others = {n: t for n, t in tensors.items() if n != name}
        damaged = {
            "is missing": None,
            "is of another dtype": tensor.to(torch.int16),
            "has a row more": torch.cat([tensor, tensor[:1]])
            if len(tensor)
            else tensor.new_zeros(1, *tensor.shape[1:]),
            "has a dimension more": tensor[None],
            "is a scalar": torch.zeros((), dtype=tensor.dtype),
        }
        if tensor.numel() and tensor.is_floating_point():
            damaged["holds NaN"] = with_value(tensor, torch.nan)
        if tensor.numel() > 1 and tensor.dtype == torch.int32:
            damaged["has a negative index"] = with_value(tensor, -1)
            damaged["has an index beyond"] = with_value(tensor, HIDDEN)
            damaged["has an index twice"] = with_value(tensor, int(tensor[-1]))
        for what, value in damaged.items():
            found[f"{name} {what}"] = others if value is None else {**others, name: value}
    return found


@pytest.mark.parametrize("case", METHODS)
def test_a_plan_as_calibration_made_it_is_accepted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[SitePlan] = []

    def check(entry: SitePlan, *rest: Any) -> None:
        checked.append(entry)
        own(entry, *rest)

    own = entries.check_site
    monkeypatch.setattr("tardis_fx.passes.pipeline.check_site", check)
    assert torch.isfinite(run(case, plan_of(case))).all()
    assert {site for site in plan_of(case).sites if site.method} <= set(checked)


@pytest.mark.parametrize("case", METHODS)
def test_a_damaged_tensor_is_refused(case: str) -> None:
    first = first_of(case)
    weights = SiteWeights.from_site(*_site(case, first))
    for what, tensors in bad_tensors(first.tensors).items():
        assert refusal(replace(first, tensors=tensors), weights), f"accepted: {what}"


def refusal(entry: SitePlan, weights: SiteWeights) -> str | None:
    try:
        entries.check_entry(entry, weights)
    except PlanFileError as error:
        assert isinstance(error.__cause__, Exception)
        return str(error)
    return None


def _site(case: str, entry: SitePlan) -> tuple[Any, list[Tensor]]:
    gm, values, sites = capture(model_of(case), inputs(4, D))
    by_node = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True))
    for site in sites:
        own = [by_node[node] for node in site.parameters]
        if fingerprint(own, site.function) == entry.fingerprint:
            return site, own
    raise AssertionError(entry.name)


WRONG: tuple[Any, ...] = (None, 0, -1, 5, 99, 2.0, True, "16", [], [99], {}, 2**62, 0.5, {"x": 1}, {"up": 3})


def wrong_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings with one value changed, at any depth, or left away."""
    found = []
    for name, value in settings.items():
        found.append({n: v for n, v in settings.items() if n != name})
        others = [w for w in WRONG if (type(w), w) != (type(value), value)]
        found += [{**settings, name: other} for other in others]
        if isinstance(value, dict):
            found += [{**settings, name: inner} for inner in wrong_settings(value)]
    return found


@pytest.mark.parametrize("case", METHODS)
def test_wrong_settings_are_refused_or_change_nothing(case: str) -> None:
    """Whatever the settings are, the site's output has its shape and is finite, or the entry is refused."""
    first = first_of(case)
    site, parameters = _site(case, first)
    weights, refused = SiteWeights.from_site(site, parameters), 0
    for settings in wrong_settings(first.settings):
        entry = replace(first, settings=settings)
        if refusal(entry, weights):
            refused += 1
            continue
        rewrite = rewrite_named(str(entry.method))
        output = rewrite.forward(inputs(4, D), rewrite.constants(entry, weights), entry)
        assert output.shape == (4, D), settings
        assert torch.isfinite(output).all(), settings
    assert refused or not first.settings


MISMATCHES: dict[str, Any] = {
    "kind": "gated",
    "activation": "relu",
    "dtype": "torch.float16",
    "shapes": ((32, 16), (32,), (16, 32), (17,)),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_an_entry_that_describes_another_site_is_a_mismatch(field: str) -> None:
    plan = changed("guarded_fold", **{field: MISMATCHES[field]})
    with pytest.raises(PlanMismatchError, match=field):
        run("guarded_fold", plan)
    with pytest.raises(PlanMismatchError, match=field):
        explain(model_of("guarded_fold"), plan, inputs(4, D))


@pytest.mark.parametrize(
    "method", ["magic", "", "+", "hot_fold+hot_fold", "finetuned", "low_rank+" * 1000, "hot_fold+low_rank", "original"]
)
def test_a_method_that_is_none_is_refused_with_its_name(method: str) -> None:
    with pytest.raises(PlanFileError, match="rewrite"):
        run("guarded_fold", changed("guarded_fold", method=method))


def test_indices_are_refused_before_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "correct", lambda *_: pytest.fail("the kernel was called"))
    first = first_of("guarded_fold")
    tensors = {**first.tensors, "neurons": first.tensors["neurons"] + HIDDEN}
    with pytest.raises(PlanFileError, match="neurons has indices"):
        run("guarded_fold", changed("guarded_fold", tensors=tensors))


def test_an_entry_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[SitePlan] = []
    rewrite, first = type(rewrite_named("hot_fold")), changed("hot_fold").rewritten[0]
    own: Callable[..., None] = rewrite.validate

    def validate(self: Rewrite, plan: SitePlan, weights: SiteWeights) -> None:
        calls.append(plan)
        own(self, plan, weights)

    monkeypatch.setattr(rewrite, "validate", validate)
    weights = SiteWeights.from_site(*_site("hot_fold", first))
    other = replace(first)
    for entry in (first, first, other, other):
        entries.check_entry(entry, weights)
    assert calls == [first, other]


# ---- Rewrites of others, whose layout is not known


class Scaled(Rewrite):
    """The original, scaled by a tensor of the plan."""

    name = "scaled"

    def refuse(self, site: Any) -> None:
        return None

    def fit(self, *_: Any) -> Any:
        raise NotImplementedError

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        return {"up": weights.up, "down": weights.down * plan.tensors["scale"]}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return (x @ constants["up"].mT).relu() @ constants["down"].mT


SCALES: dict[str, tuple[Mapping[str, Tensor], str | None]] = {
    "right": ({"scale": torch.ones(HIDDEN)}, None),
    "missing": ({}, "KeyError"),
    "of another shape": ({"scale": torch.ones(HIDDEN + 1)}, "RuntimeError"),
    "of another dtype": ({"scale": torch.ones(HIDDEN, dtype=torch.float64)}, "RuntimeError"),
    "one that adds a dimension": ({"scale": torch.ones(1, 1, HIDDEN)}, "gives"),
}


@pytest.mark.parametrize("case", SCALES)
def test_a_rewrite_without_a_layout_is_tried_on_two_tokens(case: str) -> None:
    tensors, error = SCALES[case]
    weights = SiteWeights(torch.randn(HIDDEN, D), None, torch.randn(D, HIDDEN), None)
    entry = replace(first_of("guarded_fold"), method="scaled", tensors=tensors)
    if error is None:
        Scaled().validate(entry, weights)
    else:
        with pytest.raises((KeyError, RuntimeError, ValueError)) as raised:
            Scaled().validate(entry, weights)
        assert error in f"{type(raised.value).__name__}: {raised.value}"


def test_checking_an_entry_of_a_plan_in_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = run("guarded_fold", plan_of("guarded_fold"))
    monkeypatch.setattr("tardis_fx.passes.pipeline.check_entry", lambda *_: None)
    assert_equivalent(checked, run("guarded_fold", dataclasses.replace(plan_of("guarded_fold"))))
