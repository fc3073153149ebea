"""``tardis_fx.explain``: reports how a plan rewrites every FFN of a model, and its linear layers, or why not."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tardis_fx.graph.site import Site, SiteWeights, is_released
from tardis_fx.graph.subclasses import stored_tensors
from tardis_fx.live import profiles as live
from tardis_fx.observation.batches import Batch
from tardis_fx.observation.capture import Capture, identity
from tardis_fx.passes import pipeline
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.passes.selection import Times, times_of
from tardis_fx.plan import KeptSite, Plan, Planned, SitePlan, bits_per_weight, resolve


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """Report on one FFN of a model, or on a linear layer outside of FFNs.

    Attributes:
        name: module path.
        kind: plain, gated or linear.
        activation: name in the registry, or None if it is not recognised.
        status: ``"rewritten"``; ``"refused"``; ``"original"`` if a compiled model of this process runs the original
            because it is faster; or, in a model compiled without a plan, ``"profiling"``.
        reason: why it is refused or runs the original, with both times, or the progress of its profile. For a rewritten
            site, the numbers of tokens for which the original is faster. Empty otherwise.
        method: name of the rewrite; empty for a site that is not rewritten.
        parts: what a token may read of the site and in how many bits a weight, if the rewrite says so.
        stored_bytes: weight bytes kept.
        touched_bytes: weight bytes read per decoded token, including expected corrections.
        dense_bytes: weight bytes of the original.
        weights: number of weights of the original, biases included.
        outlier_rate: share of (token, neuron) pairs on the calibration text that read the neuron's column of ``down``.
        error: relative root-mean-square error of the output on held-back calibration tokens.
    """

    name: str
    kind: str
    activation: str | None
    status: str
    reason: str = ""
    method: str = ""
    parts: str = ""
    stored_bytes: int
    touched_bytes: float
    dense_bytes: int
    weights: int
    outlier_rate: float = 0.0
    error: float = 0.0

    @property
    def touched_bits(self) -> float:
        """Bits read per decoded token for each weight of the original."""
        return bits_per_weight(self.touched_bytes, self.weights)

    @property
    def stored_bits(self) -> float:
        """Bits kept for each weight of the original."""
        return bits_per_weight(self.stored_bytes, self.weights)


@dataclass(frozen=True)
class Report:
    """Report on every FFN of a model and, if the plan has ``linear_bits``, on its other linear layers.

    As text, each FFN has a row, and linear layers in equally many bits share a line.

    Attributes:
        sites: the FFNs of each graph in the order in which they run, then its linear layers.
        missing: names of sites that are in the plan but not in the model.
    """

    sites: tuple[SiteReport, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def from_plan(cls, plan: Plan) -> "Report":
        """Reports on the sites of a plan without a model."""
        return cls(tuple(_planned(site) for site in plan.sites))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        head = ["site", "kind", "activation", "status", "touched", "of dense", "bits/weight", "stored", "bits/weight"]
        head += ["outliers", "error", "method"]
        ffns = [site for site in self.sites if site.kind != "linear"]
        rows = [head, *(_row(site) for site in ffns)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        touched, stored, dense, weights = (
            sum(getattr(site, name) for site in ffns)
            for name in ("touched_bytes", "stored_bytes", "dense_bytes", "weights")
        )
        rewritten = sum(site.status == "rewritten" for site in ffns)
        lines.append(
            f"{rewritten} of {len(ffns)} sites rewritten; "
            f"{touched / max(1, dense):.1%} of the FFN weight bytes touched per token, "
            f"{bits_per_weight(touched, weights):.3g} bits per weight ({bits_per_weight(stored, weights):.3g} stored)"
        )
        lines += _linear_lines([site for site in self.sites if site.kind == "linear"])
        lines += [f"in the plan, not in the model: {name}" for name in self.missing]
        return "\n".join(lines)


def _linear_lines(layers: Sequence[SiteReport]) -> list[str]:
    """A line for all linear layers with equal parts, and one for each that is not rewritten."""
    lines = []
    coded = [layer for layer in layers if layer.status == "rewritten"]
    for parts in dict.fromkeys(layer.parts for layer in coded):
        alike = [layer for layer in coded if layer.parts == parts]
        touched, dense = (sum(getattr(layer, name) for layer in alike) for name in ("touched_bytes", "dense_bytes"))
        worst = max(alike, key=lambda layer: layer.error)
        count = f"{len(alike)} linear layers" if len(alike) > 1 else "1 linear layer"
        lines.append(
            f"{count} in {parts}: {touched / 1e6:.3g} of {dense / 1e6:.3g} MB touched per token, "
            f"{touched / max(1, dense):.1%}; largest error {worst.error:.3f}, at {worst.name}"
        )
    left = [layer for layer in layers if layer.status != "rewritten"]
    return [*lines, *(f"linear layer {layer.name} is left as it is: {layer.reason}" for layer in left)]


def _row(site: SiteReport) -> list[str]:
    numbers = [
        f"{site.touched_bytes / 1e6:.3g} MB",
        f"{site.touched_bytes / max(1, site.dense_bytes):.1%}",
        f"{site.touched_bits:.3g}",
        f"{site.stored_bytes / 1e6:.3g} MB",
        f"{site.stored_bits:.3g}",
    ]
    measured = [f"{site.outlier_rate:.1%}", f"{site.error:.3f}"] if site.status == "rewritten" else ["-", "-"]
    method = "; ".join(filter(None, (f"{site.method}: {site.parts}" if site.parts else site.method, site.reason)))
    return [site.name, site.kind, site.activation or "unknown", site.status, *numbers, *measured, method]


@torch.inference_mode(mode=False)
def explain(model: nn.Module, plan: Plan | str | os.PathLike[str] | None, example: Batch) -> Report:
    """Runs a model once through the capture that compilation uses and reports every FFN, and its linear layers.

    Args:
        model: the model, compiled or not.
        plan: a plan, the path of its file, or None for a model that was compiled without a plan.
        example: a tensor, the model's first argument, or a dict of keyword arguments.

    Raises:
        PlanFileError: the plan's file cannot be read.
        CalibrationError: the example is neither a tensor nor a dict.
    """
    loaded = live.fitted() if plan is None else resolve(plan)
    model = getattr(model, "_orig_mod", model)
    fingerprints: set[str] = set()
    reports: dict[tuple[str, Hashable], SiteReport] = {}

    def observe(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        for outcome in pipeline.outcomes(gm, example_inputs, loaded):
            site, entry = outcome.site, outcome.plan
            if entry:
                fingerprints.add(entry.fingerprint)
            weights = stored_tensors(v for p in site.parameters if isinstance(v := values.get(p), Tensor))
            if isinstance(entry, SitePlan) and not outcome.reason:
                report = _timed(entry, times_of(entry))
                if report.status == "rewritten" and not all(
                    weight.is_contiguous() for weight in weights
                ):  # may be released
                    report = replace(report, stored_bytes=min(report.stored_bytes, _stored(site, entry, weights)))
            else:
                dense = sum(weight.numel() * weight.element_size() for weight in weights)
                count = sum(weight.numel() for weight in weights)
                report = _refused(site.name, site.kind, site.activation, outcome.reason, dense, count)
            if plan is None and entry is None and (stage := live.stage_of(weights, site.function)):
                report = replace(report, status="profiling", reason=stage)
            reports.setdefault((site.name, identity(weights, site.function)), replace(report, name=site.name))
        return gm.forward

    Capture(model, observe, linear=loaded.config.linear_bits is not None)(example)
    missing = [entry.name for entry in loaded.sites if plan is not None and entry.fingerprint not in fingerprints]
    return Report(tuple(reports.values()), tuple(missing))


def _stored(site: Site, entry: SitePlan, weights: Sequence[Tensor]) -> int:
    """Bytes of the weights that are not released, and of constants that do not share their memory."""
    constants = rewrite_named(entry.method).constants(entry, SiteWeights.from_site(site, weights)).values()
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    remaining = sum(weight.nbytes for weight in weights if not is_released(weight))
    return remaining + sum(c.nbytes for c in constants if c.untyped_storage().data_ptr() not in storages)


def _planned(entry: Planned) -> SiteReport:
    if isinstance(entry, KeptSite):
        return _refused(entry.name, entry.kind, entry.activation, entry.reason, entry.dense_bytes, entry.weights)
    names = [field.name for field in fields(SiteReport) if field.name not in ("status", "reason", "parts")]
    parts = rewrite_named(entry.method).parts(entry)
    return SiteReport(status="rewritten", parts=parts, **{name: getattr(entry, name) for name in names})


def _timed(entry: SitePlan, times: Sequence[Times]) -> SiteReport:
    """Report on a planned site whose forms were timed for some numbers of tokens."""
    reason = "; ".join(str(taken) for taken in times if not taken.pays)
    if not reason or any(taken.pays for taken in times):
        return replace(_planned(entry), reason=reason)
    return replace(_planned(entry.kept(reason)), status="original")


def _refused(name: str, kind: str, activation: str | None, reason: str | None, dense: int, weights: int) -> SiteReport:
    return SiteReport(
        name=name,
        kind=kind,
        activation=activation,
        status="refused",
        reason=reason or "",
        stored_bytes=dense,
        touched_bytes=dense,
        dense_bytes=dense,
        weights=weights,
    )
