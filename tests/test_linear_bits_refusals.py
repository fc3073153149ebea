"""Changed weights, damaged files and uses for which linear layers in codes are refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders.compiled import compiled
from builders.counted import counted, fast
from builders.linear_bits import BATCHES, FEW, D, config, gpt2, layers, layers_planned, logits
from builders.plan_files import put_together, signed, take_apart
from torch import Tensor, nn

from tardis_fx import (
    Config,
    ConfigError,
    Plan,
    PlanFileError,
    PlanMismatchError,
    StaleWeightError,
    TardisError,
    calibrate,
    heal,
    verify,
)
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.testing.assertions import assert_plan_roundtrip
from tardis_fx.testing.capture import sites_of


@pytest.fixture(scope="module")
def original() -> hf.PreTrainedModel:
    return gpt2()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return layers_planned()


# ---- Weights that change


def test_a_changed_weight_or_bias_is_refused(model: nn.Module, plan: Plan) -> None:
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_proj.bias", "transformer.wte.weight"):
        changed = copy.deepcopy(model)
        run = compiled(changed, plan)
        logits(run, FEW)
        with torch.no_grad():
            changed.get_parameter(name).add_(0.5)
        with pytest.raises(StaleWeightError, match=name.rpartition(".")[0]):
            logits(run, FEW)
        torch._dynamo.reset()
        with pytest.raises(StaleWeightError):
            logits(compiled(changed, plan), FEW)


def test_a_changed_weight_runs_the_original_if_that_is_wanted(model: nn.Module, plan: Plan) -> None:
    with counted() as calls:
        run = fast(model, plan, on_change="original")
        logits(run, FEW)
        assert calls() == 5
        with torch.no_grad():
            model.get_parameter("transformer.h.0.attn.c_attn.weight").mul_(1.5)
        logits(run, FEW)
        assert calls() == 4


def test_another_module_of_a_shared_graph_runs_as_it_is_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64).eval(), nn.Linear(64, 64).eval()
    made = calibrate(first, [torch.randn(64, 64)], config=config())
    run, x = compiled(lambda layer, x: layer(x), made), torch.randn(3, 64)
    with torch.no_grad():
        run(first, x)
        torch.testing.assert_close(run(second, x), second(x))
    assert "the plan has no entry for the weights" in caplog.text


def test_verify_finds_a_write_that_nothing_counts(model: nn.Module, plan: Plan) -> None:
    run = compiled(model, plan)
    logits(run, FEW)
    assert len(verify(run)) == 5
    model.get_parameter("transformer.h.0.attn.c_attn.weight").data[33, 5] += 1
    with pytest.raises(StaleWeightError, match="c_attn"):
        verify(run)


# ---- Files


def test_a_plan_is_the_same_after_saving_and_loading(plan: Plan) -> None:
    assert_plan_roundtrip(plan)


def test_a_plan_of_an_earlier_version_loads(plan: Plan, tmp_path: Path) -> None:
    """Its config does not name the bits of layers."""
    Plan((), config(linear_bits=None)).save(tmp_path / "plan")
    header, data = take_apart((tmp_path / "plan").read_bytes())
    content = json.loads(header["__metadata__"]["plan"])
    assert content["config"].pop("linear_bits", 0) is None
    header["__metadata__"]["plan"] = json.dumps(content)
    (tmp_path / "plan").write_bytes(signed(put_together(header, data)))
    assert Plan.load(tmp_path / "plan").config == config(linear_bits=None)


def rewritten(plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Plan:
    """A plan whose first linear layer somebody has changed in the file."""
    plan.save(tmp_path / "plan")
    header, data = take_apart((tmp_path / "plan").read_bytes())
    content = json.loads(header["__metadata__"]["plan"])
    change(next(site for site in content["sites"] if site["kind"] == "linear"))
    header["__metadata__"]["plan"] = json.dumps(content)
    (tmp_path / "plan").write_bytes(signed(put_together(header, data)))
    return Plan.load(tmp_path / "plan")


#: Fields of an entry, and the error that a wrong one is.
DAMAGED: dict[str, tuple[dict[str, Any], type[TardisError], str]] = {
    "other bits": ({"settings": {"bits": 8}}, PlanFileError, "rows"),
    "no bits": ({"settings": {}}, PlanFileError, "settings"),
    "bits beyond all": ({"settings": {"bits": 99}}, PlanFileError, "bits"),
    "more settings": ({"settings": {"bits": 4, "more": 1}}, PlanFileError, "settings"),
    "a rewrite of FFNs": ({"method": "exact_fold"}, PlanMismatchError, "exact_fold"),
    "a chain": ({"method": "drop_bias+coded_linear"}, PlanFileError, "coded_linear"),
    "the kind of an FFN": ({"kind": "plain"}, PlanMismatchError, "kind"),
    "an activation": ({"activation": "gelu"}, PlanMismatchError, "activation"),
    "another dtype": ({"dtype": "torch.float64"}, PlanMismatchError, "dtype"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_entry_is_a_typed_error(name: str, original: nn.Module, plan: Plan, tmp_path: Path) -> None:
    fields, kind, cause = DAMAGED[name]
    damaged = rewritten(plan, tmp_path, lambda site: site.update(fields))
    with pytest.raises(kind, match=cause):
        logits(compiled(original, damaged), FEW)


def _endless(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows[3, -2:] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity in float16
    return rows


#: What somebody makes of a tensor of an entry.
CHANGED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "short rows": ("rows", lambda rows: rows[:, 1:]),
    "a row less": ("rows", lambda rows: rows[1:]),
    "an infinite scale": ("rows", _endless),
    "few signs": ("signs", lambda signs: signs[1:]),
    "signs of another type": ("signs", lambda signs: signs.float()),
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_tensor_that_is_none_of_its_entry_is_a_typed_error(how: str, original: nn.Module, plan: Plan) -> None:
    name, change = CHANGED[how]
    entry = layers(plan)[0]
    changed = replace(entry, tensors={**entry.tensors, name: change(entry.tensors[name])})
    with pytest.raises(PlanFileError, match=name):
        logits(compiled(original, Plan((changed,), plan.config)), FEW)


def test_a_kind_that_nobody_knows_is_a_damaged_file(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="kind"):
        rewritten(plan, tmp_path, lambda site: site.update(kind="convolution"))


def test_an_entry_of_an_ffn_cannot_name_the_rewrite_of_layers(original: nn.Module, plan: Plan) -> None:
    ffn, *_ = plan.ffns
    fields = {name: getattr(ffn, name) for name in ("fingerprint", "name", "kind", "activation", "dtype", "shapes")}
    entry = SitePlan(**fields, dense_bytes=1, method="coded_linear", settings={"bits": 4})
    with pytest.raises(PlanMismatchError, match="does not rewrite"):
        logits(compiled(original, Plan((entry,), plan.config)), FEW)


# ---- What is refused


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16, 4.5, True, "4"])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ConfigError, match="linear_bits"):
        Config(linear_bits=bits)


def test_the_rewrite_is_no_method(original: nn.Module) -> None:
    for method in ("coded_linear", "drop_bias+coded_linear", {"*": "coded_linear"}):
        with pytest.raises(ConfigError, match="linear"):
            calibrate(original, BATCHES, config=config(method=method))
    assert "FFN" in str(rewrite_named("coded_linear").refuse(sites_of(original, FEW)[0]))


def test_a_pattern_of_methods_does_not_name_layers(original: nn.Module) -> None:
    with pytest.raises(ConfigError, match="matches no site"):
        calibrate(original, BATCHES, config=config(method={"*.attn.*": "low_rank"}))


def test_what_needs_ffns_alone_refuses_the_plan(original: nn.Module, plan: Plan) -> None:
    with pytest.raises(ConfigError, match="linear_bits"):
        heal(original, plan, BATCHES)
    with pytest.raises(ConfigError, match="linear_bits"):
        logits(compiled(original, None, config=config(), fullgraph=False), FEW)
    with pytest.raises(ConfigError, match="linear_bits"):
        logits(compiled(original, plan, on_change="refit", fullgraph=False), FEW)


def test_weights_that_are_not_on_the_cpu_are_refused(plan: Plan) -> None:
    weight = torch.empty(3 * D, D, device="meta")
    weights = SiteWeights(weight, None, weight.new_empty(0, 3 * D), None)
    with pytest.raises(ConfigError, match="CPU"):
        rewrite_named("coded_linear").constants(layers(plan)[0], weights)
