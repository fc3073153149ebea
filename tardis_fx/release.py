"""``tardis_fx.release``: the memory of weights that a rewritten model does not read."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tardis_fx.digest import digest
from tardis_fx.errors import ConfigError, PlanMismatchError
from tardis_fx.fingerprint import fingerprint, remember
from tardis_fx.graph.capture import Capture
from tardis_fx.graph.site import SiteWeights, is_released
from tardis_fx.passes import pipeline
from tardis_fx.passes.base import rewrite_named
from tardis_fx.plan import resolve

if TYPE_CHECKING:
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
    Where corrections read the original weights the matrices stay, and W2, of which the rewrite would make a transposed
    copy, becomes a view of that copy, with the values and the shape that it had.

    With a folder each matrix is written to a file there and mapped from it: pages that nothing reads leave the memory
    when it is short, and prefill with the original weights stays possible. On a CPU only.

    Args:
        model: in eval mode, not compiled yet; changed in place.
        plan: made for it, or the path of its file.
        example: a tensor, the model's first argument, or a dict of keyword arguments.
        folder: where the weights are kept, or None.

    Returns:
        Bytes freed, or not taken when the model is compiled.

    Raises:
        ConfigError: a folder for a model that is not on a CPU.
        PlanFileError: the plan's file cannot be read.
        PlanMismatchError: the plan fits none of the model's sites.
        OSError: a file cannot be written.
    """
    loaded = resolve(plan)
    if folder is not None and any(p.device.type != "cpu" for p in model.parameters()):
        raise ConfigError("folder: weights are mapped on a CPU only, and the model is elsewhere")
    found: dict[tuple[int, ...], tuple[Site, SitePlan, list[Tensor]]] = {}
    elsewhere: set[int] = set()  # storages of what something but an FFN of the plan reads

    def collect(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        forward = gm.forward
        outcomes = pipeline.outcomes(gm, example_inputs, loaded)
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        for outcome in outcomes:
            site = outcome.site
            own = {*site.inner, site.output} if outcome.plan is not None and not outcome.reason else set()
            elsewhere.update(
                _storage(values[p]) for p in site.parameters if p in values and not own.issuperset(p.users)
            )
            if own and outcome.plan is not None:
                weights = [values[node] for node in site.parameters]
                found[tuple(map(id, weights))] = site, outcome.plan, weights
        return forward

    Capture(model, collect)(example)
    if not found:
        raise PlanMismatchError("the plan fits none of the model's sites: nothing to release")
    held = Counter(map(_storage, (p for _, p in model.named_parameters(remove_duplicate=False))))
    elsewhere.update(storage for storage, count in held.items() if count > 1)
    freed = 0
    for site, entry, weights in found.values():
        matrices = [w for w in weights if w.dim() == 2 and _storage(w) not in elsewhere and not is_released(w)]
        identity = fingerprint(weights, site.function)
        if folder is None and not _stands_alone(site, entry, weights, matrices):
            if not (shared := _share(site, entry, weights, matrices)):
                _log.warning("%s keeps its weights: %s reads them", entry.name, entry.method)
            freed += shared
            remember(weights, site.function, identity)
            continue
        for matrix in matrices:
            freed += matrix.untyped_storage().nbytes()
            matrix.data = _nothing(matrix) if folder is None else _mapped(matrix, Path(folder))
        remember(weights, site.function, identity)
    return freed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stands_alone(site: Site, entry: SitePlan, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> bool:
    """Whether a rewrite makes the same constants without these matrices."""
    rewrite, gone = rewrite_named(str(entry.method)), {id(matrix) for matrix in matrices}
    without = [_nothing(w) if id(w) in gone else w for w in weights]
    made = [rewrite.constants(entry, SiteWeights.of(site, each)) for each in (weights, without)]
    return all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def _share(site: Site, entry: SitePlan, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> int:
    """Makes matrices views of the transposed copies that a rewrite makes of them; the bytes of the copies."""
    copies = rewrite_named(str(entry.method)).constants(entry, SiteWeights.of(site, weights)).values()
    shared = 0
    for matrix in matrices:
        for copy in copies:
            if copy.shape == matrix.T.shape and _storage(copy) != _storage(matrix) and torch.equal(copy.T, matrix):
                matrix.data = copy.T
                shared += copy.nbytes
    return shared


def _nothing(matrix: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)


def _mapped(matrix: Tensor, folder: Path) -> Tensor:
    """The matrix from a file that is mapped into memory, privately; the file is shared by all that have its content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest(matrix)}.bin"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            written = Path(scratch, path.name)
            matrix.detach().contiguous().view(torch.uint8).numpy().tofile(written)
            os.replace(written, path)  # whoever has mapped an older file of this name keeps that
    mapped = torch.from_file(str(path), shared=False, size=matrix.numel(), dtype=matrix.dtype)
    return mapped.view(matrix.shape)
