"""FFNs of drawn programs, one node at a time: between any two, other steps of the program may stand."""

import operator
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from fuzz.cases import Choices
from fuzz.scene import Scene
from tardis_fx.testing.building import Graph
from tardis_fx.testing.spellings import SPELLINGS

_Activation = tuple["Callable[[Graph, fx.Node], fx.Node]", ...]

#: By what is drawn: the registry's, each with its spellings, and functions that resemble them.
_ACTIVATIONS: tuple[_Activation, ...] = (
    *(tuple(SPELLINGS[name]) for name in ("relu", "gelu", "silu", "gelu_tanh", "relu2", "gelu_quick", "gelu", "silu")),
    *(tuple(SPELLINGS[name]) for name in ("gelu", "silu", "relu", "gelu", "silu", "relu", "gelu_tanh")),
    (lambda g, z: g.call(F.mish, z), lambda g, z: g.call(torch.tanh, z), lambda g, z: g.call(F.leaky_relu, z)),
    (lambda g, z: g.call(F.relu, z, inplace=True), lambda g, z: g.call(F.silu, z, inplace=True)),
    (lambda g, z: g.call("relu_", z), lambda g, z: g.call("sigmoid_", z), lambda g, z: g.call("clamp_", z, min=0)),
    (
        lambda g, z: g.call(F.hardswish, z),
        lambda g, z: g.call(F.softplus, z),
        lambda g, z: g.call(F.celu, z, 0.5),
        lambda g, z: g.call(F.relu6, z),
        lambda g, z: g.call(F.logsigmoid, z),
        lambda g, z: g.call(torch.clamp, g.call(F.relu, z), max=1.5),
        lambda g, z: g.call(operator.mul, g.call(F.gelu, z), 1.25),
        lambda g, z: g.call(operator.add, g.call(F.silu, z), 0.25),
        lambda g, z: g.call(F.leaky_relu, z, 0.3),
        lambda g, z: g.call(operator.mul, z, 0.5),
    ),
)


def _cast(other: torch.dtype) -> Callable[[Scene, fx.Node], fx.Node]:
    return lambda s, h: s.call("to", s.call("to", h, other), s.dtype_of(h))


#: What may stand between a projection and the activation, or behind the activation.
_BETWEEN: tuple[Callable[[Scene, fx.Node], fx.Node], ...] = (
    *(lambda s, h: h,) * 80,
    lambda s, h: s.call(F.dropout, h, 0.1, False, False),
    lambda s, h: s.call("contiguous", h),
    lambda s, h: s.call("clone", h),
    lambda s, h: s.call("to", h, s.dtype_of(h)),
    lambda s, h: s.call("view", s.call("reshape", h, -1, s.shape(h)[-1]), *s.shape(h)),
    lambda s, h: s.call(torch.clamp, h, max=1.0),
    lambda s, h: s.call("clamp", h, -2.0, 2.0),
    lambda s, h: s.call(operator.mul, h, 0.5),
    lambda s, h: s.call(operator.neg, h),
    lambda s, h: s.call("flip", h, -1),
    lambda s, h: s.call("transpose", s.call("transpose", h, -1, -2), -1, -2),
    _cast(torch.float16),
    _cast(torch.bfloat16),
    _cast(torch.float64),
    _cast(torch.float8_e4m3fn),
    _cast(torch.float8_e5m2),
    lambda s, h: s.call(operator.iadd, h, 0.5),
    lambda s, h: s.call("mul_", h, -1.0),
)


class _Shape(NamedTuple):
    """A projection's columns in and out, and the dtype of its weights."""

    d: int
    out: int
    dtype: torch.dtype


def ffn(s: Scene, choices: Choices) -> Iterator[None]:
    """Adds an FFN to a program; what it gives becomes the newest stream."""
    x = s.streams[-1 - (choices.below(len(s.streams)) if choices.once_in(4) else 0)]
    kind = choices.pick(("plain", "plain", "gated", "gated", "fused", "glu"))
    hidden = s.width * choices.pick((4, 2, 3))
    activation = choices.pick(choices.pick(_ACTIVATIONS))
    biased = not choices.once_in(3)
    forms = choices.below(len(_FORMS) * 4)
    second = s.dtype if not choices.once_in(12) else choices.pick((torch.float32, torch.bfloat16, torch.float64))
    between, behind = choices.pick(_BETWEEN), choices.pick(_BETWEEN)
    tied = choices.below(12)
    swapped, residual = choices.once_in(3), choices.pick(("add", "add", "none", "iadd", "add_"))
    if s.dtype_of(x) != s.dtype:
        x = s.call("to", x, s.dtype)

    def project(source: fx.Node, out: int, dtype: torch.dtype) -> Generator[None, None, fx.Node]:
        form = _FORMS[forms % len(_FORMS)] if forms < 2 * len(_FORMS) else _linear
        result = yield from form(s, source, _Shape(s.shape(source)[-1], out, dtype), biased, tied)
        s.inner.append(result)
        return result

    up = yield from project(x, hidden * (2 if kind in ("fused", "glu") else 1), s.dtype)
    yield
    if kind == "plain":
        h = between(s, up)
        yield
        h = activation(s, h)
    elif kind == "glu":
        h = s.call(F.glu, up, -1)
    else:
        if kind == "fused":
            halves = s.call("chunk", up, 2, -1)
            up, gate = (s.call(operator.getitem, halves, i) for i in (0, 1))
        else:
            gate = yield from project(x, hidden, s.dtype)
        yield
        gate, up = (up, gate) if swapped else (gate, up)
        gate = between(s, gate)
        yield
        gate = activation(s, gate)
        s.inner.append(gate)
        yield
        h = s.call(operator.mul, *((up, gate) if swapped else (gate, up)))
    s.inner.append(h)
    yield
    h = behind(s, h)
    if second != s.dtype:
        h = s.call("to", h, second)
    yield
    y = yield from project(h, s.width, second)
    if second != s.dtype:
        y = s.call("to", y, s.dtype)
    yield
    s.streams.append(_joined(s, s.streams[-1], y, residual))


def _joined(s: Scene, x: fx.Node, y: fx.Node, how: str) -> fx.Node:
    if how == "none" or s.shape(x) != s.shape(y) or s.dtype_of(x) != s.dtype_of(y):
        return y
    if how == "add":
        return s.call(operator.add, x, y)
    return s.call(operator.iadd, x, y) if how == "iadd" else s.call("add_", y, x)


# ---- Projections


def _weight(s: Scene, rows: int, columns: int, dtype: torch.dtype, tied: int) -> fx.Node:
    """A matrix: a new one, stored either way, one that is there already, or another tensor of the same storage."""
    scale = columns**-0.5
    same = [w for w in s.weights if s.shape(w) == (rows, columns) and s.dtype_of(w) == dtype]
    if same and tied in (1, 2):
        return same[-1]
    if same and tied == 3:
        return s.bring(s.values[same[-1]].view(rows, columns), weight=True)
    turned = [w for w in s.weights if s.shape(w) == (columns, rows) and s.dtype_of(w) == dtype]
    if turned and tied == 4:
        return s.bring(s.values[turned[-1]].t(), weight=True)
    if tied == 5:
        return s.bring(s.normal(columns, rows, scale=scale, dtype=dtype).t(), weight=True)
    if tied == 6:
        return s.bring(s.normal(rows + 2, columns + 1, scale=scale, dtype=dtype)[1:-1, 1:], weight=True)
    return s.bring(s.normal(rows, columns, scale=scale, dtype=dtype), weight=True)


def _bias(s: Scene, shape: _Shape) -> fx.Node:
    return s.bring(s.normal(shape.out, scale=0.5, dtype=shape.dtype), weight=True)


_Form = "Callable[[Scene, fx.Node, _Shape, bool, int], Generator[None, None, fx.Node]]"


def _linear(s: Scene, x: fx.Node, shape: _Shape, biased: bool, tied: int) -> Generator[None, None, fx.Node]:
    weight = _weight(s, shape.out, shape.d, shape.dtype, tied)
    bias = (_bias(s, shape),) if biased else ()
    yield
    return s.call(F.linear, x, weight, *bias)


def _addmm(s: Scene, x: fx.Node, shape: _Shape, biased: bool, tied: int) -> Generator[None, None, fx.Node]:
    weight, bias = _weight(s, shape.d, shape.out, shape.dtype, tied), _bias(s, shape)
    flat = s.call("reshape", x, -1, shape.d)
    yield
    product = s.call(torch.addmm, bias, flat, weight)
    yield
    return s.call("view", product, *s.shape(x)[:-1], shape.out)


def _matmul(s: Scene, x: fx.Node, shape: _Shape, biased: bool, tied: int) -> Generator[None, None, fx.Node]:
    weight = _weight(s, shape.d, shape.out, shape.dtype, tied)
    yield
    product = s.call(torch.matmul, x, weight)
    yield
    return s.call(operator.add, product, _bias(s, shape)) if biased else product


def _transposed(s: Scene, x: fx.Node, shape: _Shape, biased: bool, tied: int) -> Generator[None, None, fx.Node]:
    turned = s.call("t", _weight(s, shape.out, shape.d, shape.dtype, tied))
    yield
    product = s.call(operator.matmul, x, turned)
    yield
    return s.call(operator.iadd, product, _bias(s, shape)) if biased else product


def _einsum(s: Scene, x: fx.Node, shape: _Shape, biased: bool, tied: int) -> Generator[None, None, fx.Node]:
    weight = _weight(s, shape.out, shape.d, shape.dtype, tied)
    yield
    return s.call(torch.einsum, "...i,oi->...o", x, weight)


_FORMS = (_linear, _addmm, _matmul, _transposed, _einsum)
