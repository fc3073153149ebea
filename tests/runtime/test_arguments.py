"""The ops refuse what they do not take: real, by the reference, and traced; and the kernel by itself."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
from builders import correction, gated_correction
from builders.correction import Arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tardis_fx.errors import PlanMismatchError
from tardis_fx.runtime import ops
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import gated as cpu_gated
from tardis_fx.runtime.cpu import op as cpu

if TYPE_CHECKING:
    from collections.abc import Callable

MAKE = {"plain": correction.arguments, "gated": gated_correction.arguments}
KINDS = [(kind, bits) for kind in MAKE for bits in (16, 4)]
every_kind = pytest.mark.parametrize(("kind", "coded"), KINDS, ids=str)


def arguments(kind: str, bits: int = 16, **options: object) -> Arguments:
    sizes = {"shape": (3,), "d": 200, "d_out": 130, "h": 30}
    return MAKE[kind](**{**sizes, "fold": True, "fold_bits": bits, "row_bits": bits} | options)  # type: ignore[arg-type]


def call(kind: str, op: Arguments) -> Tensor:
    target = torch.ops.tardis.correct if kind == "plain" else torch.ops.tardis.correct_gated
    result: Tensor = target(*op.values())
    return result


def traced(kind: str, op: Arguments) -> Tensor:
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in op.items()}
        return call(kind, fake)  # type: ignore[arg-type]


def without_kernel(kind: str, op: Arguments) -> Tensor:
    with mock.patch.object(cpu_build, "load", return_value=None):
        return call(kind, op)


def through_another_device(kind: str, op: Arguments) -> Tensor:
    """By the implementation for any device."""
    if kind == "plain":
        return ops._checked(ops.reference.correct, ops.check, 18)(*op.values())
    return ops._checked(ops.reference_gated.correct, ops.check_gated, 17)(*op.values())


EVERYWHERE = [call, traced, without_kernel, through_another_device]
everywhere = pytest.mark.parametrize("run", EVERYWHERE)


def misfits(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that are not what this one is."""
    changed = {
        "another dtype": tensor.to(torch.int16 if tensor.dtype != torch.int16 else torch.int32),
        "an axis more": tensor[None],
        "no axis": tensor.new_zeros(()),
        "a row more": torch.cat([tensor, tensor[:1]]),
        "a row less": tensor[:-1],
        "no rows": tensor[:0],
    }
    if tensor.dtype == torch.uint8:
        changed["signed"] = tensor.view(torch.int8)
    if tensor.dtype in (torch.float32, torch.float16):
        changed["double"] = tensor.double()
        changed["bfloat16"] = tensor.bfloat16()
    if tensor.ndim > 1:
        few = 1 if tensor.shape[-1] < 100 else 100  # of x, a column more could have been all along
        changed |= {"more columns": torch.cat([tensor, tensor[..., :few]], -1), "fewer columns": tensor[..., :-few]}
    return changed


#: What the model's dtype decides.
WHOLE = {"folded", "x", "w1", "b1", "w2t", "gate", "up", "fold"}


@everywhere
@every_kind
def test_a_tensor_that_does_not_fit_is_refused(run: Callable[[str, Arguments], Tensor], kind: str, coded: int) -> None:
    op = arguments(kind, coded)
    run(kind, op)
    passed = []
    for name, value in op.items():
        for how, other in misfits(value).items() if isinstance(value, Tensor) else ():
            right = name in WHOLE and how in ("double", "bfloat16")  # the reference takes several dtypes
            if right or (name == "x" and how in ("an axis more", "a row more", "a row less", "no rows")):
                continue  # other tokens
            try:
                run(kind, {**op, name: other})
                passed.append((name, how))
            except PlanMismatchError:
                pass
    assert not passed


@everywhere
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    "changed",
    [{"bits": b} for b in (-1, 0, 9, 16, 2**40)]
    + [{"fold_bits": b} for b in (-1, 0, 9, 15, 17)]
    + [{"row_bits": b} for b in (-1, 0, 9, 15, 17)]
    + [{"activation": "sine"}, {"activation": ""}],
    ids=str,
)
def test_a_number_in_no_table_is_refused(
    run: Callable[[str, Arguments], Tensor], kind: str, changed: dict[str, int | str]
) -> None:
    for coded in (16, 4):
        with pytest.raises(PlanMismatchError):
            run(kind, {**arguments(kind, coded), **changed})


@pytest.mark.parametrize("run", [call, without_kernel, through_another_device])
@every_kind
def test_a_list_that_points_outside_is_refused(run: Callable[[str, Arguments], Tensor], kind: str, coded: int) -> None:
    op = arguments(kind, coded, outliers=1)
    capacity = len(op["neurons"])  # type: ignore[arg-type]
    for counts in ((capacity + 1, 0), (capacity + 1, capacity + 1), (3, 4), (-1, 0), (-2, -1), (4, -1), (2**40, 2**40)):
        with pytest.raises(PlanMismatchError, match="lists"):
            run(kind, {**op, "counts": torch.tensor(counts)})
    if coded != 16:
        with pytest.raises(PlanMismatchError, match="no predictor"):
            run(kind, {**op, "counts": torch.tensor((4, 3))})
    listed = int(op["counts"][0])  # type: ignore[index]
    for position in (0, listed // 2, listed - 1):
        for neuron in (30, 31, 2**30, 2**31 - 1, -1, -(2**31)):
            neurons = op["neurons"].clone()  # type: ignore[union-attr]
            neurons[position] = neuron
            with pytest.raises(PlanMismatchError, match=f"neuron {neuron} of an FFN that has 30"):
                run(kind, {**op, "neurons": neurons})


@every_kind
def test_tensors_on_several_devices_are_refused(kind: str, coded: int) -> None:
    op = arguments(kind, coded)
    for name, value in op.items():
        if isinstance(value, Tensor) and name != "x":
            with pytest.raises(PlanMismatchError, match="meta"):
                through_another_device(kind, {**op, name: value.to("meta")})


#: Numbers of a call behind its pointers, in the kernel's order, and what it must not be told of each.
NUMBERS = {
    "tokens": (-1, 0, 17, 2**40), "d": (-1, 0, 64, 1000), "d_out": (-1,), "hidden": (-1, 0, 1), "capacity": (0, 3),
    "d_groups": (-1, 0, 3, 100), "d_out_groups": (-1, 0, 4, 100), "w1_stride": (), "w2t_stride": (),
    "bits": (-1, 0, 9, 2**40), "activation": (-1, 1000), "fold_bits": (-1, 0, 9, 17), "row_bits": (-1, 0, 9, 17),
    "low_bits": (-1, 0, 9), "dtype": (-1, 3), "threads": (-1, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", NUMBERS)
def test_the_kernel_refuses_by_itself_what_its_entry_lets_pass(kind: str, name: str) -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")
    module = cpu if kind == "plain" else cpu_gated
    at = 16 + list(NUMBERS).index(name)
    for value in NUMBERS[name]:
        layout: struct.Struct = module._CALL

        def pack(*numbers: int, value: int = value, layout: struct.Struct = layout) -> bytes:
            return layout.pack(*numbers[:at], value, *numbers[at + 1 :])

        op = arguments(kind, 4, outliers=1)
        with mock.patch.object(module, "_CALL", mock.Mock(pack=pack)), pytest.raises(AssertionError, match="kernel"):
            call(kind, op)


@pytest.mark.parametrize("bits", [0, 9])
def test_codes_that_do_not_fit_are_refused(bits: int) -> None:
    op = arguments("plain")
    codes = [op["codes"], op["scale"], op["zero"]]
    torch.ops.tardis.dequantise(*codes, 2, 200, torch.float32)
    for at in range(3):
        for other in misfits(codes[at]).values():  # type: ignore[arg-type]
            with pytest.raises(PlanMismatchError):
                torch.ops.tardis.dequantise(*codes[:at], other, *codes[at + 1 :], 2, 200, torch.float32)
    for numbers in ((bits, 200, torch.float32), (2, 100, torch.float32), (2, -1, torch.float32), (2, 200, torch.int8)):
        with pytest.raises(PlanMismatchError):
            torch.ops.tardis.dequantise(*codes, *numbers)
