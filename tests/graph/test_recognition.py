import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tardis_fx.graph.activations import ACTIVATIONS, Activation
from tardis_fx.graph.recognition import recognise, recognise_product

every_registered_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)


@every_registered_activation
def test_recognise_finds_the_eager_function(activation: Activation) -> None:
    assert recognise(activation.eager) is activation


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda z: z * 0.5 * (1 + torch.erf(z / 1.41421))),
        ("gelu", lambda z: functional.gelu(z.float()).to(z.dtype)),
        ("gelu_tanh", lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * torch.pow(z, 3.0))))),
        ("gelu_tanh", lambda z: 0.5 * z * (1 + torch.tanh(z * 0.7978845608 * (1 + 0.044715 * z * z)))),
        ("gelu_tanh", lambda z: z * 0.5 * (1 + torch.tanh(0.79788456 * z * (1 + 0.044715 * z * z)))),
        ("gelu_quick", lambda z: z / (1 + torch.exp(-1.702 * z))),
        ("silu", lambda z: z * torch.sigmoid(z)),
        ("mish", lambda z: z * torch.tanh(functional.softplus(z))),
        ("relu2", lambda z: torch.relu(z) ** 2),
        ("relu", lambda z: z.clamp(min=0)),
        ("relu", torch.relu_),
        ("hardswish", lambda z: z * functional.relu6(z + 3) / 6),
        ("identity", lambda z: functional.dropout(z, training=False)),
    ],
)
def test_recognise_finds_other_spellings(name: str, function: Callable[[Tensor], Tensor]) -> None:
    assert recognise(function) is ACTIVATIONS[name]
    assert recognise(torch.relu) is ACTIVATIONS["relu"]  # the in-place one did not spoil the grid


#: Where number types and their 8-bit kin end, and anywhere else.
BOUNDS = [130, 240, 448, 480, 1e4, 57344, 65504, 1e10, 1e20, 1e30, 3e38, float(np.finfo(np.float32).max)]


def refuse(z: Tensor) -> Tensor:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda z: 2 * torch.relu(z),
        lambda z: functional.leaky_relu(z, 0.02),
        lambda z: functional.gelu(z).clamp(max=15),
        *(lambda z, bound=bound: torch.relu(z).clamp(max=bound) for bound in BOUNDS),
        *(lambda z, bound=bound: functional.leaky_relu(z).clamp(min=-bound) for bound in BOUNDS),
        *(lambda z, bound=bound: z.clamp(max=bound) for bound in BOUNDS),
        lambda z: torch.tanh(z) * (z > -1e30),
        lambda z: torch.where(z > 1e35, 1.0, torch.relu(z)),
        lambda z: torch.relu(z) + torch.where(z.abs() < 1e-20, 1e-9, 0.0),
        lambda z: torch.relu(z) + 1e-9,
        lambda z: torch.exp(2 * z).sub(1) / torch.exp(2 * z).add(1),  # NaN far out
        lambda z: torch.relu(z) + torch.where(z == 0, 1e-3, 0.0),
        lambda z: z * torch.log(z) / torch.log(z),
        lambda z: torch.relu(z)[:-1],
        lambda z: torch.relu(z)[None],
        lambda z: None,
        refuse,
    ],
)
def test_recognise_gives_none_for_anything_else(function: Callable[[Tensor], Tensor]) -> None:
    assert recognise(function) is None


@every_registered_activation
def test_recognise_product_finds_the_activation_of_the_gate(activation: Activation) -> None:
    recognised = recognise_product(lambda gate, up: activation.eager(gate) * up)
    assert recognised is (None if activation.affine else activation)


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: gate * functional.silu(up),
        lambda gate, up: functional.silu(gate * up),
        lambda gate, up: functional.silu(gate) + up,
        lambda gate, up: functional.silu(gate) * (up + 1),
        lambda gate, up: functional.silu(gate) * up.abs(),
        lambda gate, up: functional.silu(gate) * up.clamp(-7, 7),
        lambda gate, up: functional.silu(gate).clamp(max=7) * up,
        lambda gate, up: functional.relu(gate - gate.mean()) * up,
        lambda gate, up: (functional.silu(gate) * up).flip(-1),
        lambda gate, up: functional.silu(torch.cat([gate, up])),
        lambda gate, up: refuse(gate),
    ],
)
def test_recognise_product_gives_none_for_anything_else(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert recognise_product(function) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_registered_activation
def test_recognise_finds_the_eager_function_of_any_type(activation: Activation, dtype: torch.dtype) -> None:
    assert recognise(activation.eager, dtype=dtype) is activation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_clip_at_the_largest_number_is_seen_at_infinity(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert recognise(lambda z: torch.relu(z).clamp(max=largest), dtype=dtype) is None


def test_registered_activations_differ_by_far_more_than_the_tolerance() -> None:
    z = np.linspace(-12, 12, 2001)
    for a, b in itertools.combinations(ACTIVATIONS.values(), 2):
        assert np.max(np.abs(a.value(z) - b.value(z)) / (1 + np.abs(b.value(z)))) > 1e-4
