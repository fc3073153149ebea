"""Gated FFNs in the rewrites without a guard."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf
from builders import models
from builders.compiled import compiled
from builders.ffns import config, entries
from builders.profile import examples
from hypothesis import given, settings

from tardis_fx import Plan
from tardis_fx.graph.site import SiteWeights
from tardis_fx.measure.flops import prefill_share
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.statistics.check import original
from tardis_fx.testing import LAWS, assert_equivalent, laws
from tardis_fx.testing.assertions import relative_error
from tardis_fx.testing.observation import SiteObservation, gated
from tardis_fx.testing.strategies import Calibration, Specimen, Weights, weights

PRUNED = ["magnitude", "wanda", "ria", "sparsegpt"]
TWO_OF_FOUR = [f"{name}_2_4" for name in PRUNED]
QUANTISED = ["rtn", "gptq", "gptq_rotated"]
EXACT = [*PRUNED, "low_rank", "ffsplit", "hot_fold"]
METHODS = [*EXACT, *TWO_OF_FOUR, *QUANTISED, "token_gate"]
every_method = pytest.mark.parametrize("method", METHODS)
KINDS = ("gated", "fused")
CALIBRATION = Calibration(2, 200, "correlated")


@cache
def fitted(method: str, kind: str, budget: float = 0.6, *, bias: bool = True) -> tuple[ObservedSite, SitePlan]:
    specimen = Specimen(Weights(20, 80, "silu", bias=bias, kind=kind), CALIBRATION)
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    return observation.sites[0], plan_for(observation, config(method=method, budget=budget)).rewritten[0]


@settings(max_examples=examples(5))
@given(weights(dtypes=[torch.float32], kinds=KINDS))
def test_with_all_the_bytes_the_output_is_the_originals(drawn: Weights) -> None:
    specimen = Specimen(drawn, CALIBRATION)
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    (site,), x = observation.sites, specimen.unseen(50)
    for method in EXACT:
        plan = plan_for(observation, config(method=method, budget=1.0))
        assert plan.touched_fraction == pytest.approx(1), method
        wanted = original(site.weights, drawn.activation, x)
        assert relative_error(laws.output(site, plan.rewritten[0], x), wanted) < 1e-5, method


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_the_bytes_8_bits_err_little(method: str, kind: str) -> None:
    _, entry = fitted(method, kind, 1.0)
    assert entry.settings["bits"] == 8
    assert entry.error < 0.02


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_gate_and_up_projection_in_one_matrix_are_planned_like_two_matrices(method: str, bias: bool) -> None:
    (apart, one), (together, other) = (fitted(method, kind, bias=bias) for kind in KINDS)
    assert (one.touched_bytes, one.dense_bytes, one.settings) == (
        other.touched_bytes, other.dense_bytes, other.settings
    )  # fmt: skip
    assert one.error == pytest.approx(other.error, rel=1e-4)
    assert one.stored_bytes == other.stored_bytes
    x = CALIBRATION.batch(30, 20, number=7)
    assert_equivalent(laws.output(together, other, x), laws.output(apart, one, x))


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_touched_are_all_three_matrices(method: str, kind: str) -> None:
    site, entry = fitted(method, kind)
    constants = rewrite_named(method).constants(entry, site.weights)
    counted = sum(constant.nbytes for constant in constants.values())
    if method in (*PRUNED, *TWO_OF_FOUR):
        values = [int((constants[name] != 0).sum()) for name in ("gate", "up", "down")]
        assert min(values) >= 0.95 * max(values), "one matrix is pruned more than another"  # rows keep whole numbers
        positions = sum(values) // 4 if method in TWO_OF_FOUR else 0  # two bits each
        counted = 4 * sum(values) + positions + 4 * (2 * 80 + 20)
    if method == "token_gate":  # reads either the map or the FFN
        share = entry.outlier_rate
        counted -= share * 4 * 20 * 21 + (1 - share) * entry.dense_bytes  # type: ignore[assignment]
    assert entry.touched_bytes == pytest.approx(counted)
    assert entry.touched_bytes <= 0.6 * entry.dense_bytes == 0.6 * 4 * (3 * 20 * 80 + 2 * 80 + 20)


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_the_laws_of_the_contract_hold(method: str, kind: str) -> None:
    specimen = Specimen(Weights(12, 32, "silu", kind=kind, dtype=torch.bfloat16), Calibration(2, 100), 0.6)
    for law in LAWS:
        if law is not laws.the_compiled_model_equals_the_eager_forward:  # below, for whole models
            law(method, specimen)


@pytest.mark.parametrize("method", ["gptq", "gptq_rotated", "sparsegpt", "low_rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_at_the_inputs_errs_less_than_what_does_not(method: str, kind: str) -> None:
    blind = {"gptq": "rtn", "gptq_rotated": "rtn", "sparsegpt": "magnitude", "low_rank": "ffsplit"}[method]
    assert fitted(method, kind, 0.3)[1].error < fitted(blind, kind, 0.3)[1].error


@pytest.mark.parametrize("kind", KINDS)
def test_hot_fold_keeps_the_neurons_that_no_plane_fits(kind: str) -> None:
    specimen = Specimen(Weights(20, 80, "silu", kind=kind), Calibration(2, 400))
    (model,), curved = specimen.ffns(), [5, 30, 66]
    site = SiteObservation([model], []).sites[0]
    assert site.weights.gate is not None
    with torch.no_grad():
        site.weights.down[:, [*curved, 1, 2]] *= 30
        site.weights.gate[[1, 2]] = 0  # times a constant, W1's half is a line
    observation = SiteObservation([model], specimen.batches())
    kept = plan_for(observation, config(method="hot_fold", budget=0.3)).rewritten[0].tensors["kept"].tolist()
    assert set(curved) <= set(kept)
    assert not {1, 2} & set(kept)


def test_a_gated_ffn_without_its_activation_is_no_affine_map() -> None:
    for method in ("bilinear", "exact_fold"):
        assert "product of two projections" in str(rewrite_named(method).refuse(gated().site))


def test_an_ffn_is_rid_of_the_biases_in_front_of_its_activation_and_refused_without_any() -> None:
    site, entry = fitted("drop_bias", "gated", 1.0)
    assert entry.touched_bytes == entry.dense_bytes - 4 * 2 * 80
    x = CALIBRATION.batch(10, 20)
    bare = replace(site.weights, up_bias=None, down_bias=entry.tensors["bias"], gate_bias=None)
    assert_equivalent(laws.output(site, entry, x), original(bare, "silu", x))
    specimen = Specimen(Weights(20, 80, "silu", bias=False, kind="fused"), CALIBRATION)
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    (kept,) = plan_for(observation, config(method="drop_bias", budget=1.0)).sites
    assert kept.reason == "it has no bias in front of its activation"


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_matrices_take_the_flops_of_the_originals_and_thin_ones_those_of_their_bytes(kind: str) -> None:
    specimen = Specimen(Weights(20, 80, bias=False, kind=kind), CALIBRATION)
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    shares = {}
    for method in ("wanda", "low_rank"):
        plan = plan_for(observation, config(method=method, budget=0.5))
        shares[method] = prefill_share(plan, observation) / (1 if method == "wanda" else plan.touched_fraction)
    assert shares == pytest.approx({"wanda": 1, "low_rank": 1})


# ---- Models of transformers


def phi3() -> hf.PreTrainedModel:
    """Gate and up projection are one matrix."""
    of = hf.Phi3Config(
        vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, intermediate_size=96, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.Phi3ForCausalLM(of).eval()


@cache
def language_model(name: str) -> tuple[hf.PreTrainedModel, dict[str, Plan]]:
    """A model whose FFNs count, and all plans for it: after each test Dynamo forgets the capture."""
    model = {"llama": models.llama, "phi3": phi3}[name]()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.mul_(8)
    observation = BatchObservation(model, [models.tokens(4, 32, seed=i) for i in range(3)], progress=False)
    methods = [method for model_name, method in TRIED if model_name == name]
    return model, {method: plan_for(observation, config(method=method, budget=0.4)) for method in methods}


TRIED = [("llama", "wanda"), ("llama", "gptq"), ("phi3", "gptq"), ("phi3", "gptq_rotated"), ("phi3", "low_rank")]


@pytest.mark.parametrize(("name", "method"), TRIED)
@torch.no_grad()
def test_a_compiled_language_model_is_the_model_with_rewritten_ffns(name: str, method: str) -> None:
    model, plans = language_model(name)
    wanted = copy.deepcopy(model)
    for layer, entry in zip(wanted.model.layers, entries(plans[method]), strict=True):
        layer.mlp.forward = _rewritten(layer.mlp, entry)
    x = models.tokens(2, 12, seed=9)
    found = compiled(model, plans[method], strict=True)(x, use_cache=False).logits
    assert_equivalent(found, wanted(x, use_cache=False).logits)
    assert relative_error(found, model(x, use_cache=False).logits) > 0.01


def _rewritten(mlp: torch.nn.Module, entry: SitePlan) -> object:
    """By the eager specification, from the module's own weights."""
    own = {key.split("_proj")[0]: p.detach() for key, p in mlp.named_parameters()}
    gate, up = own["gate_up"].chunk(2) if "gate_up" in own else (own["gate"], own["up"])
    site_weights = SiteWeights(up, None, own["down"], None, gate)
    rewrite = rewrite_named(str(entry.method))
    constants = rewrite.constants(entry, site_weights)
    return lambda x: rewrite.forward(x, constants, entry)
