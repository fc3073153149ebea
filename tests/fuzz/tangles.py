"""What drawn programs do among and inside their FFNs: writes through any alias, views, casts, leaks, dead code."""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fuzz.cases import Choices
from fuzz.scene import Scene

_Way = "Callable[[Scene, fx.Node], fx.Node]"


def forked(x: Tensor) -> Tensor:
    """Control flow on a shape."""
    return x * 1.5 if x.dim() and x.shape[0] > 2 else x - 0.25


@cache
def scale_() -> Callable[..., Any]:
    """An op of somebody else's that writes to its argument."""
    torch.library.define("tardis_fuzz::scale_", "(Tensor(a!) x) -> ()")
    torch.library.impl("tardis_fuzz::scale_", ("CompositeExplicitAutograd", "Meta"))(_scale)
    return torch.ops.tardis_fuzz.scale_.default  # type: ignore[no-any-return]


def _scale(x: Tensor) -> None:
    x.mul_(-1.25)


# ---- Aliases

#: What ``x.data`` is in the graphs of Dynamo.
_DATA: Callable[[Tensor], Tensor] = getattr(torch._C._autograd, "_get_data_attr", Tensor.detach)

_ALIASES: tuple[Callable[[Scene, fx.Node], fx.Node], ...] = (
    lambda s, v: v,
    lambda s, v: s.call(operator.getitem, v, (..., slice(0, 3))),
    lambda s, v: s.call(operator.getitem, v, slice(0, 1)),
    lambda s, v: s.call("detach", v),
    lambda s, v: s.call("transpose", v, 0, -1),
    lambda s, v: s.call("t", v),
    lambda s, v: s.call("reshape", v, -1, s.shape(v)[-1]),
    lambda s, v: s.call("view", v, -1),
    lambda s, v: s.call("flatten", v),
    lambda s, v: s.call("unsqueeze", v, 0),
    lambda s, v: s.call("view_as", v, v),
    lambda s, v: s.call("contiguous", v),
    lambda s, v: s.call("to", v, s.dtype_of(v)),
    lambda s, v: s.call(F.dropout, v, 0.5, False),
    lambda s, v: s.call(_DATA, v),
    lambda s, v: s.call(operator.getitem, s.call("chunk", v, 2, -1), 1),
    lambda s, v: s.call(operator.getitem, s.call("unbind", v), 0),
    lambda s, v: s.call("narrow", v, -1, 0, 2),
    lambda s, v: s.call("squeeze", v),
    lambda s, v: s.call(torch.ops.aten.alias.default, v),
    lambda s, v: s.call("permute", v, *reversed(range(len(s.shape(v))))),
    lambda s, v: s.call("movedim", v, 0, -1),
    lambda s, v: s.call("select", v, 0, 0),
    lambda s, v: s.call("diagonal", v, 0, -1, 0),
    lambda s, v: s.call(torch.as_strided, v, (2,), (1,)),
    lambda s, v: s.call("expand_as", v, v),
    lambda s, v: s.call(getattr, v, "T" if len(s.shape(v)) == 2 else "mT"),
)

# ---- Writes, of whatever is given

_WRITES: tuple[Callable[[Scene, fx.Node], fx.Node], ...] = (
    lambda s, v: s.call("add_", v, 1.0),
    lambda s, v: s.call("mul_", v, -1.5),
    lambda s, v: s.call(operator.iadd, v, 0.75),
    lambda s, v: s.call(operator.imul, v, -0.5),
    lambda s, v: s.call(operator.isub, v, 0.75),
    lambda s, v: s.call(operator.itruediv, v, -2.0),
    lambda s, v: s.call("zero_", v),
    lambda s, v: s.call("fill_", v, 0.5),
    lambda s, v: s.call("copy_", v, s.call("flip", v, -1)),
    lambda s, v: s.call("clamp_", v, max=0.25),
    lambda s, v: s.call("relu_", v),
    lambda s, v: s.call(F.relu, v, inplace=True),
    lambda s, v: s.call(F.dropout, s.call("neg_", v), 0.5, False, True),
    lambda s, v: s.call(operator.setitem, v, (..., slice(0, 2)), 2.0),
    lambda s, v: s.call(operator.setitem, v, ..., s.call("neg", v)),
    lambda s, v: s.call(operator.setitem, v, s.call(operator.gt, v, 0), 0.0),
    lambda s, v: s.call("masked_fill_", v, s.call(operator.lt, v, 0), 0.0),
    lambda s, v: s.call("index_fill_", v, -1, s.call(torch.tensor, [0]), 1.0),
    lambda s, v: s.call(torch._foreach_add_, [v], 1.0),
    lambda s, v: s.call(torch._foreach_mul_, [v], -1.0),
    lambda s, v: s.call(torch._foreach_copy_, [v], [s.call("neg", v)]),  # Inductor flips wrongly there
    lambda s, v: s.call(torch.add, v, 1.0, out=v),
    lambda s, v: s.call(torch.neg, s.call("clone", v), out=v),
    lambda s, v: s.call(torch.ops.aten.add_.Scalar, v, 1.0),
    lambda s, v: s.call(torch.ops.aten.copy_.default, v, s.call("flip", v, -1)),
    lambda s, v: s.call(torch.sigmoid_, v),
    lambda s, v: s.call("addcmul_", v, v, v, value=-0.5),
    lambda s, v: s.call("lerp_", v, s.call("flip", v, -1), 0.5),
    lambda s, v: s.call("__iadd__", v, 1.0),
    lambda s, v: s.call("__setitem__", v, ..., 0.5),
    lambda s, v: s.call(scale_(), v),
)

# ---- New values of an old one's shape

_VALUES: tuple[Callable[[Scene, fx.Node], fx.Node], ...] = (
    lambda s, v: s.call(torch.tanh, v),
    lambda s, v: s.call(operator.mul, v, 0.5),
    lambda s, v: s.call(operator.add, v, s.call("flip", v, -1)),
    lambda s, v: s.call(F.layer_norm, v, s.shape(v)[-1:], eps=0.1),
    lambda s, v: s.call(torch.softmax, v, -1),
    lambda s, v: s.call("cumsum", v, -1),
    lambda s, v: s.call("clone", v),
    lambda s, v: s.call("roll", v, 1, -1),
    lambda s, v: s.call(forked, v),
    lambda s, v: s.call(torch.cat, [v, v], 0),
    lambda s, v: s.call(operator.getitem, v, slice(0, 1)),
    lambda s, v: s.call("to", s.call("to", v, torch.float8_e4m3fn), s.dtype_of(v)),
    lambda s, v: s.call("to", s.call("to", v, torch.bfloat16), s.dtype_of(v)),
    lambda s, v: s.call(F.relu, v),
    lambda s, v: s.call("transpose", s.call("contiguous", s.call("transpose", v, 0, -1)), 0, -1),
)


def _chosen(s: Scene, choices: Choices) -> fx.Node:
    """Any value, most likely one that an FFN reads or is made of."""
    kind = choices.below(8)
    pool = s.streams if kind < 3 else s.inner if kind < 6 else s.weights if kind == 6 else s.inputs
    pool = pool or s.streams
    return pool[-1 - choices.below(min(len(pool), 6))]


def _write(s: Scene, choices: Choices) -> None:
    target = choices.pick(_ALIASES)(s, _chosen(s, choices))
    choices.pick(_WRITES)(s, target)


def _keep_alias(s: Scene, choices: Choices) -> None:
    """An alias that later steps write to or return."""
    alias = choices.pick(_ALIASES)(s, _chosen(s, choices))
    (s.streams if s.shape(alias)[-1:] == (s.width,) and s.shape(alias)[:-1] else s.inner).append(alias)


def _compute(s: Scene, choices: Choices) -> None:
    value = choices.pick(_VALUES)(s, s.streams[-1 - choices.below(len(s.streams))])
    s.streams.append(value)


def _leak(s: Scene, choices: Choices) -> None:
    s.leaks.append(choices.pick((_summed, _itself, _itself))(s, _chosen(s, choices)))


def _summed(s: Scene, v: fx.Node) -> fx.Node:
    return s.call("sum", v, -1)


def _itself(s: Scene, v: fx.Node) -> fx.Node:
    return v


def _die(s: Scene, choices: Choices) -> None:
    """A value that nobody reads."""
    choices.pick(_VALUES)(s, _chosen(s, choices))


def _input(s: Scene, choices: Choices) -> None:
    """One more input: of its own storage, or a part of what another input or a weight holds."""
    kind = choices.below(4)
    if kind == 0:
        s.streams.append(s.bring(s.normal(3, s.width)))
        return
    pool: list[fx.Node] = s.weights if kind == 1 and s.weights else s.inputs
    value = s.values[pool[-1 - choices.below(len(pool))]]
    made = choices.pick((value.view_as(value), value[..., :1], value.t() if value.dim() == 2 else value[:1]))
    node = s.bring(made)
    if made.shape[-1] == s.width and made.dim() > 1 and made.dtype == s.dtype:
        s.streams.append(node)


#: What a step that is not part of an FFN does.
TANGLES: tuple[Callable[[Scene, Choices], None], ...] = (
    *(_write, _write, _write),
    *(_keep_alias, _compute, _leak, _die, _input),
)
