"""Forms of a matrix: what a plan holds of them is what they are, and they multiply as the matrix that they stand for."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from builders.ffns import inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tardis_fx import passes
from tardis_fx.graph.feed_forward import multiply
from tardis_fx.passes.layout import Layout, check, like
from tardis_fx.passes.matrix_forms import Coded, CodedRows, Dense, Factored, Form, Int8, Masked
from tardis_fx.runtime import tables
from tardis_fx.runtime.reference import dequantise

ROWS, COLUMNS = 12, 70

#: By name: how the form is made of a matrix, what a plan holds of it, the matrix that it stands for, and what is no tensor.
FORMS: dict[
    str, tuple[Callable[[Tensor], Form], Callable[[Form], Layout], Callable[[Any], Tensor], tuple[Any, ...]]
] = {
    "Dense": (Dense, lambda f: like(f.tensors("up")), lambda f: f.weight, ()),
    "Coded": (
        lambda w: Coded.from_matrix(w, None, 3, 64),
        lambda _: Coded.layout("up", (ROWS, COLUMNS), 3, 64),
        lambda f: dequantise(f.codes, f.scale, f.zero, 3, COLUMNS, torch.float32),
        (3, COLUMNS, torch.float32),
    ),
    "CodedRows": (
        lambda w: CodedRows.from_matrix(w, None, 3, transposed=False),
        lambda _: CodedRows.layout("up", (ROWS, COLUMNS), 3, transposed=False),
        lambda f: tables.weights(f.rows, 3, COLUMNS),
        (3, COLUMNS, False, torch.float32),
    ),
    "CodedRows of the transpose": (
        lambda w: CodedRows.from_matrix(w, None, 5, transposed=True),
        lambda _: CodedRows.layout("up", (ROWS, COLUMNS), 5, transposed=True),
        lambda f: tables.weights(f.rows, 5, ROWS).T,
        (5, ROWS, True, torch.float32),
    ),
    "Int8": (
        Int8.from_matrix,
        lambda f: like(f.tensors("up")),
        lambda f: f.codes.float() * f.scale[:, None],
        (torch.float32,),
    ),
    "Factored": (
        lambda w: Factored.from_matrix(w, 3),
        lambda _: Factored.layout("up", (ROWS, COLUMNS), 3, torch.float32),
        lambda f: f.a @ f.b,
        (),
    ),
    "Masked": (
        lambda w: Masked.from_matrix(w, w > 0),
        lambda _: Masked.layout("up", (ROWS, COLUMNS)),
        lambda f: f.whole.clamp(min=0),
        (),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@given(seed=st.integers(0, 2**16), biased=st.booleans())
def test_a_form_multiplies_as_the_matrix_that_it_stands_for(name: str, seed: int, biased: bool) -> None:
    make, _, opened, _ = FORMS[name]
    form, x = make(inputs(ROWS, COLUMNS, seed=seed)), inputs(2, 5, COLUMNS, seed=seed + 1)
    bias = inputs(ROWS, seed=seed + 2) if biased else None
    for found in (form.apply(x, bias), multiply(x, form, bias)):
        torch.testing.assert_close(found, F.linear(x, opened(form), bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_what_its_tensors_say_and_these_are_as_its_layout_has_them(name: str) -> None:
    make, layout, _, rest = FORMS[name]
    matrix, x = inputs(ROWS, COLUMNS), inputs(5, COLUMNS)
    form = make(matrix)
    tensors = form.tensors("up")
    check(tensors, layout(form))
    again = type(form).from_tensors(tensors, "up", *(rest or ((matrix,) if name == "Masked" else ())))
    assert torch.equal(again.apply(x), form.apply(x))


def test_a_scale_of_rows_of_codes_that_is_not_finite_is_refused() -> None:
    form = CodedRows.from_matrix(inputs(ROWS, COLUMNS), None, 3, transposed=False)
    layout, rows = CodedRows.layout("up", (ROWS, COLUMNS), 3, transposed=False), form.rows.clone()
    for value in (torch.nan, torch.inf):
        rows[4, -2:] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(ValueError, match="holds a scale that is NaN or infinity"):
            check({"up_rows": rows}, layout)


def test_a_factor_may_be_in_another_form() -> None:
    whole = Factored.from_matrix(inputs(ROWS, COLUMNS), 3)
    coded = Factored(*map(Int8.from_matrix, (whole.a, whole.b)))  # type: ignore[arg-type]
    x = inputs(5, COLUMNS)
    torch.testing.assert_close(coded.apply(x), whole.apply(x), rtol=0.1, atol=0.1)


def test_no_module_of_the_package_hides_what_it_exports() -> None:
    assert not {name for name in passes.__all__ if isinstance(getattr(passes, name), ModuleType)}
