"""What people do with compiled models: each works as with Inductor, or is a typed error that says what to do."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builders.counted import blocks, changing_nothing, counted, fast
from builders.ffns import ffn_of, inputs
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from tardis_fx import PlanMismatchError, StaleWeightError, explain
from tardis_fx.observation.observe import BatchObservation

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")  # torch.func loads decompositions

FEW, MANY = inputs(4, 16, seed=7), inputs(40, 16, seed=8)


@pytest.fixture
def calls() -> Iterator[Callable[[], int]]:
    with torch.no_grad(), counted() as asked:
        yield asked


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _patched(**settings: Any) -> Callable[[nn.Module, Callable[..., Any]], tuple[Tensor, Tensor]]:
    def habit(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        with torch._dynamo.config.patch(**settings):
            return run(FEW), model(FEW)

    return habit


def _stance(stance: str, *, warm: bool = True) -> Callable[[nn.Module, Callable[..., Any]], tuple[Tensor, Tensor]]:
    def habit(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        if warm:
            run(FEW)
        with torch.compiler.set_stance(stance):
            return run(FEW), model(FEW)

    return habit


def _changed_under_a_stance(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    ffn_of(model.get_submodule("0")).up.weight.mul_(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        return run(FEW), model(FEW)


def _reset(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    torch._dynamo.reset()
    run(FEW)
    torch.compiler.reset()
    return run(FEW), model(FEW)


def _exported(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    return torch.export.export(model, (FEW,)).module()(FEW), model(FEW)


def _parametrised(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    parametrize.register_parametrization(model[0].ffn.up, "weight", Twice())  # type: ignore[index,union-attr]
    return run(FEW), model(FEW)


def _autocast(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    with torch.autocast("cpu", torch.bfloat16):
        return run(FEW), model(FEW)


def _dual(model: Callable[..., Tensor]) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(model(forward_ad.make_dual(FEW, FEW))).tangent  # type: ignore[no-untyped-call]
        return tangent.clone()


def _dual_after_a_call(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    return _dual(run), _dual(model)


def _meta(model: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    run(FEW)
    model.to("meta")
    return run(FEW.to("meta")), model(FEW.to("meta"))


#: What is done with a model and its compiled form, and how many rewritten sites run; the model has two.
HABITS: dict[str, tuple[Callable[[nn.Module, Callable[..., Any]], tuple[Tensor, Tensor]], int]] = {
    "nothing": (lambda m, c: (c(FEW), m(FEW)), 2),
    "inference mode": (lambda m, c: (torch.inference_mode()(c)(FEW).clone(), m(FEW)), 2),
    "suppress_errors": (_patched(suppress_errors=True), 2),
    "repro_after aot": (_patched(repro_after="aot"), 2),
    "error_on_recompile": (_patched(error_on_recompile=True), 2),
    "verify_correctness": (_patched(verify_correctness=True), 2 * 2),
    "assume_static_by_default off": (_patched(assume_static_by_default=False), 2),
    "compiled_autograd": (_patched(compiled_autograd=True), 2),
    "stance force_eager": (_stance("force_eager"), 2),
    "stance fail_on_recompile": (_stance("fail_on_recompile"), 2 * 2),
    "stance eager_on_recompile": (_stance("eager_on_recompile"), 2 * 2),
    "stance eager_then_compile": (_stance("eager_then_compile", warm=False), 1),
    "weights changed under fail_on_recompile": (_changed_under_a_stance, 2),
    "reset in the middle": (_reset, 3 * 2),
    "a deep copy": (lambda m, c: (c(FEW), copy.deepcopy(c)(FEW)), 2 * 2),
    "a pickle": (lambda m, c: (c(FEW), pickle.loads(pickle.dumps(c))(FEW)), 2 * 2),
    "export of the original": (_exported, 2),
    "a parametrisation": (_parametrised, 2 + 1),
    "autocast": (_autocast, 2),
    "vmap of the compiled model": (lambda m, c: (torch.vmap(c)(inputs(2, 4, 16)), m(inputs(2, 4, 16))), 0),
    "forward-mode derivatives": (lambda m, c: (_dual(c), _dual(m)), 0),
    "forward-mode derivatives after a call": (_dual_after_a_call, 2),
    "jvp of the compiled model": (lambda m, c: (torch.func.jvp(c, (FEW,), (FEW,))[1], _dual(m)), 0),
    "the meta device": (_meta, 2),
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_compiled_model_bears(habit: str, calls: Callable[[], int]) -> None:
    model = blocks()
    do, expected_calls = HABITS[habit]
    output, expected = do(model, fast(model, changing_nothing(model), on_change="original"))
    assert output.device == expected.device
    if not expected.is_meta:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert calls() == expected_calls


#: What is compiled in place of the model, and how many rewritten sites run.
FUNCTIONS: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Tensor]], int]] = {
    "a function": (lambda m: lambda x: m(x), 2),
    "vmap": (lambda m: torch.vmap(m), 0),
    "jvp": (lambda m: lambda x: torch.func.jvp(ffn_of(m.get_submodule("0")), (x,), (x,))[1], 0),
    "grad": (lambda m: torch.func.grad(lambda x: m(x).sum()), 0),
    "functional_call": (lambda m: lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_around_a_model_give_what_they_give_in_eager_mode(name: str, calls: Callable[[], int]) -> None:
    model = blocks()
    make, expected_calls = FUNCTIONS[name]
    run = make(model)
    torch.testing.assert_close(fast(run, changing_nothing(model))(FEW), run(FEW), rtol=1e-4, atol=1e-4)
    assert calls() == expected_calls


def test_other_weights_by_functional_call_are_told_apart(calls: Callable[[], int]) -> None:
    model = blocks()
    other = {name: 2 * value for name, value in model.state_dict().items()}
    run = fast(model, changing_nothing(model))
    run(FEW)
    with pytest.raises(PlanMismatchError, match="its weights changed since calibration"):
        torch.func.functional_call(run, {f"_orig_mod.{name}": value for name, value in other.items()}, (FEW,))  # type: ignore[arg-type]
    torch.testing.assert_close(run(FEW), model(FEW), rtol=1e-4, atol=1e-4)


def test_a_stale_weight_raises_where_errors_are_suppressed(calls: Callable[[], int]) -> None:
    model = blocks()
    run = fast(model, changing_nothing(model))
    with torch._dynamo.config.patch(suppress_errors=True):
        run(FEW)
        ffn_of(model[0]).up.weight.mul_(2)
        with pytest.raises(StaleWeightError):
            run(FEW)


def test_a_suppressed_error_leaves_the_original(calls: Callable[[], int]) -> None:
    model = blocks()
    plan = changing_nothing(model)
    ffn_of(model[0]).up.weight.mul_(2)
    with torch._dynamo.config.patch(suppress_errors=True):
        torch.testing.assert_close(fast(model, plan, strict=True)(FEW), model(FEW))
    assert calls() == 0


# ---- Calibration and explanation in the same surroundings


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "suppress_errors": lambda: torch._dynamo.config.patch(suppress_errors=True),
    "error_on_recompile": lambda: torch._dynamo.config.patch(error_on_recompile=True),
    "repro_after": lambda: torch._dynamo.config.patch(repro_after="dynamo"),
    "compilation disabled": lambda: torch._dynamo.config.patch(disable=True),
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_then_compile": lambda: torch.compiler.set_stance("eager_then_compile"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "fail_on_recompile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "another backend forced": lambda: torch.compiler.set_stance("default", force_backend="eager"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_calibration_and_explanation_do_not_depend_on_dynamos_settings(name: str) -> None:
    model = blocks()
    plan = changing_nothing(model)
    with SURROUNDINGS[name]():
        assert [site.status for site in explain(model, plan, FEW).sites] == ["rewritten"] * 2
        observed = BatchObservation(model, [MANY, FEW], progress=False)
    assert [site.fingerprint for site in observed.sites] == [site.fingerprint for site in plan.sites]


# ---- Sizes that are marked as dynamic

#: Shape of the first call, what ``mark_dynamic`` is told, and how many sites each number of rows then rewrites.
MARKS: dict[str, tuple[tuple[int, ...], dict[str, int], dict[int, int]]] = {
    "a range across the split, first many": ((16, 16), {"min": 2, "max": 64}, {16: 0, 4: 0, 8: 0, 9: 0}),
    "a range across the split, first few": ((4, 16), {"min": 2, "max": 64}, {4: 0, 16: 0, 8: 0, 9: 0}),
    "a range of few": ((4, 16), {"min": 2, "max": 8}, {4: 2, 8: 2, 9: 0}),
    "a range of many": ((16, 16), {"min": 9, "max": 64}, {16: 0, 9: 0, 8: 2}),
    "no range": ((4, 16), {}, {4: 2, 8: 2, 9: 0, 40: 0}),
    "no range, first many": ((16, 16), {}, {16: 0, 9: 0, 8: 2}),
    "one value on the side of few": ((2, 4, 16), {}, {2: 0, 3: 0, 9: 0}),
    "no value on the side of few": ((3, 8, 16), {}, {3: 0, 2: 0, 9: 0}),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_size_marked_as_dynamic_is_served(name: str, calls: Callable[[], int]) -> None:
    shape, told, rows = MARKS[name]
    model = blocks()
    run = fast(model, changing_nothing(model), prefill="original")
    for count, expected_calls in rows.items():
        x = inputs(count, *shape[1:])
        if count == shape[0]:
            torch._dynamo.mark_dynamic(x, 0, **told)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        assert calls() == expected_calls, count


def test_a_range_across_the_split_is_named_and_refused_by_strict(
    calls: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    model = blocks()
    plan, x = changing_nothing(model), inputs(16, 16)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)  # type: ignore[no-untyped-call]
    fast(model, plan, prefill="original")(x)
    assert "up to and for more than 8 tokens: compile with prefill='rewritten'" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(PlanMismatchError, match="prefill='rewritten'"):
        fast(model, plan, prefill="original", strict=True)(x)
    torch._dynamo.reset()
    fast(model, plan, prefill="rewritten", strict=True)(x)
    assert calls() == 2


@pytest.mark.parametrize("mark", ["mark_unbacked", "maybe_mark_dynamic", "mark_static"])
def test_other_marks_are_served(mark: str, calls: Callable[[], int]) -> None:
    model = blocks()
    run = fast(model, changing_nothing(model), prefill="original")
    for count in (4, 16, 8):
        x = inputs(count, 16)
        getattr(torch._dynamo.decorators, mark)(x, 0)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls() == (0 if mark == "mark_unbacked" else 2 * 2)


def test_a_trace_by_jit_is_refused_as_for_any_backend(calls: Callable[[], int]) -> None:
    model = blocks()
    run = fast(model, changing_nothing(model))
    run(FEW)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace a dynamo-optimized function"):
        torch.jit.trace(run, (FEW,))  # type: ignore[no-untyped-call]
