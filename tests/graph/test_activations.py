import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import sympy
import torch
from builders.activations import CUBE, ELU, LECUN_TANH, RELU6
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float64
from torch import Tensor
from torch.nn import functional

from tardis_fx.errors import ConfigError
from tardis_fx.graph import activations
from tardis_fx.graph.activations import ACTIVATIONS, Activation, Z, register
from tardis_fx.graph.recognition import recognise
from tardis_fx.runtime.cpu import build as cpu_build

STEP = Activation("step", sympy.Piecewise((0, Z < 0), (1, True)), lambda z: (z >= 0).to(z.dtype))

every_activation = pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), RELU6, CUBE], ids=lambda a: a.name)
every_registered_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)

unhurried = settings(deadline=None, max_examples=examples(50))  # the first example derives the rest
Arguments = Float64[np.ndarray, " n"]
arguments = st.lists(st.floats(-30, 30), min_size=1, max_size=20).map(np.array)


@every_activation
@unhurried
@given(z=arguments)
def test_value_equals_eager(activation: Activation, z: Arguments) -> None:
    np.testing.assert_allclose(activation.value(z), activation.eager(torch.tensor(z)).numpy(), rtol=1e-12, atol=1e-12)


@every_registered_activation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_keeps_the_dtype(activation: Activation, dtype: torch.dtype) -> None:
    assert activation.eager(torch.ones(2, dtype=dtype)).dtype == dtype


@every_activation
@pytest.mark.filterwarnings("error")
def test_extreme_arguments_give_finite_numbers_and_no_warning(activation: Activation) -> None:
    z = np.concatenate([-np.geomspace(1e-4, 1e4, 1000), [0.0], np.geomspace(1e-4, 1e4, 1000)])
    assert np.isfinite(activation.value(z)).all()
    np.testing.assert_allclose(activation.value(z), activation.eager(torch.tensor(z)).numpy(), rtol=1e-10, atol=1e-10)


@every_activation
@pytest.mark.filterwarnings("error")
def test_infinite_arguments_give_no_warning_and_nan_stays_nan(activation: Activation) -> None:
    activation.value([-np.inf, np.inf, 1e300])
    assert np.isnan(activation.value(np.nan))


@every_activation
def test_arrays_of_any_shape_keep_it(activation: Activation) -> None:
    for shape in [(), (0,), (2, 3)]:
        assert activation.value(np.zeros(shape)).shape == shape


class Taken(float):
    """The value of a C++ branch taken: true, so that ``condition and Taken(a) or b`` is ``condition ? a : b``."""

    def __bool__(self) -> bool:
        return True


def cxx(activation: Activation, z: float) -> float:
    """What the C++ expression gives in float64."""
    code = re.sub(r"([0-9])F\b", r"\1", activation.cxx).replace("std::", "")
    code = code.replace("&&", "and").replace("?", "and Taken").replace(":", "or")
    names = {"Taken": Taken, "tanh": np.tanh, "erf": lambda x: torch.tensor(x).erf().item()}
    return float(eval(code, names, {"z": z}))


def triton(activation: Activation, z: float) -> float:
    """What the Triton expression gives in float64."""
    tl = SimpleNamespace(
        where=np.where, erf=lambda x: torch.tensor(x).erf().item(), sigmoid=lambda x: (1 + np.tanh(x / 2)) / 2
    )
    return float(eval(activation.triton, {"tl": tl, "tanh": np.tanh}, {"z": np.float64(z)}))


every_printed_activation = pytest.mark.parametrize(
    "activation", [*ACTIVATIONS.values(), RELU6, CUBE, ELU, LECUN_TANH, STEP], ids=lambda a: a.name
)


@pytest.mark.parametrize("language", [cxx, triton])
@every_printed_activation
@unhurried
@given(z=arguments)
def test_generated_code_computes_the_value(
    language: Callable[[Activation, float], float], activation: Activation, z: Arguments
) -> None:
    values = [language(activation, argument) for argument in z]
    digits = 1e-8 if language is cxx else 6e-8  # of constants: nine in C++, those of float32 in Triton
    np.testing.assert_allclose(values, activation.value(z), rtol=10 * digits, atol=digits)


@pytest.mark.parametrize("language", [cxx, triton])
@every_registered_activation
@pytest.mark.filterwarnings("ignore:invalid value")
def test_generated_code_gives_what_pytorch_gives_at_infinity(
    language: Callable[[Activation, float], float], activation: Activation
) -> None:
    for z in (-np.inf, np.inf):
        np.testing.assert_equal(language(activation, z), activation.eager(torch.tensor(z, dtype=torch.float64)).item())


@pytest.mark.parametrize("language", [cxx, triton])
@every_printed_activation
@pytest.mark.filterwarnings("ignore:invalid value")
def test_generated_code_keeps_a_nan(language: Callable[[Activation, float], float], activation: Activation) -> None:
    assert np.isnan(language(activation, np.nan))


@pytest.mark.parametrize(
    ("activation", "code"),
    [
        (ACTIVATIONS["silu"], "z*tl.sigmoid(z)"),
        (ACTIVATIONS["hardswish"], "z*tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, 0.16666667*z + 0.5))"),
        (CUBE, "(z*z*z)"),
        (ELU, "tl.where(z < 0.0, tanh(0.5*z)/tl.sigmoid(-z), z)"),
        (STEP, "tl.where(z == z, tl.where(z < 0.0, 0.0, 1.0), z)"),
        (Activation("root", sympy.sqrt(Z**2 + 2), torch.sin), "tl.sqrt((z*z) + 2.0)"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_triton_code_is_simplified_and_loses_no_digits(activation: Activation, code: str) -> None:
    assert activation.triton == code or activation.triton == f"({code})"


@every_registered_activation
def test_cxx_has_no_power_and_no_double_literal(activation: Activation) -> None:
    assert "pow" not in activation.cxx
    assert not re.search(r"\d\.\d+(?![\dF])", activation.cxx)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry, whose additions are gone after the test."""
    monkeypatch.setattr(activations, "_closed", False)
    for added in ("elu", "odd"):
        monkeypatch.setitem(ACTIVATIONS, added, ACTIVATIONS["relu"])
        monkeypatch.delitem(ACTIVATIONS, added)


@pytest.mark.usefixtures("registry")
def test_a_registered_activation_is_known_everywhere() -> None:
    assert recognise(functional.elu) is None
    assert register(ELU) is ACTIVATIONS["elu"] is ELU
    assert recognise(functional.elu) is ELU
    assert recognise(lambda z: torch.where(z > 0, z, torch.expm1(z))) is ELU
    code = ELU.cxx.replace("std::", "lanes::")
    assert f"case {len(ACTIVATIONS) - 1}: return lanes::as_vector({code}, z);" in cpu_build._cases()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (Activation("relu", Z, lambda z: z), "there is an activation 'relu'"),
        (Activation("affine", Z, lambda z: z), "there is an activation 'affine'"),
        (Activation("not a name", Z, lambda z: z), "must be an identifier"),
        (Activation("odd", Z, lambda z: 2 * z), "the eager function does not compute z"),
        (Activation("odd", 2 * sympy.Symbol("Z"), lambda z: 2 * z), "the only symbol"),
    ],
    ids=["relu", "affine", "no identifier", "another function", "another symbol"],
)
def test_register_refuses_activations_that_the_registry_does_not_handle(activation: Activation, reason: str) -> None:
    before = dict(ACTIVATIONS)
    with pytest.raises(ConfigError, match=reason):
        register(activation)
    assert before == ACTIVATIONS


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("expression", "eager"),
    [(Z / (1 + sympy.Abs(Z)), functional.softsign), (sympy.Max(Z, 50), lambda z: z.clamp(min=50))],
    ids=["slow asymptote", "far kink"],
)
def test_an_activation_may_near_its_asymptote_slowly_or_bend_far_out(
    expression: sympy.Expr, eager: Callable[[Tensor], Tensor]
) -> None:
    activation = register(Activation("odd", expression, eager))
    assert recognise(lambda z: eager(z) * 1.0) is activation


@pytest.mark.usefixtures("registry")
def test_register_refuses_once_kernels_are_generated() -> None:
    assert activations.close() == tuple(ACTIVATIONS.values())
    with pytest.raises(ConfigError, match="elu: activations must be registered before"):
        register(ELU)


@pytest.mark.parametrize("code", ["cxx", "triton"])
def test_a_function_without_code_is_named(code: str) -> None:
    with pytest.raises(ConfigError, match="no .* code for .*bessel"):
        getattr(Activation("odd", sympy.besselj(2, Z), torch.sin), code)
