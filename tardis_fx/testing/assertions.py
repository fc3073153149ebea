"""Assertions about rewrites: outputs, graphs, plan files, and the errors that plans report."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from tardis_fx.graph.matcher import find_sites
from tardis_fx.passes import pipeline
from tardis_fx.passes.pipeline import Rewritten
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.testing.capture import capture

#: Relative norm of a difference up to which two results count as equal.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def assert_equivalent(actual: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
    """Asserts that two tensors have the same shape, dtype and, to rounding, values.

    Args:
        actual: any shape.
        expected: any shape.
        tolerance: norm of the difference over that of ``expected``; None takes the dtype's from :data:`TOLERANCES`.

    Raises:
        AssertionError: they differ, or hold NaN or infinity.
    """
    assert actual.shape == expected.shape, f"the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"the dtype is {actual.dtype}, not {expected.dtype}"
    assert torch.isfinite(actual).all(), "the tensor holds NaN or infinity"
    allowed = TOLERANCES.get(expected.dtype, 0.0) if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= allowed, f"the relative error is {error:.3g}, more than {allowed:.3g}"


def relative_error(actual: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Norm of the difference over the norm of ``expected``."""
    difference, norm = (float(t.double().norm()) for t in (actual.double() - expected.double(), expected))
    return difference / norm if norm else (math.inf if difference else 0.0)


def rewritten(model: nn.Module, inputs: Tensor, plan: Plan) -> Rewritten:
    """The graph that the backend makes from a model under a plan, with every step rewritten.

    Args:
        model: in eval mode; Dynamo must capture it as one graph.
        inputs: argument of the model.
        plan: of this model.
    """
    captured = capture(model, inputs)
    with torch.no_grad():
        return pipeline.apply(captured.gm, captured.inputs, plan, "rewritten")


def assert_matches(
    subject: fx.Graph | Rewritten, *, count: int, present: Sequence[Any] = (), absent: Sequence[Any] = ()
) -> None:
    """Asserts the number of sites, and which operations are present or absent.

    Args:
        subject: a Dynamo graph, whose sites that can be rewritten are counted; or the result of :func:`rewritten`,
            whose rewritten sites are counted.
        count: number of sites.
        present: targets of nodes that the graph must hold: functions, or names of methods.
        absent: targets that it must not hold.

    Raises:
        AssertionError: one of these does not hold.
    """
    if isinstance(subject, fx.Graph):
        with torch.no_grad():
            sites = find_sites(subject)
        graph, names = subject, [site.name for site in sites if site.reason is None]
        reasons = [f"{site.name}: {site.reason}" for site in sites if site.reason]
    else:
        graph, names = subject.gm.graph, [guard.name for guard in subject.guards]
        reasons = [f"{outcome.site.name}: {outcome.reason}" for outcome in subject.outcomes if outcome.reason]
    assert len(names) == count, f"{len(names)} sites ({', '.join(names)}), not {count}; refused: {reasons or 'none'}"
    targets = {node.target for node in graph.nodes}
    assert targets.issuperset(present), f"not in the graph: {set(present) - targets}"
    assert targets.isdisjoint(absent), f"still in the graph: {targets & set(absent)}"


def assert_plan_roundtrip(plan: Plan, run: Callable[[Plan], Tensor] | None = None) -> None:
    """Asserts that saving and loading preserves a plan bit for bit.

    Args:
        plan: any plan.
        run: computes an output under a plan; it must be the same under the loaded plan.

    Raises:
        AssertionError: something changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.safetensors")
        plan.save(path)
        loaded = Plan.load(path)
    assert contents(loaded) == contents(plan), "the loaded plan differs from the saved one"
    if run is not None:
        assert torch.equal(run(loaded), run(plan)), "the loaded plan runs differently from the saved one"


def contents(plan: Plan) -> list[Any]:
    """Contents of a plan as plain values: tensors as bits, floats as digits because -0.0 equals 0.0."""
    entries = [
        {f.name: repr(getattr(site, f.name)) for f in fields(site) if f.name != "tensors"}
        | ({"tensors": {n: _bits(t) for n, t in site.tensors.items()}} if isinstance(site, SitePlan) else {})
        for site in plan.sites
    ]
    return [repr(asdict(plan.config)), *entries]


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_error_within(
    certificate: SitePlan | float,
    actual: Float[Tensor, "*batch d_out"],
    expected: Float[Tensor, "*batch d_out"],
    *,
    slack: float = 0.02,
) -> None:
    """Asserts that the error of a rewritten site does not exceed the error in its plan.

    Args:
        certificate: a site's plan with an ``error``, or the relative root-mean-square error itself.
        actual: outputs of the rewritten site.
        expected: outputs of the original site.
        slack: share by which the error may be exceeded; 0.02 allows for rounding on the tokens of the measurement.

    Raises:
        AssertionError: the error is greater, or an output is NaN or infinite.
    """
    reported = certificate if isinstance(certificate, (int, float)) else certificate.error
    assert torch.isfinite(actual).all(), "the output holds NaN or infinity"
    error, rounding = relative_error(actual, expected), TOLERANCES.get(expected.dtype, 0.0)
    limit = reported * (1 + slack) + rounding
    assert error <= limit, f"the relative error is {error:.4g}, more than the reported {reported:.4g}"
