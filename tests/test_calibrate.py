import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, batches, config, entries, ffn, ffn_of, inputs, planned
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx import CalibrationError, Config, ConfigError, Plan, TardisError, calibrate
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.planning import plan_for


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans are equal to the bit."""
    return len(a.sites) == len(b.sites) and all(
        vars(x) | {"tensors": None} == vars(y) | {"tensors": None}
        and x.tensors.keys() == y.tensors.keys()
        and all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
        for x, y in zip(entries(a), entries(b), strict=True)
    )


# ---- What may be given


def test_batches_may_be_any_iterable_of_tensors_or_dicts() -> None:
    model = ffn()
    plan = calibrate(model, batches(), config=config())
    assert same(calibrate(model, (batch for batch in batches()), config=config()), plan)
    assert same(calibrate(model, tuple({"input": batch} for batch in batches()), config=config()), plan)
    loader: Any = torch.utils.data.DataLoader(list(torch.cat(batches())), batch_size=256)  # type: ignore[arg-type]
    assert same(calibrate(model, loader, config=config()), plan)


def test_a_models_own_batches_of_keyword_arguments_are_understood() -> None:
    gpt2, tokens = models.gpt2(), [models.tokens(4, 16, seed=i) for i in range(2)]
    plan = calibrate(gpt2, tokens, config=config())
    mask = torch.ones(4, 16, dtype=torch.long)
    by_name = calibrate(
        gpt2, [{"input_ids": t, "attention_mask": mask, "use_cache": False} for t in tokens], config=config()
    )
    assert [site.fingerprint for site in by_name.sites] == [site.fingerprint for site in plan.sites]
    assert [site.name for site in plan.sites] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]


def test_batches_of_different_shapes_are_the_same_tokens() -> None:
    model, x = ffn(), torch.cat(batches())
    whole = calibrate(model, [x], config=config()).rewritten[0]
    cut = calibrate(model, [x[:100], x[100:500].view(4, 100, 16), x[500:501], x[501:]], config=config()).rewritten[0]
    assert cut.touched_bytes == pytest.approx(whole.touched_bytes, rel=0.01)
    assert cut.outlier_rate == pytest.approx(whole.outlier_rate, rel=0.02)


def test_calibration_repeats_to_the_bit() -> None:
    assert same(planned(ffn()), planned(ffn()))


def test_without_a_config_the_defaults_hold(capsys: pytest.CaptureFixture[str]) -> None:
    plan = calibrate(ffn(32, 256), batches(d=32))
    assert plan.config == Config()
    assert plan.touched_fraction == pytest.approx(0.2, rel=0.02)


def test_the_plan_keeps_its_config() -> None:
    given = config(budget=0.7, predictor_bits=3, sequential=True)
    plan = calibrate(ffn(), batches(), config=given)
    assert plan.config is given
    assert plan.rewritten[0].settings["bits"] == 3


def test_every_site_is_in_the_plan_refused_ones_with_the_reason() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.gate, self.up, self.down = ffn(), nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    plain, gated = sorted(planned(Both().eval(), method="paper").sites, key=lambda site: site.kind, reverse=True)
    assert (plain.kind, plain.method, plain.reason) == ("plain", "paper", None)
    assert (gated.kind, gated.method) == ("gated", None)
    assert "gated" in str(gated.reason)
    assert gated.dense_bytes == 4 * (3 * 16 * 64 + 2 * 64 + 16)


def test_one_ffn_that_runs_twice_is_one_site_and_sees_both_inputs() -> None:
    inner = ffn()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(3 * x)  # type: ignore[no-any-return]

    (site,) = planned(Twice().eval()).rewritten
    (both,) = calibrate(inner, [torch.cat([x, 3 * x]) for x in batches()], config=config()).rewritten
    (once,) = planned(inner).rewritten
    assert site.outlier_rate == pytest.approx(both.outlier_rate, rel=0.02)
    assert site.outlier_rate != pytest.approx(once.outlier_rate, rel=0.02)


def test_the_plans_of_one_observation_do_not_depend_on_each_other() -> None:
    model = nn.Sequential(Block(ffn(seed=1)), Block(ffn(seed=2))).eval()
    observation = BatchObservation(model, batches(), progress=False)
    wanted = [config(), config(method="paper", budget=0.9), config(sequential=True), config()]
    for each in wanted:
        assert same(plan_for(observation, each), calibrate(model, batches(), config=each)), each


# ---- What is left as it was


def test_calibration_leaves_the_model_as_it_was() -> None:
    block = Block(ffn())
    model = nn.Sequential(block, nn.Dropout()).eval()
    block.norm.weight.requires_grad_(False)
    hooked: list[int] = []
    block.ffn.register_forward_hook(lambda *_: hooked.append(1))
    x = inputs(5, 16)

    def state() -> list[object]:
        parameters = [(name, p.data_ptr(), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()]
        modules = [
            (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]
        return [*parameters, *modules]

    before, output, grad = state(), model(x), torch.is_grad_enabled()
    planned(model)
    assert state() == before
    assert torch.equal(model(x), output)
    assert torch.is_grad_enabled() == grad
    model(x).sum().backward()
    assert ffn_of(block).up.weight.grad is not None


def test_calibration_leaves_the_batches_as_they_were() -> None:
    given, untouched = batches(), batches()
    calibrate(ffn(), given, config=config())
    assert all(torch.equal(a, b) for a, b in zip(given, untouched, strict=True))


def test_a_later_compilation_is_as_if_there_had_been_no_calibration() -> None:
    model, x = Block(ffn()), inputs(5, 16)
    graphs: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in gm.graph.nodes])
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        planned(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x), model(x))
        torch._dynamo.reset()
        planned(model)
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]
    assert not any("tardis" in target for target in graphs[1])


def test_a_failed_calibration_leaves_the_model_as_it_was() -> None:
    model, x = Block(ffn()), inputs(5, 16)
    output = model(x)
    with pytest.raises(CalibrationError):
        calibrate(model, [x, torch.full_like(x, torch.nan)], config=config())
    assert torch.equal(model(x), output)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- Progress


def test_progress_is_shown_unless_it_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    planned(ffn(), progress=True)
    shown = capfd.readouterr().err
    assert "moments" in shown
    assert "batch" in shown
    for sequential in (False, True):
        planned(ffn(), progress=False, sequential=sequential)
        captured = capfd.readouterr()
        assert captured.out == captured.err == ""


# ---- Errors that a user can cause


def refused(cause: str, run: Callable[[], Any], kind: type[TardisError] = CalibrationError) -> None:
    with pytest.raises(kind, match=re.escape(cause)) as raised:
        run()
    assert type(raised.value) is kind


def test_no_batches() -> None:
    refused("no calibration batches", lambda: calibrate(ffn(), [], config=config()))
    refused("no calibration batches", lambda: calibrate(ffn(), iter(()), config=config()))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_batches_without_a_token(shape: tuple[int, ...]) -> None:
    refused("token", lambda: calibrate(ffn(), [torch.zeros(shape)], config=config()))


def test_some_batches_without_a_token_do_no_harm() -> None:
    assert same(calibrate(ffn(), [*batches(), torch.zeros(0, 16)], config=config()), planned(ffn()))


def test_a_single_batch_in_place_of_a_list() -> None:
    refused("wrap a single one in a list", lambda: calibrate(ffn(), batches()[0], config=config()))  # type: ignore[arg-type]
    single: Any = {"input": batches()[0]}
    refused("wrap a single one in a list", lambda: calibrate(ffn(), single, config=config()))


def test_batches_that_are_no_iterable() -> None:
    refused("batches", lambda: calibrate(ffn(), 3, config=config()))  # type: ignore[arg-type]


NO_BATCHES: dict[str, Any] = {
    "a number": 3,
    "text": "text",
    "nothing": None,
    "a list of a tensor": [torch.zeros(3, 16)],
    "a pair of tensors": (torch.zeros(3, 16), torch.zeros(3)),
    "a list of a tensor of two rows": [torch.zeros(2, 16)],
    "a list of two letters": ["ab"],
}


@pytest.mark.parametrize("batch", NO_BATCHES)
def test_a_batch_that_is_neither_tensor_nor_dict(batch: str) -> None:
    refused("a batch must be a tensor or a dict", lambda: calibrate(ffn(), [NO_BATCHES[batch]], config=config()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_an_input_that_is_not_finite_names_the_site(value: float, position: int) -> None:
    given = batches()
    given[position][7, 3] = value
    refused("ffn hold NaN or infinity", lambda: calibrate(_Wrapped(), given, config=config()))


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = ffn()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)  # type: ignore[no-any-return]


def test_weights_that_are_not_finite() -> None:
    model = ffn()
    with torch.no_grad():
        model.up.weight[2, 3] = torch.nan
    refused("NaN", lambda: planned(model))


def test_training_mode_names_the_module() -> None:
    model = nn.Sequential(Block(ffn()), nn.Dropout()).eval()
    model[1].train()
    refused("1 is in training mode: call model.eval() first", lambda: planned(model))
    refused("FFN is in training mode: call model.eval() first", lambda: planned(ffn().train()))


def test_a_model_without_ffns() -> None:
    refused("no feed-forward network", lambda: planned(nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()))


def test_a_model_whose_weights_are_all_computed_is_refused_with_the_reasons() -> None:
    model = nn.Sequential(Block(ffn()), Block(ffn()))
    for block in model:
        nn.utils.parametrizations.weight_norm(ffn_of(block).up)
    with pytest.raises(CalibrationError, match=r"0\.ffn: .* computed in the graph; 1\.ffn: .* computed in the graph"):
        planned(model.eval())


def test_a_model_none_of_whose_ffns_can_be_rewritten_has_a_plan_that_says_so() -> None:
    plan = calibrate(models.llama(), [models.tokens(4, 16)], config=config(method="paper"))
    assert plan.sites
    assert all(site.method is None and "gated" in str(site.reason) for site in plan.sites)


def test_a_budget_below_the_folded_weights_says_how_much_they_take() -> None:
    refused("the folded weights alone read 1,088", lambda: planned(ffn(), budget=0.1))


def test_an_unknown_method_lists_the_registered_ones_before_the_model_runs() -> None:
    model = ffn()
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    refused("no rewrite named 'magic'", lambda: planned(model, method="magic"), ConfigError)
    refused("gptq_rotated, guarded_fold", lambda: planned(model, method="magic"), ConfigError)
    assert ran == []


def test_a_batch_on_another_device_names_both() -> None:
    refused(
        "the batch is on meta, the model on cpu", lambda: calibrate(ffn(), [batches()[0].to("meta")], config=config())
    )
    refused("on meta", lambda: calibrate(ffn(), [{"input": batches()[0].to("meta")}], config=config()))


@pytest.mark.parametrize("wrong", [{"budget": 0.2}, 0.2, "guarded_fold"], ids=repr)
def test_a_config_of_the_wrong_type(wrong: Any) -> None:
    refused("config must be a tardis_fx.Config", lambda: calibrate(ffn(), batches(), config=wrong), ConfigError)


def test_only_subclasses_of_rewrite_are_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    wrong = EntryPoint("wrong", "builtins:dict", "tardis_fx.passes")
    monkeypatch.setattr("tardis_fx.passes.registry.entry_points", lambda group: [wrong])
    rewrite_named.cache_clear()
    try:
        refused("not a subclass of Rewrite", lambda: rewrite_named("wrong"), ConfigError)
        refused("registered are wrong", lambda: rewrite_named("guarded_fold"), ConfigError)
    finally:
        rewrite_named.cache_clear()
