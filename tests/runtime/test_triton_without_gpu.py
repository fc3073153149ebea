"""What can be said of the Triton kernels without a GPU: right in the interpreter, compiled for one, traced for one."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.correction import arguments, every_k, mapped
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import ops, reference  # noqa: F401 - ops registers the op
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.cuda import dispatch as cuda
from tardis_fx.runtime.cuda.dispatch import show_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
with_triton = pytest.mark.usefixtures("h100")


def test_the_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    suite = Path(__file__).with_name("test_triton.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=suite.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for an H100, whether or not there is one."""
    triton = pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def traced(op: Correction) -> fx.GraphModule:
    """The graph that Inductor gets of the op, on a device that need not exist."""
    assert cuda.available()
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def on_cuda(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    with mode:
        leaves, spec = tree_flatten(mapped(on_cuda, op))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(*tensors: Tensor) -> tuple[Tensor]:
            replaced = dict(zip(at, tensors, strict=True))
            fields = tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            return (torch.ops.tardis.correct_triton(*fields),)

        graph = aot_export_joint_simple(call, tuple(leaves[i] for i in at), trace_joint=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


@with_triton
@every_k
@pytest.mark.parametrize(("quantised", "kernels"), [({}, 3), ({"fold_bits": 4, "row_bits": 3}, 4)], ids=str)
def test_inductor_sees_the_kernels_and_that_they_write_to_scratch_alone(
    quantised: dict[str, Any], kernels: int, k: int, caplog: pytest.LogCaptureFixture
) -> None:
    graph = traced(arguments(k=k, shape=(3,), d=128, d_out=70, h=60, **quantised)).graph
    seen = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(seen) == kernels
    for node in seen:
        written = [node.kwargs["kwargs"][name] for name in node.kwargs["tensors_to_clone"]]
        assert all(argument.target == torch.ops.aten.empty.memory_format for argument in written)
    assert not [node for node in graph.nodes if "tardis" in str(node.target)]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@with_triton
def test_many_tokens_stay_one_opaque_op() -> None:
    targets = [str(node.target) for node in traced(arguments(shape=(17,))).graph.nodes]
    assert "tardis.correct.default" in targets
    assert not [target for target in targets if "triton_kernel_wrapper" in target]


@with_triton
@every_k
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_kernels_compile_for_a_gpu(tokens: int, k: int) -> None:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    from tardis_fx.runtime.cuda.correction import accumulate, activate
    from tardis_fx.runtime.cuda.predictor import multiply, predict

    sizes = {
        "K": k,
        "D": 128,
        "D_OUT": 128,
        "TOKENS": tokens,
        "GROUP": 128,
        "SEGMENT": 32,
        "SEGMENTS": 4,
        "BIASED": True,
        "KEPT": True,
        "ACTIVATION": "gelu",
    }
    types = {"x": "*bf16", "counts": "*i64", "codes": "*u8", "scale": "*fp16", "zero": "*u8"}
    types["weight"] = "*u8"
    types |= dict.fromkeys(["biases", "guard", "surrogate", "residuals", "partial", "out", "estimates"], "*fp32")
    types |= dict.fromkeys(["tokens", "first_stride", "second_stride", "capacity", "segments", "stride"], "i32")
    cases = [(predict, 3), (activate, 16), (activate, 2), (accumulate, 16), (accumulate, 4), (multiply, 4)]
    for tuned, bits in cases:
        types |= dict.fromkeys(["first_projection", "second_projection", "weights"], "*bf16" if bits == 16 else "*u8")
        names = tuned.fn.arg_names
        values = {"ROWS": 32, **sizes, "BITS": bits} | tuned.configs[0].kwargs
        constants = {(i,): values[name] for i, name in enumerate(names) if name.isupper()}
        signature = {name: "constexpr" if name.isupper() else types.get(name, "*i32") for name in names}
        if tokens == 1:  # Triton makes a constant of a number that is 1
            constants[names.index("tokens"),], signature["tokens"] = 1, "constexpr"
        built = compiler.compile(compiler.ASTSource(tuned.fn, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"], tuned.fn.__name__


@with_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_formula_compiles_for_a_gpu(activation: str) -> None:
    from builders.elementwise import elementwise
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    from tardis_fx.runtime.cuda import activations as triton_activations

    signature = {"z": "*fp32", "out": "*fp32", "count": "i32"} | dict.fromkeys(
        ("FUNCTION", "NAME", "SIZE"), "constexpr"
    )
    constants = {(3,): triton_activations.activation, (4,): activation, (5,): 128}
    built = compiler.compile(compiler.ASTSource(elementwise, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"]


@with_triton
def test_inductor_writes_every_formula_beside_the_kernel() -> None:
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure

    from tardis_fx.runtime.cuda.correction import activate

    functions = {node.name: node for node in ast.parse(closure(activate.fn)).body if isinstance(node, ast.FunctionDef)}
    assert {"activate", "activation", "tanh"} <= set(functions)
    written = ast.unparse(functions["activation"])
    assert all(ast.unparse(ast.parse(activation.triton)) in written for activation in ACTIVATIONS.values())


@with_triton
def test_a_graph_for_inductor_calls_the_triton_op_in_the_place_of_the_op() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.tardis.correct, tuple(graph.placeholder(f"a{i}") for i in range(14))))
    gm = fx.GraphModule({}, graph)
    show_kernels(gm)
    assert [n.target for n in gm.graph.find_nodes(op="call_function", target=torch.ops.tardis.correct)] == []
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.tardis.correct_triton.default)) == 1


@every_k
def test_without_triton_the_reference_runs_after_one_warning(
    k: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tardis_fx.runtime.cuda.op", None)
    cuda.available.cache_clear()
    op = arguments(k=k)
    with caplog.at_level(logging.WARNING, logger="tardis_fx"):
        for _ in range(2):
            assert torch.equal(cuda.correct(op), reference.correct(op))
    cuda.available.cache_clear()
    (record,) = caplog.records
    assert "eager implementation" in record.getMessage()


@every_k
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"shape": (MOST_TOKENS + 1,)}, id="many tokens"),
        pytest.param({"shape": (2, 0)}, id="no tokens"),
        pytest.param({"dtype": torch.float64}, id="float64"),
        pytest.param({"dtype": torch.float16}, id="mixed dtypes"),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_the_reference(
    changed: dict[str, Any], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = arguments(k=k, **changed)
    if op.x.dtype == torch.float16:
        op.projections[-1] = op.projections[-1].float()
    monkeypatch.setattr(cuda, "available", lambda: pytest.fail("the kernels were asked for"))
    assert torch.equal(cuda.correct(op), reference.correct(op))


def test_the_op_is_registered_for_both_devices() -> None:
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("tardis::correct", device)
