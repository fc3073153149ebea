"""On a CUDA device: the op under Inductor and in CUDA graphs."""

import copy
from typing import Any

import pytest
import torch
from builders.correction import arguments, assert_agree, assert_right, every_k, exact, mapped
from builders.ffns import FFN, inputs
from torch import Tensor

from tardis_fx import Plan
from tardis_fx.runtime import ops  # noqa: F401 - registers the op
from tardis_fx.runtime.correction import Correction

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def on_gpu(original: FFN) -> FFN:
    return copy.deepcopy(original).cuda()


def compiled(model: FFN, plan: Plan, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="tardis", fullgraph=True, options=options | {"plan": plan})


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_compiled_step_gives_what_the_reference_gives(
    on_gpu: FFN, plan: Plan, mode: str | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(on_gpu, plan, mode=mode)
    monkeypatch.setattr("tardis_fx.runtime.cuda.dispatch.available", lambda: False)
    slow = compiled(copy.deepcopy(on_gpu), plan, inner="eager")
    for seed in range(4):  # warm up, record, replay
        x = inputs(tokens, 16, seed=seed).cuda()
        torch.testing.assert_close(fast(x).clone(), slow(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_step_of_a_compiled_graph_holds_the_kernels_and_no_opaque_op(on_gpu: FFN, plan: Plan) -> None:
    from torch._inductor.utils import run_and_get_code

    x = inputs(1, 16).cuda()
    _, (code, *_) = run_and_get_code(compiled(on_gpu, plan), x)
    assert "tardis.correct" not in code
    for kernel in ("predict", "activate", "accumulate"):
        assert kernel in code


def on_device(**changed: Any) -> tuple[Correction, Tensor]:
    op = arguments(**changed)
    return mapped(Tensor.cuda, op), exact(op)


@every_k
@pytest.mark.parametrize("quantised", [{}, {"fold_bits": 4, "row_bits": 3}], ids=str)
def test_the_op_waits_for_nothing_and_replays_on_other_inputs(quantised: dict[str, int], k: int) -> None:
    op, _ = on_device(k=k, shape=(2,), **quantised)
    other, expected = on_device(k=k, shape=(2,), seed=1, **quantised)
    torch.ops.tardis.correct(*op)  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.ops.tardis.correct(*op)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, value in zip(op.tensors, other.tensors, strict=True):
        tensor.copy_(value)
    graph.replay()
    assert_right(out.cpu(), other, expected, coded=2e-3)


@every_k
def test_many_tokens_are_the_references(k: int) -> None:
    op, expected = on_device(k=k, shape=(17,))
    assert_agree(torch.ops.tardis.correct(*op).cpu(), expected, atol=1e-2)
