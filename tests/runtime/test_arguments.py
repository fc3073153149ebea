"""The ops refuse what they do not take: real, by the reference, and traced; and the kernel by itself."""

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from builders import correction
from builders.correction import every_k, mapped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tardis_fx.errors import PlanMismatchError
from tardis_fx.runtime import ops
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.rotation import random_signs
from tardis_fx.runtime.tables import row_bytes

every_kind = pytest.mark.parametrize(("k", "coded"), [(k, bits) for k in (1, 2) for bits in (16, 4)], ids=str)


def arguments(k: int, bits: int = 16, **options: Any) -> Correction:
    sizes: dict[str, Any] = {"shape": (3,), "d": 200, "d_out": 130, "h": 30, "fold": True}
    return correction.arguments(k=k, **{**sizes, "fold_bits": bits, "row_bits": bits} | options)


def call(op: Correction) -> Tensor:
    result: Tensor = torch.ops.tardis.correct(*op)
    return result


def traced(op: Correction) -> Tensor:
    with FakeTensorMode() as mode:
        return call(mapped(mode.from_tensor, op))


def without_kernel(op: Correction) -> Tensor:
    with mock.patch.object(cpu_build, "load", return_value=None):
        return call(op)


EVERYWHERE = [call, traced, without_kernel, ops._correct]
everywhere = pytest.mark.parametrize("run", EVERYWHERE)


def replaced(op: Correction, name: str, other: Tensor) -> Correction:
    """A call with another tensor in the place of one."""
    fields: dict[str, Any] = {name: other}
    return op._replace(**fields)


def tensors(op: Correction) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Correction]]]:
    """Names of all tensors of a call, and the call with another one in their place."""
    for name, value in op._asdict().items():
        if isinstance(value, Tensor):
            yield name, value, partial(replaced, op, name)
    for i, projection in enumerate(op.projections):

        def changed(other: Tensor, i: int = i) -> Correction:
            return op._replace(projections=[*op.projections[:i], other, *op.projections[i + 1 :]])

        yield "projections", projection, changed


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
WHOLE = {"folded", "x", "projections", "columns", "fold"}


@everywhere
@every_kind
def test_a_tensor_that_does_not_fit_is_refused(run: Callable[[Correction], Tensor], k: int, coded: int) -> None:
    op = arguments(k, coded)
    run(op)
    passed = []
    for name, value, changed in tensors(op):
        for how, other in misfits(value).items():
            right = name in WHOLE and how in ("double", "bfloat16")  # the reference takes several dtypes
            if right or (name == "x" and how in ("an axis more", "a row more", "a row less", "no rows")):
                continue  # other tokens
            try:
                run(changed(other))
                passed.append((name, how))
            except PlanMismatchError:
                pass
    assert not passed


@everywhere
@every_kind
def test_another_number_of_projections_is_refused(run: Callable[[Correction], Tensor], k: int, coded: int) -> None:
    op = arguments(k, coded)
    for count in {0, 1, 2, 3} - {k}:
        with pytest.raises(PlanMismatchError):
            run(op._replace(projections=op.projections[:1] * count))


@everywhere
@every_k
@pytest.mark.parametrize(
    "changed",
    [{"bits": b} for b in (-1, 0, 9, 16, 2**40)]
    + [{"fold_bits": b} for b in (-1, 0, 9, 15, 17)]
    + [{"row_bits": b} for b in (-1, 0, 9, 15, 17)]
    + [{"activation": "sine"}, {"activation": ""}],
    ids=str,
)
def test_a_number_in_no_table_is_refused(run: Callable[[Correction], Tensor], k: int, changed: dict[str, Any]) -> None:
    for coded in (16, 4):
        with pytest.raises(PlanMismatchError):
            run(arguments(k, coded)._replace(**changed))


@pytest.mark.parametrize("run", [call, without_kernel, ops._correct])
@every_kind
def test_a_list_that_points_outside_is_refused(run: Callable[[Correction], Tensor], k: int, coded: int) -> None:
    op = arguments(k, coded, outliers=1)
    capacity = len(op.neurons)
    for counts in ((capacity + 1, 0), (capacity + 1, capacity + 1), (3, 4), (-1, 0), (-2, -1), (4, -1), (2**40, 2**40)):
        with pytest.raises(PlanMismatchError, match="lists"):
            run(op._replace(counts=torch.tensor(counts)))
    if coded != 16:
        with pytest.raises(PlanMismatchError, match="no predictor"):
            run(op._replace(counts=torch.tensor((4, 3))))
    listed = int(op.counts[0])
    for position in (0, listed // 2, listed - 1):
        for neuron in (30, 31, 2**30, 2**31 - 1, -1, -(2**31)):
            neurons = op.neurons.clone()
            neurons[position] = neuron
            with pytest.raises(PlanMismatchError, match=f"neuron {neuron} of an FFN that has 30"):
                run(op._replace(neurons=neurons))


@every_kind
def test_tensors_on_several_devices_are_refused(k: int, coded: int) -> None:
    for name, value, changed in tensors(arguments(k, coded)):
        if name != "x":
            with pytest.raises(PlanMismatchError, match="meta"):
                ops._correct(changed(value.to("meta")))


#: Numbers of a call behind its pointers, in the kernel's order, and what it must not be told of each.
NUMBERS = {
    "k": (-1, 0, 3, 2**40), "tokens": (-1, 0, 17, 2**40), "d": (-1, 0, 64, 1000), "d_out": (-1,), "hidden": (-1, 0, 1), "capacity": (0, 3),
    "d_groups": (-1, 0, 3, 100), "d_out_groups": (-1, 0, 4, 100), "first_stride": (), "second_stride": (), "column_stride": (),
    "bits": (-1, 0, 9, 2**40), "activation": (-1, 1000), "fold_bits": (-1, 0, 9, 17), "row_bits": (-1, 0, 9, 17),
    "low_bits": (-1, 0, 9), "dtype": (-1, 3), "threads": (-1, 0),
}  # fmt: skip


@every_k
@pytest.mark.parametrize("name", NUMBERS)
def test_the_kernel_refuses_by_itself_what_its_entry_lets_pass(k: int, name: str) -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")
    at = 15 + list(NUMBERS).index(name)
    for value in NUMBERS[name]:
        layout: struct.Struct = cpu._CALL

        def pack(*numbers: int, value: int = value, layout: struct.Struct = layout) -> bytes:
            return layout.pack(*numbers[:at], value, *numbers[at + 1 :])

        op = arguments(k, 4, outliers=1)
        with mock.patch.object(cpu, "_CALL", mock.Mock(pack=pack)), pytest.raises(AssertionError, match="kernel"):
            call(op)


def test_rows_of_codes_that_do_not_fit_are_refused() -> None:
    rows, numbers = torch.zeros(24, row_bytes(200, 3), dtype=torch.uint8), (3, 200, torch.float32)
    torch.ops.tardis.dequantise_rows(rows, *numbers)
    for name, other in misfits(rows).items():
        if "row" not in name:  # there may be any number of rows
            with pytest.raises(PlanMismatchError):
                torch.ops.tardis.dequantise_rows(other, *numbers)
    for wrong in ((0, 200, torch.float32), (9, 200, torch.float32), (3, 100, torch.float32), (3, 200, torch.int8)):
        with pytest.raises(PlanMismatchError):
            torch.ops.tardis.dequantise_rows(rows, *wrong)


def test_signs_that_do_not_fit_are_refused() -> None:
    x, signs = torch.zeros(3, 200), random_signs(200, 0)
    torch.ops.tardis.rotate(x, signs, False)
    for arguments in (*((x, other) for other in misfits(signs).values()), (x.int(), signs), (x[:, :1], signs)):
        with pytest.raises(PlanMismatchError):
            torch.ops.tardis.rotate(*arguments, False)


@pytest.mark.parametrize("bits", [0, 9])
def test_codes_that_do_not_fit_are_refused(bits: int) -> None:
    op = arguments(1)
    codes = [tensor[:, 0] for tensor in (op.codes, op.scale, op.zero)]
    torch.ops.tardis.dequantise(*codes, 2, 200, torch.float32)
    for at in range(3):
        for other in misfits(codes[at]).values():
            with pytest.raises(PlanMismatchError):
                torch.ops.tardis.dequantise(*codes[:at], other, *codes[at + 1 :], 2, 200, torch.float32)
    for numbers in ((bits, 200, torch.float32), (2, 100, torch.float32), (2, -1, torch.float32), (2, 200, torch.int8)):
        with pytest.raises(PlanMismatchError):
            torch.ops.tardis.dequantise(*codes, *numbers)
