import math

import pytest
import torch
from builders import profile
from builders.compiled import compiled
from builders.ffns import Oracle, classes, config, oracle, oracles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tardis_fx import Plan
from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import Correction

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0,), (1,), (5,), (40,), (), (2, 3), (2, 0), (3, 1, 7), (1, 64)]
CLASSES = list(range(20)), list(range(20, 26))  # of 32 neurons


def run(model: nn.Module, plan: Plan, x: Tensor, *, inner: str = "aot_eager", dynamic: bool | None = None) -> Tensor:
    with torch.no_grad():
        return compiled(model, plan, inner=inner, dynamic=dynamic)(x)  # type: ignore[no-any-return]


def plan_of(o: Oracle, guarded: list[int] = CLASSES[0], exact: list[int] = CLASSES[1]) -> Plan:
    return Plan((o.plan(guarded, exact),), config())


def examples(o: Oracle, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    return o.x.repeat(1 + count // len(o.x), 1)[:count].view(*shape, o.x.shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rewritten_graph_equals_the_eager_specification(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    o = oracle(16, 32, 40, d_out=16).to(dtype)
    x = examples(o, shape)
    result = run(o.model(), plan_of(o), x)
    assert (result.shape, result.dtype) == ((*shape, 16), dtype)
    torch.testing.assert_close(result, o.rewritten(*CLASSES, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 20)], ids=str)
def test_the_graph_that_inductor_compiles_equals_the_eager_specification(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    o = oracle(16, 32, 40, d_out=16).to(dtype)
    x = examples(o, shape)
    torch.testing.assert_close(run(o.model(), plan_of(o), x, inner="inductor"), o.rewritten(*CLASSES, x))


@settings(max_examples=profile.examples(15))
@given(oracles(expanding=True), st.sampled_from(DTYPES), st.data())
def test_any_ffn_under_any_plan_equals_the_eager_specification(
    o: Oracle, dtype: torch.dtype, data: st.DataObject
) -> None:
    guarded, exact = data.draw(classes(len(o.lower)))
    o = o.to(dtype)
    torch._dynamo.reset()
    torch.testing.assert_close(run(o.model(), plan_of(o, guarded, exact), o.x), o.rewritten(guarded, exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rewritten_graph_equals_the_reference_op_to_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without the kernel in between."""
    o = oracle(16, 32, 40, d_out=16).to(dtype)
    result = run(o.model(), plan_of(o), o.x[:5])
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.tardis, "correct", lambda *fields: reference.correct(Correction(*fields)))
        expected = o.rewritten(*CLASSES, o.x[:5])
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_symbolic_sizes_are_rewritten_once_for_all_of_them() -> None:
    o = oracle(16, 32, 40, d_out=16)
    fast = compiled(o.model(), plan_of(o), inner="aot_eager", dynamic=True)
    with torch.no_grad():
        fast(examples(o, (2, 3)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in [(4, 5), (3, 30), (7, 2)]:
                x = examples(o, shape)
                torch.testing.assert_close(fast(x), o.rewritten(*CLASSES, x))


def test_an_input_that_is_not_contiguous_gives_the_same() -> None:
    o = oracle(16, 32, 40, d_out=16)
    x = examples(o, (4, 6))
    torch.testing.assert_close(run(o.model(), plan_of(o), x.transpose(0, 1)), o.rewritten(*CLASSES, x).transpose(0, 1))


def test_an_input_written_to_after_the_ffn_read_it_does_not_matter() -> None:
    o = oracle(16, 32, 40, d_out=16)

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = o.model()

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            hidden = self.up(x)
            x.zero_()
            return self.down(self.act(hidden)) + x  # type: ignore[no-any-return]

    torch.testing.assert_close(run(Writes().eval(), plan_of(o), o.x[:5]), o.rewritten(*CLASSES, o.x[:5]))


def test_ffns_that_follow_each_other_directly_are_both_rewritten() -> None:
    first, second = oracle(16, 32, 5, d_out=16, seed=1), oracle(16, 32, 5, d_out=16, seed=2)
    plan = Plan((first.plan(*CLASSES), second.plan(*CLASSES)), config())
    result = run(nn.Sequential(first.model(), second.model()), plan, first.x)
    torch.testing.assert_close(result, second.rewritten(*CLASSES, first.rewritten(*CLASSES)))


def test_one_ffn_used_twice_is_rewritten_twice() -> None:
    o = oracle(16, 32, 5, d_out=16)
    inner = o.model()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(-x)  # type: ignore[no-any-return]

    expected = o.rewritten(*CLASSES) + o.rewritten(*CLASSES, -o.x)
    torch.testing.assert_close(run(Twice().eval(), plan_of(o), o.x), expected)
