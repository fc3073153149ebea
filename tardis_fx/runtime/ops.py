"""The ``torch.library`` ops that rewritten graphs call: opaque to Dynamo and Inductor, with fake implementations.

Every implementation, including the fake ones, checks its arguments (:mod:`tardis_fx.runtime.arguments`), so that
invalid arguments fail during tracing.
"""

from collections.abc import Callable
from inspect import Signature
from typing import Any

import torch
from torch import Tensor

from tardis_fx.runtime import coded_arguments, coded_linear, coded_reference, reference, rotation, tables
from tardis_fx.runtime.arguments import check, check_codes, check_devices, check_lists, check_rows, check_signs
from tardis_fx.runtime.coded import SIGNATURE as CODED_SIGNATURE
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.correction import SIGNATURE, Correction
from tardis_fx.runtime.cpu import coded_op as cpu_coded
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.cuda import dispatch as cuda
from tardis_fx.runtime.touched import Call, counted

# Kept for the life of the process, because deleting it removes its ops. Library.impl dispatches faster than custom_op.
_LIBRARY = torch.library.Library("tardis", "DEF")


def _define(
    name: str,
    kind: type[Call],
    signature: Signature,
    fake: Callable[[Call], Tensor],
    implementations: dict[str, Callable[[Call], Tensor]],
) -> None:
    """Defines an op that takes the fields of a call as separate arguments, as PyTorch passes them."""

    def spread(implementation: Callable[[Call], Tensor]) -> Callable[..., Tensor]:
        def run(*fields: Any) -> Tensor:
            return implementation(kind(*fields))

        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    _LIBRARY.define(
        name + torch.library.infer_schema(spread(fake), mutates_args=()).replace("SymInt", "int"),
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    for device, implementation in implementations.items():
        _LIBRARY.impl(name, spread(counted(implementation)), device)
    torch.library.register_fake(f"tardis::{name}", spread(fake), lib=_LIBRARY)


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


def _coded_ffn(call: CodedFFN) -> Tensor:
    """The op on a device without kernels."""
    coded_arguments.check(call)
    coded_arguments.check_listed(call)
    return coded_reference.coded_ffn(call)


def _coded_ffn_fake(call: CodedFFN) -> Tensor:
    coded_arguments.check(call)
    return call.x.new_empty((*call.x.shape[:-1], call.bias.shape[0]))


def _coded_linear(call: CodedLinear) -> Tensor:
    """The op on a device without a kernel: today on all of them."""
    coded_linear.check(call)
    return coded_linear.coded_linear(call)


def _coded_linear_fake(call: CodedLinear) -> Tensor:
    coded_linear.check(call)
    return call.x.new_empty((*call.x.shape[:-1], call.rows.shape[0]))


def _dequantise(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return reference.dequantise(codes, scale, zero, bits, columns, dtype)


def _dequantise_fake(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


_define(
    "correct", Correction, SIGNATURE, _correct_fake,
    {"CompositeExplicitAutograd": _correct, "CPU": cpu.correct, "CUDA": cuda.correct},
)  # fmt: skip
_define(
    "coded_ffn", CodedFFN, CODED_SIGNATURE, _coded_ffn_fake,
    {"CompositeExplicitAutograd": _coded_ffn, "CPU": cpu_coded.coded_ffn},
)  # fmt: skip
_define(
    "coded_linear", CodedLinear, coded_linear.SIGNATURE, _coded_linear_fake,
    {"CompositeExplicitAutograd": _coded_linear},
)  # fmt: skip
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
