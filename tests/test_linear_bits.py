"""Linear layers outside of FFNs in codes, from calibration to the compiled model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders.checkpoints import save_checkpoint
from builders.compiled import compiled
from builders.counted import counted, fast
from builders.linear_bits import BATCHES, FEW, MANY, VOCABULARY, D, config, gpt2, layers, layers_planned, logits, tokens
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

from tardis_fx import (
    CalibrationError,
    ConfigError,
    Plan,
    PlanMismatchError,
    StaleWeightError,
    calibrate,
    count_touched,
    explain,
    release,
)
from tardis_fx.cli.compare import cases
from tardis_fx.cli.main import app
from tardis_fx.passes import coded_linear
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.cpu.coded_layout import prepare_linear
from tardis_fx.runtime.tables import row_bytes
from tardis_fx.testing.assertions import relative_error


@pytest.fixture(scope="module")
def original() -> hf.PreTrainedModel:
    return gpt2()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return layers_planned()


# ---- The plan


def test_every_layer_has_an_entry_with_its_bytes_and_its_error(plan: Plan) -> None:
    names = [f"transformer.h.{i}.attn.{name}" for i in range(2) for name in ("c_attn", "c_proj")]
    assert [layer.name for layer in layers(plan)] == [*names, "transformer.wte"]
    for layer in layers(plan):
        (d, d_out), *bias = layer.shapes if len(layer.shapes) == 2 else (layer.shapes[0][::-1],)
        assert layer.tensors["rows"].shape == (d_out, row_bytes(d, 4))
        assert layer.dense_bytes == 4 * (d * d_out + (d_out if bias else 0))
        assert layer.touched_bytes == d_out * row_bytes(d, 4) + d + (4 * d_out if bias else 0)
        assert layer.stored_bytes == layer.dense_bytes + d_out * row_bytes(d, 4) + d
        assert 0 < layer.error < 0.12
        assert (layer.kind, layer.method, layer.settings) == ("linear", "coded_linear", {"bits": 4})


def test_ffn_bytes_and_the_budget_leave_linear_layers_out(original: nn.Module) -> None:
    both, ffns = (
        calibrate(original, BATCHES, config=config(method="gptq_rotated", budget=0.3, linear_bits=bits))
        for bits in (8, None)
    )
    assert not ffns.linear_layers
    for name in ("touched_fraction", "touched_bits", "stored_bits", "weights"):
        assert getattr(both, name) == getattr(ffns, name)
    assert [vars(a)["error"] for a in both.ffns] == [vars(b)["error"] for b in ffns.ffns]
    assert "5 of 5 linear layers in codes, " in str(both)
    assert "linear" not in str(ffns)
    assert str(both).startswith(str(ffns).removesuffix(")"))


@pytest.mark.parametrize("method", ["partial_linear", {"transformer.h.0.*": "gptq_rotated"}])
def test_bits_of_ffns_may_be_given_together_with_those_of_layers(original: nn.Module, method: Any) -> None:
    made = calibrate(original, BATCHES[:1], config=config(method=method, bits=12))
    assert len(layers(made)) == 5
    assert sum(isinstance(ffn, SitePlan) for ffn in made.ffns) == (2 if method == "partial_linear" else 1)


def test_more_bits_lose_less(original: nn.Module, plan: Plan) -> None:
    wide = calibrate(original, BATCHES, config=config(linear_bits=8))
    assert all(a.error < b.error / 8 for a, b in zip(layers(wide), layers(plan), strict=True))


def test_the_error_that_a_plan_says_is_that_of_new_tokens(original: nn.Module, plan: Plan) -> None:
    for layer in layers(plan):
        module = original.get_submodule("lm_head" if layer.name == "transformer.wte" else layer.name)
        seen: list[tuple[Tensor, Tensor]] = []
        with module.register_forward_hook(lambda _, x, y, seen=seen: seen.append((x[0], y))), torch.no_grad():
            original(tokens(8, 64, seed=99))
        ((x, expected),) = seen
        bias = getattr(module, "bias", None)
        rows, signs = layer.tensors["rows"], layer.tensors["signs"]
        with torch.no_grad():
            prepared = prepare_linear(CodedLinear(x, rows, signs, bias, 4))
            output = torch.ops.tardis.coded_linear(x, prepared, len(rows))
        assert relative_error(output, expected) == pytest.approx(layer.error, rel=0.2)


def test_several_runs_within_memory_give_the_same_plan(
    original: nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coded_linear, "MEMORY", 0)
    monkeypatch.setattr(coded_linear, "TOGETHER", 10)
    for offload in (False, True):
        made = calibrate(original, BATCHES, config=config(), offload=offload)
        for a, b in zip(layers(made), layers(plan), strict=True):
            assert a.error == pytest.approx(b.error, rel=1e-6)
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


def test_a_checkpoint_resumes_after_the_run(original: nn.Module, plan: Plan, tmp_path: Path) -> None:
    for _ in range(2):
        made = calibrate(original, BATCHES, config=config(), checkpoint=tmp_path)
        assert all(
            torch.equal(a.tensors["rows"], b.tensors["rows"]) for a, b in zip(layers(made), layers(plan), strict=True)
        )


def test_layers_alone_are_enough_for_a_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 100)).eval()
    made = calibrate(model, [torch.randn(64, 64)], config=config(method="partial_linear"))
    assert [layer.name for layer in layers(made)] == ["0", "2"]
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert 0 < relative_error(compiled(model, made)(x), model(x)) < 0.2


def test_a_weight_that_is_not_finite_is_refused(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("transformer.h.1.attn.c_proj.weight")[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="h.1.attn.c_proj"):
        calibrate(model, [BATCHES[0]], config=config())


# ---- The compiled model


def test_every_layer_runs_the_op_and_the_output_is_close(original: nn.Module, plan: Plan) -> None:
    expected = logits(original, MANY)
    with counted() as calls:
        output = logits(fast(original, plan), MANY)
        assert calls() == 5
    assert 0.001 < relative_error(output, expected) < 0.1
    torch._dynamo.reset()
    # Inductor sums in another order, and where a last bit differs, a token may be rounded to another step of 8 bits.
    assert relative_error(logits(compiled(original, plan, inner=None), MANY), output) < 1e-3


def test_layers_and_ffns_are_rewritten_together(original: nn.Module) -> None:
    made = calibrate(original, BATCHES, config=config(method="partial_linear", budget=0.5, linear_bits=8))
    with counted() as calls:
        output = logits(fast(original, made), FEW)
        assert calls() == 7
    assert relative_error(output, logits(original, FEW)) < 0.05
    with count_touched() as touched:
        logits(compiled(original, made), FEW)
    assert touched.sites == len(made.rewritten) == 7
    assert touched.per_token > sum(layer.touched_bytes for layer in layers(made))


def test_prefill_keeps_the_layers_of_steps_of_many_tokens(original: nn.Module, plan: Plan) -> None:
    with counted() as calls:
        run = fast(original, plan, prefill="original", dynamic=False)
        torch.testing.assert_close(logits(run, MANY), logits(original, MANY))
        assert calls() == 0
        logits(run, FEW)
        assert calls() == 5
        with torch.no_grad():  # a head of one token decodes, whatever the step
            run(tokens(1, 40), use_cache=False, logits_to_keep=1)
        assert calls() == 1


def test_generation_decodes_with_the_op(original: nn.Module, plan: Plan) -> None:
    model = copy.deepcopy(original)
    model.forward = fast(model.forward, plan, prefill="original")
    with counted() as calls, torch.no_grad():
        model.generate(tokens(1, 12), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        assert calls() >= 3 * 5


def test_the_embeddings_of_a_tied_table_stay(original: nn.Module, plan: Plan) -> None:
    """The lookup reads the weight, and the head's product the codes."""
    head = Plan(tuple(e if e.name == "transformer.wte" else e.kept("") for e in layers(plan)), plan.config)
    seen: list[Tensor] = []
    final = original.get_submodule("transformer.ln_f")
    with final.register_forward_hook(lambda *values: seen.append(values[2])):
        expected, output = logits(original, FEW), logits(compiled(original, head), FEW)
    torch.testing.assert_close(seen[0], seen[1])
    assert 0 < relative_error(output, expected) < 0.12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(original: nn.Module, dtype: torch.dtype) -> None:
    model = copy.deepcopy(original).to(dtype)
    made = calibrate(model, BATCHES, config=config(linear_bits=8))
    output = logits(compiled(model, made), FEW)
    assert output.dtype is dtype
    assert relative_error(output.float(), logits(model, FEW).float()) < 0.05


# ---- Explain


def test_explain_sums_the_layers_up_and_lists_those_that_stay(original: nn.Module, plan: Plan) -> None:
    *coded, last = layers(plan)
    report = explain(original, Plan((*plan.ffns, *coded, last.kept("for a test")), plan.config), FEW)
    assert [site.kind for site in report.sites] == ["plain"] * 2 + ["linear"] * 5
    assert [site.parts for site in report.sites[2:]] == ["4 bits"] * 4 + [""]
    text = str(report)
    touched, dense = (sum(getattr(layer, name) for layer in coded) / 1e6 for name in ("touched_bytes", "dense_bytes"))
    assert f"4 linear layers in 4 bits: {touched:.3g} of {dense:.3g} MB touched per token" in text
    assert "largest error" in text
    assert "linear layer transformer.wte is left as it is: for a test" in text
    assert "0 of 2 sites rewritten; 100.0% of the FFN weight bytes" in text
    assert report.missing == ()


def test_strict_refuses_a_layer_that_stays(original: nn.Module, plan: Plan) -> None:
    only = Plan(tuple(layers(plan)[:-1]), plan.config)
    with pytest.raises(PlanMismatchError, match="wte"):
        logits(compiled(original, only, strict=True), FEW)


# ---- Other ways to calibrate


def test_the_command_calibrates_layers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, gpt2(), torch.cat([torch.arange(VOCABULARY), tokens(2000)]))
    arguments = ["calibrate", str(tmp_path / "plan"), "--model", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    arguments += ["--windows", "8", "--method", "wanda:budget=0.6"]
    result = CliRunner().invoke(app, [*arguments, "--linear-bits", "8"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "5 of 5 linear layers in codes" in " ".join(result.output.split())
    assert Plan.load(tmp_path / "plan").config.linear_bits == 8
    for wrong in (["--linear-bits", "5"], ["--linear-bits", "8", "--method", "wanda:budget=0.6,linear_bits=4"]):
        with pytest.raises(ConfigError, match="linear_bits"):
            CliRunner().invoke(app, [*arguments, *wrong], catch_exceptions=False)


def test_a_target_of_divergence_counts_the_layers(original: nn.Module) -> None:
    made = calibrate(original, BATCHES, config=config(method="gptq_rotated", target_kl=0.05))
    assert len(layers(made)) == 5
    assert made.kl is not None
    assert 0 < made.kl < 0.05


# ---- Other ways to run


@torch.no_grad()
def test_released_weights_are_those_that_nothing_else_reads(original: nn.Module, plan: Plan) -> None:
    model = copy.deepcopy(original)
    before = logits(compiled(model, plan), FEW)
    matrices = sum(layer.dense_bytes for layer in layers(plan)[:4]) - sum(4 * (3 * D + D) for _ in range(2))
    assert release(model, plan, FEW) == matrices  # the head's is the embeddings' too
    torch.compiler.reset()
    assert torch.equal(logits(compiled(model, plan), FEW), before)
    with pytest.raises(PlanMismatchError, match="released"):
        logits(compiled(model, plan, prefill="original"), MANY)


@torch.no_grad()
def test_a_frozen_model_gives_what_the_rewritten_one_gives(original: nn.Module, plan: Plan) -> None:
    model = copy.deepcopy(original).requires_grad_(False)
    free = logits(compiled(model, plan, inner=None), FEW)
    torch.compiler.reset()
    with inductor_config.patch(freezing=True):
        run = compiled(model, plan, inner=None)
        torch.testing.assert_close(logits(run, FEW), free, rtol=1e-4, atol=1e-4)
        model.get_parameter("transformer.h.0.attn.c_attn.weight").mul_(1.5)
        with pytest.raises(StaleWeightError):
            logits(run, FEW)


def test_the_comparison_of_rewrites_refuses_layers() -> None:
    _, case = cases("wanda:linear_bits=4", [0.5])
    with pytest.raises(ConfigError, match="linear_bits"):
        case.check()


class Pooled(nn.Module):
    """A layer that sees one token of each text, and one that sees all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.pooler = nn.Embedding(VOCABULARY, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        del attention_mask
        return self.pooler(self.layer(self.table(input_ids))[:, 0])  # type: ignore[no-any-return]


def test_padding_is_left_out_where_tokens_are_seen_and_a_prepared_few_tokens_is_coded() -> None:
    torch.manual_seed(0)
    model, mask = Pooled().eval(), torch.ones(64, 6, dtype=torch.long)
    mask[:, 4:] = 0
    ids = tokens(64, 6)
    made, other = (
        calibrate(model, [{"input_ids": text, "attention_mask": mask}], config=config())
        for text in (ids, torch.where(mask.bool(), ids, 7))
    )
    assert [layer.name for layer in layers(made)] == ["layer", "pooler"]
    for a, b in zip(layers(made), layers(other), strict=True):
        assert torch.equal(a.tensors["rows"], b.tensors["rows"])
