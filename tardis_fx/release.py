"""``tardis_fx.release``: the memory of weights that a rewritten model does not read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.fingerprint import fingerprint, remember
from tardis_fx.graph.capture import Capture
from tardis_fx.graph.site import SiteWeights, is_released
from tardis_fx.passes import pipeline
from tardis_fx.passes.base import rewrite_named
from tardis_fx.plan import resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import fx, nn

    from tardis_fx.calibration.observe import Batch
    from tardis_fx.graph.site import Site
    from tardis_fx.plan import Plan, SitePlan

_log = logging.getLogger("tardis_fx")


@torch.no_grad()
def release(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    example: Batch,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> int:
    """Frees the memory of FFN matrices whose place a plan's tensors have taken; to be called before compiling.

    Without a folder the matrices are gone: each becomes one NaN in its old shape, and whatever still reads it shows.
    Only matrices that nothing but their FFN reads go, where the rewrite makes its tensors of the plan alone: rows of
    ``row_bits`` below 16. The model must then be compiled with ``prefill="rewritten"``; it is recognised as before.

    With a folder each matrix is written to a file there and mapped from it: pages that nothing reads leave the memory
    when it is short, and prefill with the original weights stays possible. On a CPU only.

    Args:
        model: in eval mode, not compiled yet; changed in place.
        plan: made for it, or the path of its file.
        example: a tensor, the model's first argument, or a dict of keyword arguments.
        folder: where the weights are kept, or None.

    Returns:
        Bytes freed.

    Raises:
        PlanFileError: the plan's file cannot be read.
        PlanMismatchError: the plan fits none of the model's sites.
        OSError: a file cannot be written.
    """
    loaded = resolve(plan)
    found: dict[str, tuple[Site, SitePlan, list[Tensor]]] = {}
    shared: set[int] = set()

    def collect(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        forward = gm.forward
        outcomes = pipeline.outcomes(gm, example_inputs, loaded)
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        for outcome in outcomes:
            if outcome.plan is not None and not outcome.reason:
                weights = [values[node] for node in outcome.site.parameters]
                found[outcome.plan.fingerprint] = outcome.site, outcome.plan, weights
                own = {*outcome.site.inner, outcome.site.output}
                shared.update(id(values[node]) for node in outcome.site.parameters if not own.issuperset(node.users))
            else:
                shared.update(id(values[node]) for node in outcome.site.parameters if node in values)
        return forward

    Capture(model, collect)(example)
    if not found:
        raise PlanMismatchError("the plan fits none of the model's sites: nothing to release")
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    shared.update(address for address in names if names.count(address) > 1)
    freed = 0
    for site, entry, weights in found.values():
        matrices = [w for w in weights if w.dim() == 2 and id(w) not in shared and not is_released(w)]
        if folder is None and not _stands_alone(site, entry, weights, matrices):
            _log.warning("%s keeps its weights: %s reads them", entry.name, entry.method)
            continue
        identity = fingerprint(weights, site.activation)
        for matrix in matrices:
            freed += matrix.untyped_storage().nbytes()
            matrix.data = _nothing(matrix) if folder is None else _mapped(matrix, Path(folder))
        remember(weights, site.activation, identity)
    return freed


def _stands_alone(site: Site, entry: SitePlan, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> bool:
    """Whether a rewrite makes the same constants without these matrices."""
    rewrite, gone = rewrite_named(str(entry.method)), {id(matrix) for matrix in matrices}
    without = [_nothing(w) if id(w) in gone else w for w in weights]
    made = [rewrite.constants(entry, SiteWeights.of(site, each)) for each in (weights, without)]
    return all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def _nothing(matrix: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)


def _mapped(matrix: Tensor, folder: Path) -> Tensor:
    """The matrix from a file that is mapped into memory."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fingerprint([matrix], None)}.bin"
    matrix.detach().contiguous().view(torch.uint8).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=True, size=matrix.numel(), dtype=matrix.dtype)
    return mapped.view(matrix.shape)
