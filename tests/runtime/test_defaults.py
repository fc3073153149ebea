"""What a process has as default dtype and device changes nothing."""

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import batches, config, ffn
from builders.gated import Gated
from torch import Tensor, nn

import tardis_fx
from tardis_fx import Plan, calibrate, passes

#: The passes lie elsewhere in a checkout.
FOLDERS = [Path(module.__file__).parent for module in (tardis_fx, passes) if module.__file__]
#: Functions that take the dtype of an array or a tensor.
FROM_DATA = ("as_tensor", "asarray")
#: Functions of torch that ask for defaults where they are not told.
FACTORIES = {
    *FROM_DATA, "arange", "bartlett_window", "empty", "empty_strided", "eye", "full", "hann_window", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def test_no_tensor_is_made_without_a_dtype_and_a_device() -> None:
    calls = {
        f"{path}:{node.lineno}": {keyword.arg for keyword in node.keywords}
        | ({"dtype"} if node.func.attr in FROM_DATA else set())
        for folder in FOLDERS
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
    }
    assert len(calls) > 30
    assert not [where for where, keywords in calls.items() if not {"dtype", "device"} <= keywords]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[None] | torch.device]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}
METHODS = [
    "guarded_fold", "partial_linear", "paper", "magnitude", "wanda_2_4", "ria", "sparsegpt", "rtn", "gptq", "gptq_rotated", "low_rank", "ffsplit",
    "hot_fold", "linear_replace", "drop_ffn", "bilinear", "drop_bias", "int8_ffn", "int4_ffn", "exact_fold",
    "magnitude+int8_ffn",
]  # fmt: skip
GATED = ["guarded_fold", "partial_linear", "wanda", "gptq", "gptq_rotated", "low_rank", "int8_ffn", "drop_ffn"]


def fit(model: nn.Module, method: str, data: list[Tensor]) -> tuple[Plan, Tensor]:
    """A plan by a method, and what the compiled model gives of a few tokens."""
    torch._dynamo.reset()
    widths = {"fold_bits": None, "row_bits": None} if method == "guarded_fold" else {}
    chosen = config(method=method, budget=0.98 if method == "drop_bias" else 0.7, **widths)
    plan = calibrate(model, data, config=chosen)
    with torch.no_grad():
        return plan, compiled(model, plan)(data[0][:4])


@pytest.mark.parametrize(("kind", "method"), [("plain", m) for m in METHODS] + [("gated", m) for m in GATED])
def test_plans_and_results_do_not_depend_on_defaults(kind: str, method: str) -> None:
    model = (ffn() if kind == "plain" else Gated()).requires_grad_(False)
    data = batches(2)
    plan, expected = fit(model, method, data)
    for name, default in DEFAULTS.items():
        with default():
            other, out = fit(model, method, data)
        assert torch.equal(out, expected), name
        for before, after in zip(plan.rewritten, other.rewritten, strict=True):
            assert before.tensors.keys() == after.tensors.keys()
            for key, tensor in before.tensors.items():
                assert tensor.dtype == after.tensors[key].dtype, (name, key)
                torch.testing.assert_close(after.tensors[key], tensor, rtol=0, atol=0, equal_nan=True)
