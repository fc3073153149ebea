"""Assertions about rewrites: outputs, graphs, plan files, and the errors that plans tell."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tardis_fx.graph.matcher import find_sites
from tardis_fx.passes import pipeline
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.testing.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.passes.pipeline import Rewritten

#: Norm of a difference over the norm of the result, at which two ways to compute one thing still agree.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def assert_equivalent(found: Tensor, wanted: Tensor, *, tolerance: float | None = None) -> None:
    """Both have the same shape, dtype and, to rounding, values.

    Args:
        found: any shape.
        wanted: what it must be.
        tolerance: norm of the difference over that of ``wanted``; None takes the dtype's from :data:`TOLERANCES`.

    Raises:
        AssertionError: they differ, or hold NaN or infinity.
    """
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{found.dtype}, not {wanted.dtype}"
    assert torch.isfinite(found).all(), "NaN or infinity"
    allowed = TOLERANCES.get(wanted.dtype, 0.0) if tolerance is None else tolerance
    error = relative_error(found, wanted)
    assert error <= allowed, f"relative error {error:.3g}, more than {allowed:.3g}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``; both of one shape."""
    missed, whole = (float(t.double().norm()) for t in (found.double() - wanted.double(), wanted))
    return missed / whole if whole else (math.inf if missed else 0.0)


def rewritten(model: nn.Module, inputs: Tensor, plan: Plan) -> Rewritten:
    """The graph that the backend makes of a model's under a plan, every step rewritten.

    Args:
        model: in eval mode; Dynamo must make one graph of it.
        inputs: its argument.
        plan: of this model.
    """
    captured = capture(model, inputs)
    with torch.no_grad():
        return pipeline.apply(captured.gm, captured.inputs, plan, "rewritten")


def assert_matches(
    subject: fx.Graph | Rewritten, *, count: int, present: Sequence[Any] = (), absent: Sequence[Any] = ()
) -> None:
    """So many sites are there, and operations are or are not.

    Args:
        subject: a graph as Dynamo gives it, of which the sites that may be rewritten are counted; or what
            :func:`rewritten` returns, of which the sites that were.
        count: of the sites.
        present: targets of nodes that the graph must hold: functions, or names of methods.
        absent: targets that it must not hold.

    Raises:
        AssertionError: one of these does not hold.
    """
    if isinstance(subject, fx.Graph):
        with torch.no_grad():
            sites = find_sites(subject)
        graph, found = subject, [site.name for site in sites if site.reason is None]
        reasons = [f"{site.name}: {site.reason}" for site in sites if site.reason]
    else:
        graph, found = subject.gm.graph, [guard.name for guard in subject.guards]
        reasons = [f"{outcome.site.name}: {outcome.reason}" for outcome in subject.outcomes if outcome.reason]
    assert len(found) == count, f"{len(found)} sites ({', '.join(found)}), not {count}; refused: {reasons or 'none'}"
    targets = {node.target for node in graph.nodes}
    missing = [target for target in present if target not in targets]
    assert not missing, f"not in the graph: {missing}"
    left = [target for target in absent if target in targets]
    assert not left, f"still in the graph: {left}"


def assert_plan_roundtrip(plan: Plan, run: Callable[[Plan], Tensor] | None = None) -> None:
    """A plan comes back from its file bit for bit.

    Args:
        plan: any plan.
        run: an output under a plan, which must be the same under the plan that was read.

    Raises:
        AssertionError: something changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.safetensors")
        plan.save(path)
        again = Plan.load(path)
    assert contents(again) == contents(plan), "the plan is not what was saved"
    if run is not None:
        assert torch.equal(run(again), run(plan)), "the plan runs differently after it was saved"


def contents(plan: Plan) -> list[Any]:
    """All of a plan as plain values, tensors by their bits; floats by their digits, for -0.0 equals 0.0."""
    entries = [
        {f.name: repr(getattr(site, f.name)) for f in fields(site) if f.name != "tensors"}
        | ({"tensors": {n: _bits(t) for n, t in site.tensors.items()}} if isinstance(site, SitePlan) else {})
        for site in plan.sites
    ]
    return [repr(asdict(plan.config)), *entries]


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_error_within(certificate: SitePlan | float, found: Tensor, wanted: Tensor, *, slack: float = 0.02) -> None:
    """A rewritten site errs no more than its plan tells.

    Args:
        certificate: a site's plan, whose ``error`` it is, or the error itself: of the root mean square, relative.
        found: the rewritten site's outputs, [..., d_out].
        wanted: the original's.
        slack: by what share the error may be exceeded; 0.02 is for the tokens that it was measured on, to rounding.

    Raises:
        AssertionError: the error is greater, or an output is NaN or infinite.
    """
    told = certificate if isinstance(certificate, (int, float)) else certificate.error
    assert torch.isfinite(found).all(), "NaN or infinity"
    error, rounding = relative_error(found, wanted), TOLERANCES.get(wanted.dtype, 0.0)
    assert error <= told * (1 + slack) + rounding, f"relative error {error:.4g}, more than the {told:.4g} told"
