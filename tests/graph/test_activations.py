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
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tardis_fx.errors import ConfigError
from tardis_fx.graph import activations
from tardis_fx.graph.activations import ACTIVATIONS, Activation, Z, register
from tardis_fx.graph.recognition import recognise, recognise_product
from tardis_fx.runtime.cpu import build as cpu_build

Array = NDArray[np.float64]
INF = np.inf

STEP = Activation("step", sympy.Piecewise((0, Z < 0), (1, True)), lambda z: (z >= 0).to(z.dtype))

KINKS = {"relu": [0.0], "relu2": [0.0], "leaky_relu": [0.0], "hardswish": [-3.0, 3.0], "relu6": [0.0, 6.0]}
MOST_SLOPE_POINTS = {"identity": 0, "relu": 0, "leaky_relu": 0, "relu6": 0, "relu2": 1, "hardswish": 1}

every_activation = pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), RELU6, CUBE], ids=lambda a: a.name)
every_curved_activation = pytest.mark.parametrize(
    "activation", [a for a in [*ACTIVATIONS.values(), CUBE] if MOST_SLOPE_POINTS.get(a.name, 2)], ids=lambda a: a.name
)
every_registered_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)

unhurried = settings(
    deadline=None, max_examples=examples(50)
)  # the first example of an activation derives all about it
arguments = st.lists(st.floats(-30, 30), min_size=1, max_size=20).map(np.array)
intervals = st.lists(st.floats(-30, 30), min_size=2, max_size=2).map(sorted)
slopes = st.floats(-2, 3)


def from_kinks(activation: Activation, z: Array) -> Array:
    """[n]: the distance of each argument from the nearest kink."""
    return np.asarray(np.abs(np.subtract.outer(z, [*KINKS.get(activation.name, []), INF])).min(axis=1, initial=INF))


def largest_error(activation: Activation, slope: float, intercept: float, lower: float, upper: float) -> float:
    """The largest error by brute force: a grid, then finer ones around its eight highest local maxima."""
    grid = np.linspace(lower, upper, 2000)[None]
    for _ in range(4):
        error = np.abs(activation.value(grid) - slope * grid - intercept)
        around = np.pad(error, ((0, 0), (1, 1)), constant_values=-1)
        row, column = np.nonzero((error > around[:, :-2]) & (error >= around[:, 2:]))
        highest = np.argsort(error[row, column])[-8:]
        row, column = row[highest], column[highest]
        finer = np.linspace(grid[row, np.maximum(column - 1, 0)], grid[row, np.minimum(column + 1, 1999)], 2000, axis=1)
        grid = finer
    return float(error.max())


@every_activation
@unhurried
@given(z=arguments)
def test_value_equals_eager(activation: Activation, z: Array) -> None:
    np.testing.assert_allclose(activation.value(z), activation.eager(torch.tensor(z)).numpy(), rtol=1e-12, atol=1e-12)


@every_registered_activation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_keeps_the_dtype(activation: Activation, dtype: torch.dtype) -> None:
    assert activation.eager(torch.ones(2, dtype=dtype)).dtype == dtype


@every_activation
@unhurried
@given(z=arguments)
def test_derivative_equals_central_difference(activation: Activation, z: Array) -> None:
    z = z[from_kinks(activation, z) > 1e-3]
    difference = (activation.value(z + 1e-4) - activation.value(z - 1e-4)) / 2e-4
    np.testing.assert_allclose(activation.derivative(z), difference, rtol=1e-6, atol=1e-6)


@every_activation
@pytest.mark.filterwarnings("error")
def test_extreme_arguments_give_finite_numbers_and_no_warning(activation: Activation) -> None:
    z = np.concatenate([-np.geomspace(1e-4, 1e4, 1000), [0.0], np.geomspace(1e-4, 1e4, 1000)])
    assert np.isfinite(activation.value(z)).all()
    assert np.isfinite(activation.derivative(z)).all()
    np.testing.assert_allclose(activation.value(z), activation.eager(torch.tensor(z)).numpy(), rtol=1e-10, atol=1e-10)


@every_activation
@pytest.mark.filterwarnings("error")
def test_infinite_arguments_give_no_warning_and_nan_stays_nan(activation: Activation) -> None:
    activation.value([-INF, INF, 1e300])
    activation.derivative([-INF, INF, 1e300])
    assert np.isnan(activation.value(np.nan))


@every_activation
def test_arrays_of_any_shape_keep_it(activation: Activation) -> None:
    for shape in [(), (0,), (2, 3)]:
        assert activation.value(np.zeros(shape)).shape == activation.derivative(np.zeros(shape)).shape == shape


@every_activation
def test_slope_points_have_a_column_for_each_solution_a_slope_can_have(activation: Activation) -> None:
    assert activation.slope_points(np.zeros(5)).shape == (5, MOST_SLOPE_POINTS.get(activation.name, 2))


@every_curved_activation
@unhurried
@given(z=arguments, slope=slopes)
def test_derivative_at_slope_points_is_the_slope(activation: Activation, z: Array, slope: float) -> None:
    wanted = np.append(activation.derivative(z), slope)
    points = activation.slope_points(wanted)
    row, column = np.nonzero(np.isfinite(points))
    np.testing.assert_allclose(activation.derivative(points[row, column]), wanted[row], rtol=1e-12, atol=1e-12)
    assert np.all(np.diff(points, axis=1)[np.isfinite(points[:, 1:])] > 0)


@every_curved_activation
@unhurried
@given(z=st.floats(-11, 11), slope=slopes, take=st.booleans())
def test_slope_points_miss_no_crossing(activation: Activation, z: float, slope: float, take: bool) -> None:
    slope = float(activation.derivative(z)) if take else slope
    grid = np.linspace(-12, 12, 4001)
    excess = activation.derivative(grid) - slope
    sign = np.where(np.abs(excess) > 1e-12, np.sign(excess), 0)
    crossing = np.flatnonzero(sign[1:] * sign[:-1] < 0)
    crossing = crossing[from_kinks(activation, (grid[crossing] + grid[crossing + 1]) / 2) > 0.006]
    points = activation.slope_points(np.array([slope]))[0]
    inside = points[(points > grid[0]) & (points < grid[-1])]
    assert np.isin(crossing, np.searchsorted(grid, inside) - 1).all()


@pytest.mark.parametrize(("name", "slope"), [("tanh", 1.0), ("sigmoid", 0.25)])
def test_slope_of_an_inflection_is_found_once(name: str, slope: float) -> None:
    points = ACTIVATIONS[name].slope_points(np.array([slope]))[0]
    np.testing.assert_allclose(points, [0, np.nan], atol=1e-7)


@unhurried
@given(slope=st.floats(1e-9, 1e12))
def test_slope_points_of_relu2_are_half_the_slope_however_far(slope: float) -> None:
    np.testing.assert_allclose(
        ACTIVATIONS["relu2"].slope_points(np.array([slope])), [[slope / 2]], rtol=1e-12, atol=1e-16
    )


@unhurried
@given(slope=st.floats(1e-3, 0.249))
def test_slope_points_of_sigmoid_are_its_logits(slope: float) -> None:
    logit = np.log1p(np.sqrt(1 - 4 * slope)) - np.log1p(-np.sqrt(1 - 4 * slope))
    np.testing.assert_allclose(ACTIVATIONS["sigmoid"].slope_points(np.array([slope])), [[-logit, logit]], rtol=1e-9)


@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("slope", [-5.0, 5.0])
def test_slope_out_of_reach_has_no_point(name: str, slope: float) -> None:
    assert np.isnan(ACTIVATIONS[name].slope_points(np.array([slope]))).all()


@every_activation
@unhurried
@given(slope=slopes, intercept=st.floats(-5, 5), interval=intervals)
def test_max_error_is_an_upper_bound_that_is_attained(
    activation: Activation, slope: float, intercept: float, interval: list[float]
) -> None:
    bound = activation.max_error([slope], [intercept], interval[:1], interval[1:])[0]
    z = np.linspace(interval[0], interval[1], 2000)
    error = np.abs(activation.value(z) - slope * z - intercept)
    assert bound >= error.max() - 1e-12 * (1 + np.abs(activation.value(z)).max())
    assert bound == pytest.approx(largest_error(activation, slope, intercept, *interval), rel=1e-6, abs=1e-9)


@every_activation
@unhurried
@given(rows=st.lists(st.tuples(slopes, st.floats(-5, 5), intervals), min_size=2, max_size=3))
def test_max_error_of_many_is_that_of_each(
    activation: Activation, rows: list[tuple[float, float, list[float]]]
) -> None:
    slope, intercept, interval = (np.array(column) for column in zip(*rows, strict=True))
    together = activation.max_error(slope, intercept, interval[:, 0], interval[:, 1])
    assert together.shape == (len(rows),)
    for each, (a, c, (lower, upper)) in zip(together, rows, strict=True):
        assert each == activation.max_error(a, c, lower, upper)


@unhurried
@given(intercept=st.floats(-5, 5), interval=intervals)
def test_max_error_of_identity_is_exactly_the_intercept(intercept: float, interval: list[float]) -> None:
    for lower, upper in [interval, (-INF, INF), (-INF, interval[1])]:
        assert ACTIVATIONS["identity"].max_error(1.0, 0.0, lower, upper) == 0
        assert ACTIVATIONS["identity"].max_error(1.0, intercept, lower, upper) == pytest.approx(abs(intercept))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "slope", "intercept", "lower", "upper", "error"),
    [
        ("relu", 1, 0.25, 0, INF, 0.25),
        ("relu", 1, 0, -2, INF, 2),
        ("relu", 1, 0, -INF, INF, INF),
        ("relu", 0.5, 0, 0, INF, INF),
        ("relu", 0, 0.5, -INF, 0, 0.5),
        ("leaky_relu", 0.01, 0, -INF, 0, 0),
        ("leaky_relu", 0, 0, -INF, 0, INF),
        ("relu2", 5, 0, 0, INF, INF),
        ("relu2", 0, 0.5, -INF, 1, 0.5),
        ("gelu", 0, 0, -INF, 0, 0.16997120747990369),
        ("gelu", 1, 0, 0, INF, 0.16997120747990369),
        ("gelu", 1 + 1e-9, 0, 0, INF, INF),
        ("sigmoid", 0, 0, -INF, INF, 1),
        ("sigmoid", 0, 0.5, -INF, INF, 0.5),
        ("tanh", 0, -0.5, -INF, INF, 1.5),
        ("tanh", 0, 0, INF, INF, 1),
        ("hardswish", 1, 0, 0, INF, 0.375),
    ],
)
def test_max_error_at_an_infinite_bound_is_the_limit(
    name: str, slope: float, intercept: float, lower: float, upper: float, error: float
) -> None:
    found = ACTIVATIONS[name].max_error([slope], [intercept], [lower], [upper])
    np.testing.assert_allclose(found, [error], rtol=1e-12)


@every_activation
@unhurried
@given(slope=st.integers(-200, 300).map(lambda n: n / 100), intercept=st.floats(-5, 5), bound=st.floats(-30, 30))
def test_max_error_to_infinity_is_the_limit_of_far_bounds(
    activation: Activation, slope: float, intercept: float, bound: float
) -> None:
    lower, upper = np.array([-INF, bound]), np.array([bound, INF])
    error = activation.max_error(slope, intercept, lower, upper)
    far = activation.max_error(slope, intercept, np.maximum(lower, -1e8), np.minimum(upper, 1e8))
    np.testing.assert_allclose(np.where(far > 1e5, INF, far), error, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("lower", "upper"), [(1, 0), (np.nan, 0), (0, np.nan)])
def test_max_error_refuses_bounds_out_of_order(lower: float, upper: float) -> None:
    with pytest.raises(ValueError, match="max_error of gelu: every lower bound"):
        ACTIVATIONS["gelu"].max_error(1, 0, lower, upper)


def test_expression_with_a_far_kink_is_refused() -> None:
    with pytest.raises(ConfigError, match="relu50: a kink beyond"):
        Activation("relu50", sympy.Max(Z, 50), lambda z: z.clamp(min=50)).slope_points(np.zeros(1))


def test_expression_that_nears_its_asymptote_slowly_is_refused() -> None:
    with pytest.raises(ConfigError, match="softsign: no asymptote"):
        Activation("softsign", Z / (1 + sympy.Abs(Z)), functional.softsign).slope_points(np.zeros(1))


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
    language: Callable[[Activation, float], float], activation: Activation, z: Array
) -> None:
    found = [language(activation, each) for each in z]
    digits = 1e-8 if language is cxx else 6e-8  # of constants: nine in C++, those of float32 in Triton
    np.testing.assert_allclose(found, activation.value(z), rtol=10 * digits, atol=digits)


@pytest.mark.parametrize("language", [cxx, triton])
@every_printed_activation
@pytest.mark.filterwarnings("ignore:invalid value")
def test_generated_code_keeps_a_nan(language: Callable[[Activation, float], float], activation: Activation) -> None:
    assert np.isnan(language(activation, np.nan))


@pytest.mark.parametrize(
    ("activation", "code"),
    [
        (ACTIVATIONS["silu"], "z*tl.sigmoid(z)"),
        (ACTIVATIONS["hardswish"], "tl.where(z < -3.0, 0.0, tl.where(z > 3.0, z, 0.16666667*z*(z + 3.0)))"),
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
    assert f"case {len(ACTIVATIONS) - 1}: return {ELU.cxx};" in cpu_build._cases()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (Activation("relu", Z, lambda z: z), "there is an activation 'relu'"),
        (Activation("affine", Z, lambda z: z), "there is an activation 'affine'"),
        (Activation("not a name", Z, lambda z: z), "must be an identifier"),
        (Activation("odd", Z, lambda z: 2 * z), "the eager function does not compute Z"),
        (Activation("odd", 2 * sympy.Symbol("Z"), lambda z: 2 * z), "the only symbol"),
        (Activation("odd", sympy.Max(Z, 50), lambda z: z.clamp(min=50)), "a kink beyond"),
        (Activation("odd", Z / (1 + sympy.Abs(Z)), functional.softsign), "no asymptote"),
    ],
    ids=str,
)
def test_register_refuses_what_the_registry_does_not_handle(activation: Activation, reason: str) -> None:
    before = dict(ACTIVATIONS)
    with pytest.raises(ConfigError, match=reason):
        register(activation)
    assert before == ACTIVATIONS


@pytest.mark.usefixtures("registry")
def test_register_refuses_once_kernels_are_generated() -> None:
    assert activations.close() == tuple(ACTIVATIONS.values())
    with pytest.raises(ConfigError, match="elu: activations must be registered before"):
        register(ELU)


@pytest.mark.parametrize("code", ["cxx", "triton"])
def test_a_function_without_code_is_named(code: str) -> None:
    with pytest.raises(ConfigError, match="no .* code for .*bessel"):
        getattr(Activation("odd", sympy.besselj(2, Z), torch.sin), code)


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
def test_recognise_product_finds_what_the_gate_goes_through(activation: Activation) -> None:
    found = recognise_product(lambda gate, up: activation.eager(gate) * up)
    assert found is (None if activation.affine else activation)


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
def test_a_clip_at_the_largest_number_is_seen_by_what_it_makes_of_infinity(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert recognise(lambda z: torch.relu(z).clamp(max=largest), dtype=dtype) is None


def test_registered_activations_differ_by_far_more_than_the_tolerance() -> None:
    z = np.linspace(-12, 12, 2001)
    for activation in ACTIVATIONS.values():
        for other in ACTIVATIONS.values():
            apart = np.max(np.abs(activation.value(z) - other.value(z)) / (1 + np.abs(other.value(z))))
            assert (apart == 0) if activation is other else (apart > 1e-4)
