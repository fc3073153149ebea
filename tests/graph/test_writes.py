"""In-place writes: a site is matched only if every read of its values gives the same result."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.exact import run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tardis_fx.testing.capture import sites_of

X = torch.linspace(-3, 3, 2 * 3 * 8).sin().view(2, 3, 8)


class Gated(nn.Module):
    """A gated FFN, its forward given."""

    def __init__(self, forward: Callable[["Gated", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm = nn.BatchNorm1d(3)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


@torch.library.custom_op("tardis_test::double_", mutates_args=("x",))
def _double(x: Tensor) -> None:
    x.mul_(2)


@_double.register_fake
def _(x: Tensor) -> None:
    return None


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def _opaque(x: Tensor) -> Tensor:
    return x.mul_(2)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.mul_(2)


#: Each doubles a tensor, or some of it.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a method": lambda x: x.mul_(2),
    "a statement": lambda x: operator.imul(x, 2),
    "an item": lambda x: x.__setitem__(0, x[0] * 2),
    "a function": lambda x: torch.Tensor.copy_(x, x * 2),
    "an out argument": lambda x: torch.mul(x, 2, out=x),
    "inplace by keyword": lambda x: F.leaky_relu(x, 2, inplace=True),
    "inplace by position": lambda x: F.leaky_relu(x, 2, True),
    "a list": lambda x: torch._foreach_mul_([x], 2),
    "two lists": lambda x: torch._foreach_copy_([x], [x * 2]),
    "an operator of aten": lambda x: torch.ops.aten.mul_.Tensor(x, torch.tensor(2.0)),
    "an operator of aten, its overload open": lambda x: torch.ops.aten.copy_(x, x * 2),
    "a custom op": lambda x: _double(x),
    "an opaque function": lambda x: _opaque(x),
    "an autograd function": lambda x: _Doubled.apply(x),
    "a checkpoint": lambda x: checkpoint(lambda y: y.mul_(2), x, use_reentrant=False),
    "NumPy": lambda x: x.numpy().__imul__(2),
    "an initialiser": lambda x: nn.init.constant_(x, 2),
    "running statistics": lambda x: F.batch_norm(torch.ones(4, 2), x[0, 0, :2], x[1, 1, :2].exp(), training=True),
    "another tensor's memory": lambda x: x.set_(torch.ones(2, 3, 8)),  # type: ignore[call-overload]  # PyTorch declares storages alone
}

ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "a row": lambda x: x[0, 1],
    "a slice": lambda x: x[..., 2:5],
    "a chunk": lambda x: x.chunk(2, -1)[1],
    "an unbound row": lambda x: x.unbind(0)[1],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "transposed": lambda x: x.mT,
    "reshaped": lambda x: x.reshape(-1),
    "strided": lambda x: x.as_strided((4,), (2,)),
    "a view of bits": lambda x: x.view(torch.int32),
    "its own type": lambda x: x.float(),
    "a dropout of nothing": lambda x: F.dropout(x, 0.5, training=False),
    "a dropout of part of a dropout": lambda x: F.dropout(F.dropout(x, 0.0, training=True)[0], 0.5, training=False),
    "a dropout of features": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "expanded": lambda x: x.view(1, 2, 3, 8).expand(1, 2, 3, 8),
}


def _between(write: Callable[[Tensor], Any], alias: Callable[[Tensor], Tensor]) -> Gated:
    def forward(m: Gated, x: Tensor) -> Tensor:
        x = x.clone()
        gate = F.silu(m.gate(x))
        write(alias(x))
        return m.down(gate * m.up(x))  # type: ignore[no-any-return]

    return Gated(forward).eval()


CASES = [*((name, "itself") for name in WRITES), *(("a method", name) for name in ALIASES)]


@pytest.mark.parametrize(("write", "alias"), CASES)
def test_a_write_to_the_input_between_its_reads_is_refused(write: str, alias: str) -> None:
    backend = run(_between(WRITES[write], ALIASES[alias]), X)
    assert backend.rewritten == 0
    (site,) = backend.sites
    assert "writes to its input between the reads" in str(site.reason)


def test_a_write_through_the_base_of_a_view_is_refused() -> None:
    def forward(m: Gated, x: Tensor) -> Tensor:
        base = x.repeat(2, 1, 1)
        view = base[1:3]
        gate = F.silu(m.gate(view))
        base.zero_()
        return m.down(gate * m.up(view))  # type: ignore[no-any-return]

    backend = run(Gated(forward).eval(), X)
    assert backend.rewritten == 0
    assert "writes to its input" in str(backend.sites[0].reason)


def test_a_write_to_one_input_of_the_graph_may_reach_the_others() -> None:
    def forward(m: Gated, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(m.gate(x))
        y.zero_()
        return m.down(gate * m.up(x))  # type: ignore[no-any-return]

    class Two(Gated):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # has a second input
            return forward(self, x, y)

    (site,) = sites_of(Two(lambda m, x: x).eval(), X.clone(), X.clone())
    assert "writes to its input" in str(site.reason)


#: Writes that change nothing that the site reads, or change it where no read follows.
HARMLESS: dict[str, Callable[[Gated, Tensor], Any]] = {
    "before both reads": lambda m, x: m.down(F.silu(m.gate(y := x.clone().mul_(2))) * m.up(y)),
    "after both reads": lambda m, x: m.down((F.silu(m.gate(y := x.clone())) * m.up(y), y.zero_())[0]),
    "to a copy": lambda m, x: m.down((F.silu(m.gate(x)), x.clone().zero_())[0] * m.up(x)),
    "to the result": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)).mul_(2),
    "to the residual": lambda m, x: x.clone().add_(m.down(F.silu(m.gate(x)) * m.up(x))),
    "of the activation": lambda m, x: m.down(F.silu(m.gate(x), inplace=True).mul_(m.up(x))),
    "of a bias": lambda m, x: operator.iadd(
        F.linear(F.silu(m.gate(x)) * m.up(x), m.down.weight), m.down.bias
    ),
    "to memory that only shares a read": lambda m, x: m.down(
        (F.silu(m.gate(x)), torch.ones(2, 3, 8).copy_(x))[0] * m.up(x)
    ),
    "a pure checkpoint": lambda m, x: m.down(
        (F.silu(m.gate(x)), checkpoint(torch.sin, x, use_reentrant=False))[0] * m.up(x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_a_write_that_no_read_sees_is_harmless(name: str) -> None:
    backend = run(Gated(HARMLESS[name]).eval(), X)
    assert backend.rewritten == 1


#: Writes by the site itself to tensors that are used outside it.
OWN: dict[str, Callable[[Gated, Tensor], Any]] = {
    "a result that is left in a buffer": lambda m, x: (
        buffer := torch.zeros(6, 8),
        torch.mm(torch.relu(m.up(x)).view(6, 32), m.down.weight.T, out=buffer),
    )[0],
    "an intermediate that is left in a buffer": lambda m, x: (
        buffer := torch.zeros(6, 32),
        m.down(torch.relu(torch.mm(x.view(6, 8), m.up.weight.T, out=buffer))),
        buffer.sum(),
    )[1:],
}


@pytest.mark.parametrize("name", OWN)
def test_a_site_that_writes_to_a_tensor_used_outside_it_is_refused(name: str) -> None:
    backend = run(Gated(OWN[name]).eval(), X)
    assert backend.rewritten == 0
    assert all("writes to a tensor that is used outside the site" in str(site.reason) for site in backend.sites)


def test_a_copy_is_not_reached_by_later_writes_in_place() -> None:
    """If it were, the difference would be 0 everywhere: an affine function."""

    def forward(m: Gated, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(h - h.clone().relu_().neg_())  # type: ignore[no-any-return]

    (site,) = sites_of(Gated(forward).eval(), X)
    assert (site.activation, site.affine) == (None, None)


@pytest.mark.parametrize("of", ["up", "down", "gate"])
@pytest.mark.parametrize(
    "write",
    {
        "its transposed view": lambda w: w.T.mul_(2),
        "its data": lambda w: w.data.mul_(2),
        "a row in a list": lambda w: torch._foreach_mul_([w[0], w[1]], 2),
        "a custom op": lambda w: _double(w),
        "an embedding that scales": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.1),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_write_to_a_weight_anywhere_in_the_graph_is_refused(
    of: str, write: tuple[str, Callable[[Tensor], Any]]
) -> None:
    def forward(m: Gated, x: Tensor) -> Tensor:
        y = m.down(F.silu(m.gate(x)) * m.up(x))
        write[1](getattr(m, of).weight)
        return y  # type: ignore[no-any-return]

    (site,) = sites_of(Gated(forward).eval(), X)
    assert "the graph writes to its weight" in str(site.reason)


@pytest.mark.parametrize("write", [lambda y: y.sub_(5), lambda y: y[0].sub_(5), lambda y: y.detach().sub_(5)])
def test_an_input_that_is_written_to_has_no_bounds(write: Callable[[Tensor], Any]) -> None:
    def forward(m: Gated, x: Tensor) -> Tensor:
        y = torch.relu(x)
        write(y)
        return m.down(torch.relu(m.up(y.view(6, 8))))  # type: ignore[no-any-return]

    (site,) = sites_of(Gated(forward).eval(), X)
    assert site.bounds == (-torch.inf, torch.inf)
    (site,) = sites_of(Gated(lambda m, x: m.down(torch.relu(m.up(x.clone().relu_())))).eval(), X)
    assert site.bounds == (0, torch.inf)
