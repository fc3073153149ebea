"""Applies a plan to a graph: matches, rewrites every planned site, and returns the outcome of each."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from tardis_fx.config import Prefill
from tardis_fx.errors import PlanMismatchError, StaleWeightError
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site, SiteWeights, is_released
from tardis_fx.graph.subclasses import stored_tensors
from tardis_fx.graph.surgery import add_input, copy, replace
from tardis_fx.graph.symbols import pinned_between
from tardis_fx.graph.unfuse import unfuse
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.entry import check_entry, check_site
from tardis_fx.passes.exact_fold import ExactFold
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.passes.site_timing import Candidate
from tardis_fx.passes.weight_guard import SiteGuard, refuse_released
from tardis_fx.plan import KeptSite, Plan, Planned, SitePlan
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis, which take_fold looks for
from tardis_fx.runtime.correction import MOST_TOKENS
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.fingerprint import fingerprint

_FOLD = ExactFold()
_HINT = "compile with prefill='rewritten'"


def decode_tokens(device: torch.device, rewrite: Rewrite) -> int:
    """Tokens of a step that still counts as decoding on a device: it is rewritten under ``prefill="original"``."""
    return MOST_TOKENS if device.type == "cuda" else rewrite.decode_tokens


@dataclass(frozen=True)
class Outcome:
    """The outcome of applying a plan at one site.

    Attributes:
        site: as matched.
        plan: its entry in the plan, or None.
        reason: why it cannot be rewritten, or None.
    """

    site: Site
    plan: Planned | None
    reason: str | None

    @property
    def fits(self) -> bool:
        """Whether the graph allows the site to be rewritten."""
        return self.site.reason is None


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph with its guards and constants; the result of :func:`apply`.

    Attributes:
        gm: the rewritten graph, or the original graph if nothing was rewritten.
        outcomes: one for each site, in the order of the graph.
        guards: of the rewritten sites.
        constants: for the example inputs' weights, to be passed after the graph's other inputs.
    """

    gm: fx.GraphModule
    outcomes: tuple[Outcome, ...]
    guards: tuple[SiteGuard, ...]
    constants: tuple[Tensor, ...]

    @property
    def modified(self) -> bool:
        """Whether any site was rewritten."""
        return bool(self.guards)


def apply(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    plan: Plan,
    prefill: Prefill,
    select: Callable[[Sequence[Candidate], Sequence[Any]], Sequence[bool]] | None = None,
) -> Rewritten:
    """Rewrites the planned sites in a copy of a graph.

    Under ``prefill="original"`` a graph for steps of many tokens keeps its sites. If the number of tokens is symbolic,
    comparing it makes Dynamo compile the two cases separately.

    Args:
        gm: a Dynamo graph module.
        example_inputs: inputs of the next call.
        plan: to apply.
        prefill: selects the steps that are rewritten.
        select: tells which of the sites in a step of few tokens are rewritten, given the inputs; None rewrites all. It
            is not asked about sites whose weights were released.

    Raises:
        PlanMismatchError: a site would not be rewritten although its weights were released.
    """
    original, gm = gm, copy(gm)
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    results = [_refuse_mixed(outcome, prefill) for outcome in outcomes(gm, example_inputs, plan)]
    candidates: list[Candidate] = []
    for outcome in results:
        site, entry = outcome.site, outcome.plan
        rewrite = rewrite_named(entry.method) if isinstance(entry, SitePlan) and not outcome.reason else None
        positions = [position[node] for node in site.parameters if node in position]
        weights = [example_inputs[p] for p in positions]
        if rewrite is None or not isinstance(entry, SitePlan) or _stays(site, rewrite, weights, prefill):
            refuse_released(site.name, weights, outcome.reason or _HINT)
            continue
        guard = SiteGuard(site, tuple(positions), entry, partial(_find, plan), rewrite)
        few = prefill == "original" and weights[0].device.type == "cpu"  # a step of few tokens
        made = guard.constants(entry, weights)
        candidates.append(Candidate(guard, weights, made, partial(_forward, rewrite, entry, few)))
    if select is not None:
        timed = [c for c in candidates if _decodes(c, prefill) and not any(map(is_released, c.weights))]
        chosen = dict(zip(map(id, timed), select(timed, example_inputs), strict=True))
        candidates = [candidate for candidate in candidates if chosen.get(id(candidate), True)]
    guards = [candidate.guard for candidate in candidates]
    constants: list[Tensor] = []
    moved: dict[fx.Node, fx.Node] = {}  # outputs of sites that feed another site
    for i, (guard, _, made, forward) in enumerate(candidates):
        site, tensors = guard.site, made.tensors
        inputs = {name: add_input(gm.graph, f"tardis_{i}_{name}", value) for name, value in tensors.items()}
        moved[site.output] = replace(gm.graph, site, moved.get(site.input, site.input), forward, inputs)
        constants += tensors.values()
    if guards:
        gm.graph.lint()
        gm.recompile()
    return Rewritten(gm if guards else original, tuple(results), tuple(guards), tuple(constants))


def _refuse_mixed(outcome: Outcome, prefill: Prefill) -> Outcome:
    """The outcome, refused if one graph must serve steps of both few and many tokens."""
    site, entry = outcome.site, outcome.plan
    if prefill != "original" or outcome.reason or not isinstance(entry, SitePlan):
        return outcome
    rewrite = rewrite_named(entry.method)
    if rewrite.exact:
        return outcome
    most = decode_tokens(site.input.meta["example_value"].device, rewrite)
    if not pinned_between(_tokens(site), most):
        return outcome
    reason = f"mark_dynamic promises one graph for up to and for more than {most} tokens: {_HINT}"
    return dataclasses.replace(outcome, reason=reason)


def _stays(site: Site, rewrite: Rewrite, weights: Sequence[Tensor], prefill: Prefill) -> bool:
    """Whether a step with the site's number of tokens runs the original."""
    return (
        not rewrite.exact and prefill == "original" and bool(_tokens(site) > decode_tokens(weights[0].device, rewrite))
    )


def _decodes(candidate: Candidate, prefill: Prefill) -> bool:
    """Whether a step of few tokens runs a site; not for a number that is symbolic and that nothing has compared yet."""
    guard, tokens = candidate.guard, _tokens(candidate.guard.site)
    compared = isinstance(tokens, int) or (prefill == "original" and not guard.rewrite.exact)
    return compared and bool(tokens <= decode_tokens(candidate.weights[0].device, guard.rewrite))


def _find(plan: Plan, site: Site, weights: Sequence[Tensor]) -> Planned | None:
    entry = plan.find(fingerprint(weights, site.function))
    if isinstance(entry, KeptSite):
        return entry
    fold = _FOLD.unaided(site, weights)
    if fold is None and entry is not None:
        check_site(entry, site, weights)
        check_entry(entry, SiteWeights.from_site(site, weights))
        if entry.method == _FOLD.name:  # another graph showed bounds of the input that made it affine
            return entry.kept("its input does not have the bounds in this graph that made it affine")
    return fold or entry


def _forward(rewrite: Rewrite, plan: SitePlan, few: bool, x: Any, constants: Mapping[str, Any]) -> Any:
    """The proxy of the rewritten site; for ``few`` tokens on a CPU, the op multiplies with the folded weight."""
    result: Any = rewrite.forward(x, constants, plan)
    if few:
        cpu.take_fold(result.node)
    return result


def outcomes(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan) -> list[Outcome]:
    """All sites of a graph with their entries in a plan; unfuses the graph's fused encoder layers.

    Linear layers outside of FFNs are sites if the plan was made with ``linear_bits``.
    """
    unfuse(gm.graph)
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    sites = find_sites(gm.graph, linear=plan.config.linear_bits is not None)
    return [_outcome(site, [values[p] for p in site.parameters if p in values], plan) for site in sites]


def _outcome(site: Site, weights: list[Tensor], plan: Plan) -> Outcome:
    if any(is_fake(weight) or weight.is_meta for weight in weights):
        site = site.refused("its weights have no values")
        return Outcome(site, None, site.reason)
    if any(weight.is_inference() for weight in weights):
        site = site.refused("its weights are inference tensors, whose changes cannot be detected")
    if site.reason is not None:
        return Outcome(site, plan.find(fingerprint(stored_tensors(weights), site.function)), site.reason)
    entry = _find(plan, site, weights)
    if entry is None:
        return Outcome(site, None, _mismatch(weights, plan))
    return Outcome(site, entry, entry.reason if isinstance(entry, KeptSite) else None)


def _mismatch(weights: list[Tensor], plan: Plan) -> str:
    """Why no entry of a plan has these weights."""
    shapes = tuple(tuple(weight.shape) for weight in weights)
    alike = [entry for entry in plan.sites if entry.shapes == shapes]
    dtypes = {entry.dtype for entry in alike}
    if alike and str(weights[0].dtype) not in dtypes:
        return f"the plan was made for {' and '.join(sorted(dtypes))} weights, but these are {weights[0].dtype}"
    if alike:
        return "its weights changed since calibration, or belong to another model"
    return "the plan has no site of these shapes"


def check(outcomes: Sequence[Outcome], plan: Plan, *, strict: bool, lenient: bool = False) -> list[Outcome]:
    """Returns the sites that should have been rewritten but were not; ``lenient`` allows weights unknown to the plan.

    Raises:
        PlanMismatchError: the plan has no entry for any of the graph's sites, or ``strict`` and a site was skipped.
        StaleWeightError: the plan has a site of this name, but with other weights.
    """
    unplanned = [o for o in outcomes if o.plan is None and o.fits]
    refused = [o for o in outcomes if o.reason]
    if unplanned and not lenient and not any(o.plan in plan.sites for o in outcomes):
        raise PlanMismatchError(f"the plan fits none of the model's sites: {_listed(unplanned)}")
    planned = {entry.name for entry in plan.sites}
    if not lenient and (stale := [o for o in unplanned if o.site.name in planned]):
        raise StaleWeightError(f"weights are not those that the plan was made for: {_listed(stale)}")
    if strict and refused:
        raise PlanMismatchError(f"strict, but not every site is rewritten: {_listed(refused)}")
    return refused


def _listed(outcomes: Sequence[Outcome]) -> str:
    shown = [f"{o.site.name}: {o.reason}" for o in outcomes[:4]]
    return "; ".join(shown) + (f"; and {len(outcomes) - 4} more" if len(outcomes) > 4 else "")


def _tokens(site: Site) -> torch.SymInt | int:
    shape: torch.Size = site.input.meta["example_value"].shape
    return math.prod(shape[:-1])
