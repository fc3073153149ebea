"""``guarded_fold`` at gated sites."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders import models
from builders.compiled import compiled
from builders.ffns import batches, classes, config, ffn, inputs
from builders.gated import Gated, observed
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tardis_fx import (
    CalibrationError,
    Config,
    Plan,
    StaleWeightError,
    calibrate,
    count_touched,
    explain,
    release,
)
from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.guards import Score
from tardis_fx.guarded_fold.settled import AffineValue, Settled
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.paper import Paper
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.check import Check

X = inputs(4, 16)


def drafted(site: ObservedSite, x: Tensor, bits: int = 2) -> Draft:
    """A draft that has seen tokens."""
    seen = DraftObserver(site)
    seen.update(x)
    return Draft.from_observer(site, seen, Quantisation(bits, 64, "gptq"))


def settled(draft: Draft, guarded: list[int], exact: list[int], threshold: Tensor) -> Settled:
    """A draft with some classes and thresholds; any surrogates will do."""
    is_guarded, is_exact = (
        torch.zeros(len(draft.neurons), dtype=torch.bool).index_fill(0, torch.tensor(own, dtype=torch.long), True)
        for own in (guarded, exact)
    )
    assert isinstance(draft.guard, Score)
    limits = torch.stack([torch.full_like(threshold, -torch.inf), threshold], 1)
    return Settled(draft, 16, 16, AffineValue(draft.guard.surrogate.flip(0)), limits, is_guarded, is_exact, None)


def output(settled: Settled, x: Tensor) -> Tensor:
    """What the plan of a settled site gives."""
    site = settled.draft.site
    weight, bias = settled.store_fold(*settled.uncorrected.fold(settled.draft.neurons))
    plan = SitePlan.from_site(
        site.site, site.parameters, method="guarded_fold", settings=settled.settings,
        tensors=settled.tensors | {"folded_weight": weight, "folded_bias": bias},
    )  # fmt: skip
    rewrite = GuardedFold()
    return rewrite.forward(x, rewrite.constants(plan, site.weights), plan)


@st.composite
def sites(draw: st.DrawFn) -> tuple[Gated, Draft, Tensor]:
    d = draw(st.sampled_from([1, 5, 64, 65]))
    hidden = draw(st.integers(d + 1, d + 20))
    activation = draw(st.sampled_from(["silu", "gelu", "relu", "sigmoid"]))
    seed = draw(st.integers(0, 2**16))
    model = Gated(d, hidden, activation, bias=draw(st.booleans()), d_out=hidden, seed=seed)
    model.down.weight.data = torch.eye(hidden)  # each output is one neuron's
    x = inputs(40, d, seed=seed)
    return model, drafted(observed(model), x), x


@settings(max_examples=examples(10))
@given(sites(), st.data())
def test_neurons_beyond_the_threshold_and_exact_ones_are_the_original_and_all_others_their_planes(
    drawn: tuple[Gated, Draft, Tensor], data: st.DataObject
) -> None:
    model, draft, x = drawn
    levels = draft.guard.level(draft.estimates(x))
    threshold = levels.sort(0).values[19:21].mean(0)
    site = settled(draft, *data.draw(classes(len(draft.neurons))), threshold)
    clear = (levels - threshold).abs() > 1e-4 * (1 + threshold)
    with torch.no_grad():
        found, dense = output(site, x), model(x)
        z, response = draft.neurons.evaluate(x)
        bias = 0 if model.down.bias is None else model.down.bias
    corrected = site.exact | site.guarded & (levels > threshold)
    wanted = torch.where(corrected, dense, response - site.uncorrected.residual(z, response) + bias)
    atol = 1e-4 * (1 + response.abs().max().item())
    torch.testing.assert_close(found[clear], wanted[clear], rtol=1e-4, atol=atol)


@settings(max_examples=examples(6))
@given(sites(), st.booleans())
def test_correcting_everything_gives_the_original(drawn: tuple[Gated, Draft, Tensor], guarded: bool) -> None:
    model, draft, x = drawn
    every = list(range(len(draft.neurons)))
    below = torch.full((len(every),), -torch.inf)
    with torch.no_grad():
        dense, found = model(x), output(settled(draft, *((every, []) if guarded else ([], every)), below), x)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4 * (1 + dense.abs().max().item()))


def test_a_product_that_is_a_plane_needs_no_more_than_the_fold() -> None:
    model = Gated(activation="relu")
    model.gate.bias.data += 100  # always open
    model.up.weight.data.zero_()
    (plan,) = calibrate(model, batches(), config=config(budget=0.115)).rewritten  # 0.1126 is the fold
    assert plan.error < 1e-3
    assert len(plan.tensors["neurons"]) <= 1


# ---- The fit


@pytest.mark.parametrize(("fold_bits", "row_bits", "budget"), [(16, 16, 0.6), (4, 4, 0.12), (8, 3, 0.12)])
def test_the_error_told_is_the_error_measured_and_the_bytes_are_those_touched(
    fold_bits: int, row_bits: int, budget: float
) -> None:
    model, text = Gated(64, 200), batches(d=64)
    plan = calibrate(model, text, config=config(budget=budget, fold_bits=fold_bits, row_bits=row_bits))
    (entry,), site = plan.rewritten, observed(model)
    assert len(entry.tensors["codes"]) > 0
    assert 0 < entry.outlier_rate < 1
    rewrite = GuardedFold()
    constants = rewrite.constants(entry, site.weights)
    check = Check(site, lambda x: rewrite.forward(x, constants, entry), held_back=True)
    for batch in text:
        check.update(batch)
    assert check.error == pytest.approx(entry.error, rel=0.02)
    assert entry.touched_bytes <= budget * entry.dense_bytes * (1 + 1e-6)
    with torch.no_grad(), count_touched() as touched:
        fast = compiled(model, plan)
        for batch in text:
            fast(batch)
    assert touched.per_token == pytest.approx(entry.touched_bytes, rel=1e-3)
    assert touched.outlier_rate == pytest.approx(entry.outlier_rate, rel=1e-3)


def test_more_bytes_err_less_and_correction_beats_the_fold_alone() -> None:
    errors = [
        calibrate(Gated(64, 200), batches(d=64), config=config(budget=b, fold_bits=None, row_bits=None)).sites[0].error
        for b in (0.06, 0.2, 0.4)
    ]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_matrices_give_the_same_plan_as_matrices_apart(bits: int, bias: bool) -> None:
    apart, fused = (
        calibrate(Gated(fused=fused, bias=bias), batches(), config=config(fold_bits=bits, row_bits=bits)).rewritten[0]
        for fused in (False, True)
    )
    assert apart.dense_bytes == fused.dense_bytes
    assert (apart.touched_bytes, apart.stored_bytes) == pytest.approx((fused.touched_bytes, fused.stored_bytes))
    for name, tensor in apart.tensors.items():
        torch.testing.assert_close(fused.tensors[name], tensor)


def test_plain_and_gated_sites_share_one_budget() -> None:
    model = nn.Sequential(ffn(seed=1), Gated(), ffn(seed=2)).eval()
    plan = calibrate(model, batches(), config=config(budget=0.5))
    assert [(site.kind, site.method) for site in plan.sites] == [
        (kind, "guarded_fold") for kind in ("plain", "gated", "plain")
    ]
    assert plan.touched_fraction <= 0.5 + 1e-6
    assert plan.touched_fraction > 0.45
    assert len({round(site.touched_bytes / site.dense_bytes, 3) for site in plan.sites}) == 3, "split by the price"


@pytest.mark.parametrize("changed", [{"target_error": 0.3}, {"sequential": True}, {"allocation": "per_site"}])
def test_all_ways_to_fit_take_gated_sites(changed: dict[str, Any]) -> None:
    model = nn.Sequential(Gated(seed=1), Gated(seed=2)).eval()
    plan = calibrate(model, batches(), config=config(**changed))
    assert all(site.method == "guarded_fold" for site in plan.sites)
    assert all(0 < site.error < 0.7 for site in plan.sites)
    if "target_error" in changed:
        assert sum(site.error**2 for site in plan.sites) ** 0.5 <= 0.3 * 2**0.5 + 1e-9


def test_a_budget_below_the_folded_weights_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the folded weights alone"):
        calibrate(Gated(), batches(), config=config(budget=0.05))


# ---- What runs


@torch.no_grad()
def test_a_plan_comes_back_from_its_file_and_runs_alike(tmp_path: Path) -> None:
    model = Gated()
    plan = calibrate(model, batches(), config=config(fold_bits=4, row_bits=4))
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    found = compiled(model, plan, inner=None)(X)
    assert torch.equal(found, compiled(model, loaded, inner=None)(X))
    assert not torch.equal(found, model(X))
    torch.testing.assert_close(found, compiled(model, plan)(X), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_prefill_keeps_the_original_and_decoding_takes_the_rewritten_form() -> None:
    model = Gated()
    fast = compiled(model, calibrate(model, batches(), config=config(prefill="original")))
    many = inputs(32, 16)
    assert torch.equal(fast(many), model(many))
    assert not torch.equal(fast(X), model(X))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("half", ["gate", "up"])
@torch.no_grad()
def test_a_changed_weight_is_refused(half: str, fused: bool) -> None:
    model = Gated(fused=fused)
    fast = compiled(model, calibrate(model, batches(), config=config()))
    fast(X)
    weight = model.both.weight[(half == "up") * 48 :] if fused else getattr(model, half).weight
    weight[0, 0] += 1
    with pytest.raises(StaleWeightError):
        fast(X)


@torch.no_grad()
def test_without_a_plan_a_gated_site_is_observed_fitted_and_swapped_in() -> None:
    model, tokens = Gated(), 512
    options: dict[str, Any] = {
        "config": Config(method="guarded_fold", budget=0.5, progress=False, prefill="rewritten"),
        "profile_tokens": tokens,
    }
    fast = compiled(model, None, tolerance=0.6, **options)
    stages = []
    for i in range(5):
        fast(inputs(tokens, 16, seed=i))
        stages.append(explain(fast, None, X).sites[0].reason.removeprefix("profiling: ").split(",")[0])
    assert stages[:3] == ["hot ranges", "residuals at a budget of 0.5", "check"]
    (site,) = explain(fast, None, X).sites
    assert (site.kind, site.status, site.method) == ("gated", "rewritten", "guarded_fold")
    assert not torch.equal(fast(X), model(X))


def test_the_papers_recipe_does_not_take_gated_sites_and_says_why() -> None:
    assert "two" in str(Paper().refuse(observed(Gated()).site))


_TINY: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CAUSAL = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TINY)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_TINY)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_TINY)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_TINY, head_dim=16)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_TINY, eos_token_id=2, bos_token_id=1)),
}


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_transformers_model_at_a_generous_budget_gives_nearly_what_it_gave(name: str) -> None:
    torch.manual_seed(0)
    model = CAUSAL[name]().eval()
    text = [models.tokens(4, 32, seed=i) for i in range(3)]
    plan = calibrate(model, text, config=config(budget=0.9, fold_bits=8, row_bits=8))
    assert [(site.kind, site.method) for site in plan.sites] == [("gated", "guarded_fold")]
    unseen = models.tokens(2, 16, seed=9)
    dense = model(unseen, use_cache=False).logits
    found = compiled(model, plan, strict=True)(unseen, use_cache=False).logits
    assert not torch.equal(found, dense)
    assert (found - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_gated_model_without_its_matrices_gives_what_it_gave(fused: bool) -> None:
    model = Gated(fused=fused)
    plan = calibrate(model, batches(), config=config(fold_bits=8, row_bits=8))
    before = compiled(model, plan)(X)
    assert release(model, plan, X) == 4 * 3 * 16 * 48
    torch.compiler.reset()
    assert torch.equal(compiled(model, plan)(X), before)
