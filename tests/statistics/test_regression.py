import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.statistics.regression import RIDGE, Residual

seeds = st.integers(0, 2**16)
D, D_OUT = 6, 4


def drawn(seed: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with a mean, a planted weight [d, d_out] and bias, and noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g) * torch.linspace(0.5, 2, D) + 1
    return (
        x,
        torch.randn(D, D_OUT, generator=g),
        torch.randn(D_OUT, generator=g),
        torch.randn(tokens, D_OUT, generator=g),
    )


def errors(residual: Residual) -> tuple[float, float]:
    """Of the solution, and of no map at all."""
    found = residual.solve()
    return residual.error(found.weight, found.bias), residual.error(0 * found.weight, 0 * found.bias)


def held_back(parts: list[Tensor]) -> Tensor:
    """Of each batch the last eighth."""
    return torch.cat([part[len(part) - len(part) // 8 :] for part in parts])


@given(seeds, st.sampled_from([1.0, 1e-3, 1e3]))
def test_a_planted_affine_map_is_recovered(seed: int, size: float) -> None:
    x, weight, bias, _ = drawn(seed)
    residual = Residual(D, D_OUT)
    target = size * (x @ weight + bias)
    for part, wanted in zip(x.split(100), target.split(100), strict=True):
        residual.update(part, wanted, wanted)
    found = residual.solve()
    shrunk = 10 * RIDGE  # by the ridge
    torch.testing.assert_close(found.weight.float() / size, weight, rtol=shrunk, atol=shrunk)
    torch.testing.assert_close(found.bias.float() / size, bias, rtol=5 * shrunk, atol=5 * shrunk)
    error, without = errors(residual)
    assert error < 5 * RIDGE
    assert without == pytest.approx(1)


@given(seeds, st.lists(st.sampled_from([8, 50, 100, 3]), min_size=1, max_size=5))
def test_the_held_back_error_is_the_one_computed_directly(seed: int, sizes: list[int]) -> None:
    x, weight, bias, noise = drawn(seed, sum(sizes))
    wanted, output = x @ weight + bias + noise, 3 * (x @ weight) + noise
    residual = Residual(D, D_OUT)
    for parts in zip(x.split(sizes), wanted.split(sizes), output.split(sizes), strict=True):
        residual.update(*parts)
    found = residual.solve()
    held = [held_back(list(tensor.split(sizes))).double() for tensor in (x, wanted, output)]
    if not len(held[0]):
        held = [tensor.double() for tensor in (x, wanted, output)]
    missing = held[1] - held[0] @ found.weight - found.bias
    error, without = errors(residual)
    assert error == pytest.approx(float(missing.norm() / held[2].norm()), rel=1e-3, abs=1e-3)  # of float32 sums
    assert without == pytest.approx(float(held[1].norm() / held[2].norm()), rel=1e-3)


@given(seeds)
def test_no_affine_map_fits_the_fitted_tokens_much_better(seed: int) -> None:
    x, weight, bias, noise = drawn(seed)
    wanted = x @ weight + bias + noise
    residual = Residual(D, D_OUT)
    residual.update(x, wanted, wanted)
    found = residual.solve()
    fitted = slice(0, 350)
    columns = torch.cat([x, torch.ones(len(x), 1)], 1)[fitted].double()
    best = torch.linalg.lstsq(columns, wanted[fitted].double()).solution
    least = (wanted[fitted] - columns @ best).norm()
    ours = (wanted[fitted] - x[fitted].double() @ found.weight - found.bias).norm()
    assert least <= ours <= least * (1 + RIDGE)


@given(seeds)
def test_the_held_back_tokens_are_not_fitted(seed: int) -> None:
    x, weight, bias, noise = drawn(seed)
    wanted = x @ weight + bias + noise
    spoilt = wanted.clone()
    spoilt[350:] = 1e4
    maps, found = [], []
    for target in (wanted, spoilt):
        residual = Residual(D, D_OUT)
        residual.update(x, target, target)
        maps.append(residual.solve())
        found.append(errors(residual)[0])
    assert torch.equal(maps[0].weight, maps[1].weight)
    assert torch.equal(maps[0].bias, maps[1].bias)
    assert found[0] != found[1]


@given(seeds)
def test_a_residual_of_nothing_needs_no_map(seed: int) -> None:
    x, weight, _, _ = drawn(seed)
    residual = Residual(D, D_OUT)
    residual.update(x, torch.zeros(len(x), D_OUT), x @ weight)
    found = residual.solve()
    assert not found.weight.any()
    assert not found.bias.any()
    assert errors(residual) == (0, 0)


@pytest.mark.parametrize("inputs", ["constant", "zero", "one token", "repeated columns"])
def test_inputs_that_determine_no_map_give_a_finite_one(inputs: str) -> None:
    x, weight, bias, noise = drawn(0)
    if inputs == "constant":
        x = x[:1].expand(400, D)
    elif inputs == "zero":
        x = torch.zeros_like(x)
    elif inputs == "one token":
        x, noise = x[:1], noise[:1]
    else:
        x = x[:, :1].expand(400, D)
    wanted = x @ weight + bias + 0 * noise
    residual = Residual(D, D_OUT)
    residual.update(x, wanted, wanted)
    found = residual.solve()
    assert torch.isfinite(found.weight).all()
    assert torch.isfinite(found.bias).all()
    torch.testing.assert_close((x[0].double() @ found.weight + found.bias).float(), wanted[0], rtol=1e-2, atol=1e-2)


def test_an_output_of_zeros_has_no_relative_error() -> None:
    x, _, _, _ = drawn(0)
    residual = Residual(D, D_OUT)
    residual.update(x, torch.zeros(len(x), D_OUT), torch.zeros(len(x), D_OUT))
    assert errors(residual)[0] == 0
