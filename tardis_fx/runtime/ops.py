"""The ``torch.library`` ops that rewritten graphs call: opaque to Dynamo and Inductor, with fake implementations.

Every implementation, including the fake ones, checks its arguments (:mod:`tardis_fx.runtime.arguments`), so that
invalid arguments fail during tracing.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.runtime import coded_linear, coded_reference, reference, rotation, tables
from tardis_fx.runtime.arguments import check, check_codes, check_devices, check_lists, check_rows, check_signs
from tardis_fx.runtime.correction import SIGNATURE, Correction
from tardis_fx.runtime.cpu import coded_layout
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.cuda import dispatch as cuda
from tardis_fx.runtime.touched import count, counted, counted_by

# Kept for the life of the process, because deleting it removes its ops. Library.impl dispatches faster than custom_op.
_LIBRARY = torch.library.Library("tardis", "DEF")


def _define(
    name: str, signature: Signature, fake: Callable[..., Tensor], implementations: dict[str, Callable[..., Tensor]]
) -> None:
    """Defines an op with a signature; the CPU's implementation may be added later."""
    schema: Callable[..., Tensor] = wraps(fake)(lambda *fields: fake(*fields))
    schema.__signature__ = signature  # type: ignore[attr-defined]
    _LIBRARY.define(
        name + torch.library.infer_schema(schema, mutates_args=()).replace("SymInt", "int"),
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    for device, implementation in implementations.items():
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"tardis::{name}", fake, lib=_LIBRARY)


def _spread(implementation: Callable[[Correction], Tensor]) -> Callable[..., Tensor]:
    """A function of the fields of a call, as PyTorch passes them."""

    def run(*fields: Any) -> Tensor:
        return implementation(Correction(*fields))

    return run


def _correct(call: Correction) -> Tensor:
    """The op on a device without kernels."""
    check(call)
    check_devices(call)
    check_lists(call)
    return reference.correct(call)


def _correct_fake(call: Correction) -> Tensor:
    check(call)
    check_devices(call)
    return call.folded.new_empty((*call.x.shape[:-1], call.folded.shape[-1]))


def _coded_ffn(x: Tensor, site: Tensor, d_out: int) -> Tensor:
    """The op without a kernel."""
    call = coded_layout.restore(x, site)
    output, parts = coded_reference.evaluate(call)
    count(call, parts, site.data_ptr())
    return output


def _coded_linear(x: Tensor, layer: Tensor, d_out: int) -> Tensor:
    """The op without a kernel."""
    call = coded_layout.restore_linear(x, layer)
    count(call, None, layer.data_ptr())
    return coded_linear.coded_linear(call)


def _coded_fake(x: Tensor, prepared: Tensor, d_out: int) -> Tensor:
    if x.ndim < 1 or not x.dtype.is_floating_point or prepared.ndim != 1 or prepared.dtype is not torch.uint8:
        raise PlanMismatchError(
            f"an op of tardis takes tokens and a prepared site, not {x.dtype} of shape {tuple(x.shape)} and"
            f" {prepared.dtype} of shape {tuple(prepared.shape)}"
        )
    if x.device != prepared.device:
        raise PlanMismatchError(
            f"a prepared site is on {prepared.device}, but its input is on {x.device}: move the whole model to one"
            " device, and compile it again"
        )
    return x.new_empty((*x.shape[:-1], d_out))


@contextmanager
def _coded_counted() -> Iterator[None]:
    """Replaces the kernels of ops in codes by the references, which know what they read."""
    library = torch.library.Library("tardis", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the first replacement
        library.impl("coded_ffn", _coded_ffn, "CPU", allow_override=True)
        library.impl("coded_linear", _coded_linear, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _dequantise(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return reference.dequantise(codes, scale, zero, bits, columns, dtype)


def _dequantise_fake(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


_define(
    "correct", SIGNATURE, _spread(_correct_fake),
    {
        "CompositeExplicitAutograd": _spread(counted(_correct)),
        "CPU": _spread(counted(cpu.correct)),
        "CUDA": _spread(counted(cuda.correct)),
    },
)  # fmt: skip
# On a CPU, `build.load` adds the kernels, which run without Python.
_define("coded_ffn", signature(_coded_ffn), _coded_fake, {"CompositeExplicitAutograd": _coded_ffn})
_define("coded_linear", signature(_coded_linear), _coded_fake, {"CompositeExplicitAutograd": _coded_linear})
counted_by(_coded_counted)
_LIBRARY.define(
    "dequantise(Tensor codes, Tensor scale, Tensor zero, int bits, int columns, ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("dequantise", _dequantise, "CompositeExplicitAutograd")
torch.library.register_fake("tardis::dequantise", _dequantise_fake, lib=_LIBRARY)

_LIBRARY.define("dequantise_rows(Tensor rows, int bits, int columns, ScalarType dtype) -> Tensor")


def _dequantise_rows(rows: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_rows(rows, bits, columns, dtype)
    return tables.weights(rows, bits, columns, dtype)


def _dequantise_rows_fake(rows: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_rows(rows, bits, columns, dtype)
    return rows.new_empty((rows.shape[0], columns), dtype=dtype)


_LIBRARY.impl("dequantise_rows", _dequantise_rows, "CompositeExplicitAutograd")
torch.library.register_fake("tardis::dequantise_rows", _dequantise_rows_fake, lib=_LIBRARY)


_LIBRARY.define("rotate(Tensor x, Tensor signs, bool back) -> Tensor")


def _rotate(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    """Rotates vectors, or back; in float32 for half precision."""
    check_signs(x, signs)
    turn = rotation.rotate_back if back else rotation.rotate
    return turn(x.to(reference.compute_dtype(x.dtype)), signs).to(x.dtype).contiguous()


def _rotate_fake(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    check_signs(x, signs)
    return x.new_empty(x.shape)


def _keep_signs(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.back = inputs[2]


def _rotate_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """A rotation is orthogonal: its inverse is its transpose."""
    return torch.ops.tardis.rotate(gradient, *ctx.saved_tensors, not ctx.back), None, None


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("tardis::rotate", _rotate_fake, lib=_LIBRARY)
torch.library.register_autograd("tardis::rotate", _rotate_gradient, setup_context=_keep_signs, lib=_LIBRARY)
