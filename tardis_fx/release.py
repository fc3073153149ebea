"""``tardis_fx.release``: frees the memory of weights that a rewritten model does not read."""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, fx, nn

from tardis_fx.digest import digest
from tardis_fx.errors import ConfigError, PlanMismatchError
from tardis_fx.graph.site import Site, SiteWeights, is_released
from tardis_fx.observation.batches import Batch
from tardis_fx.observation.capture import Capture
from tardis_fx.passes import pipeline
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan, SitePlan, resolve
from tardis_fx.released import guard
from tardis_fx.resident import mapped_file, resident_bytes
from tardis_fx.runtime.fingerprint import fingerprint, remember

_log = logging.getLogger("tardis_fx")

#: Number of freed bytes from which on a warning is logged if the process keeps them.
_NOTABLE = 2**26


@torch.inference_mode(mode=False)
@torch.no_grad()
def release(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    example: Batch,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> int:
    """Frees the memory of FFN matrices that a plan's tensors replace; to be called before compiling.

    Without a folder the matrices are discarded: each becomes one NaN expanded to its shape. ``state_dict()``, and so
    ``save_pretrained`` and other ways to write a checkpoint, pickling, copying and an uncompiled call of the model then
    raise :class:`tardis_fx.errors.ReleasedWeightError`; ``load_state_dict()`` restores values. Only code that reads a
    weight directly, such as ``weight.detach().numpy()``, sees the NaN.
    A matrix is discarded only if nothing but its FFN reads it, and the rewrite makes its tensors from the plan alone:
    ``row_bits`` is below 16. The model must then be compiled with ``prefill="rewritten"``; it is recognised as before.
    If corrections read the original weights, the matrices stay; W2 becomes a view of the transposed copy that the
    rewrite needs, with the same values and shape.

    With a folder each matrix is written to a file there and mapped from it: unread pages leave the memory when it is
    short, and prefill with the original weights remains possible. This works on a CPU only. Files are named by a hash
    of their content; an existing file is reused if its content is the matrix, and otherwise rewritten. Do not truncate
    or delete the files while the model lives: the operating system kills a process that reads a missing page.

    The memory that the process returned is measured and logged together with the freed bytes. Matrices that were
    already mapped from a file, as some loaders do, are not counted, because the system could reclaim their pages
    anyway; a warning says so.

    Args:
        model: in eval mode, not yet compiled; changed in place.
        plan: made for the model, or the path of its file.
        example: a tensor, the model's first argument, or a dict of keyword arguments.
        folder: for the files of the weights, or None.

    Returns:
        Bytes freed, or saved when the model is compiled.

    Raises:
        ConfigError: a folder for a model that is not on a CPU.
        PlanFileError: the plan's file cannot be read.
        PlanMismatchError: the plan fits none of the model's sites.
        OSError: a file cannot be written.
    """
    loaded = resolve(plan)
    if folder is not None and any(p.device.type != "cpu" for p in model.parameters()):
        raise ConfigError("folder: weights can only be mapped on a CPU, but the model is on another device")
    planned, elsewhere = _find(model, loaded, example)
    if not planned:
        raise PlanMismatchError("the plan fits none of the model's sites: nothing to release")
    device = planned[0].weights[0].device
    before = resident_bytes(device)
    freed, shared, mapped = 0, 0, Counter[str]()
    for site, entry, weights in planned:
        present = [w for w in weights if w.dim() == 2 and not is_released(w)]
        matrices = [w for w in present if _storage(w) not in elsewhere]
        if len(matrices) < len(present):
            _log.warning("%s keeps weights that something else holds or reads, too", entry.name)
        identity = fingerprint(weights, site.function)
        if folder is None and not _stands_alone(site, entry, weights, matrices):
            if not (copies := _share(site, entry, weights, matrices)):
                _log.warning("%s keeps its weights: %s reads them", entry.name, entry.method)
            shared += copies
            remember(weights, site.function, identity)
            continue
        for matrix in matrices:
            size = matrix.untyped_storage().nbytes()
            if file := mapped_file(matrix):
                mapped[file] += size
            else:
                freed += size
            matrix.data = _nan_like(matrix) if folder is None else _mapped(matrix, Path(folder))
        if folder is None:
            guard(model, matrices)
        remember(weights, site.function, identity)
    after = resident_bytes(device)
    _log_freed(freed, shared, mapped, None if before is None or after is None else before - after)
    return freed + shared


class _Planned(NamedTuple):
    """A site that the plan rewrites, with the model's weights."""

    site: Site
    entry: SitePlan
    weights: list[Tensor]


def _find(model: nn.Module, plan: Plan, example: Batch) -> tuple[list[_Planned], set[int]]:
    """The planned sites of a model, and the storages that anything besides a single site reads or holds."""
    sites: dict[tuple[Any, ...], _Planned] = {}
    elsewhere: set[int] = set()

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        inside: set[fx.Node] = set()
        for site, entry, reason in ((o.site, o.plan, o.reason) for o in pipeline.outcomes(gm, example_inputs, plan)):
            if isinstance(entry, SitePlan) and not reason:
                inside |= {*site.inner, site.output}
                weights = [values[node] for node in site.parameters]
                sites[site.function, *map(id, weights)] = _Planned(site, entry, weights)
        tensors = ((node, value) for node, value in values.items() if isinstance(value, Tensor))
        elsewhere.update(_storage(value) for node, value in tensors if not inside.issuperset(node.users))
        return gm.forward

    Capture(model, collect, linear=plan.config.linear_bits is not None)(example)
    holders = Counter(
        _storage(tensor)
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    readers = Counter(_storage(w) for planned in sites.values() for w in planned.weights)
    elsewhere.update(storage for count in (holders, readers) for storage, n in count.items() if n > 1)
    return list(sites.values()), elsewhere


def _log_freed(freed: int, shared: int, mapped: Counter[str], measured: int | None) -> None:
    """Logs the bytes freed and the bytes that the process returned, which may be unknown."""
    returned = "unknown on this system" if measured is None else f"{measured:,} bytes"
    _log.info(
        f"released {freed:,} bytes of weights, and compiling the model will take {shared:,} bytes less; "
        f"returned by the process, as measured: {returned}"
    )
    if measured is not None and measured < freed / 2 and freed >= _NOTABLE:
        _log.warning(
            f"released {freed:,} bytes of weights, but the process returned {returned}: something else holds them, "
            "such as a state dict or another model, or the allocator keeps the memory for later"
        )
    for file, size in mapped.items():
        _log.warning(
            f"{size:,} bytes of weights were mapped from {file}: the system could already reclaim their memory, so "
            "nothing is freed"
        )


def _storage(tensor: Tensor) -> int:
    """Key of a tensor's memory; a unique negative number for a tensor subclass, which has no memory of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return tensor.untyped_storage().data_ptr() if plain else -id(tensor)


def _stands_alone(site: Site, entry: SitePlan, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> bool:
    """Whether a rewrite makes the same constants without the values of these matrices."""
    rewrite, ids = rewrite_named(entry.method), {id(matrix) for matrix in matrices}
    without = [_nan_like(w) if id(w) in ids else w for w in weights]
    before, after = (rewrite.constants(entry, SiteWeights.from_site(site, w)) for w in (weights, without))
    return all(torch.equal(before[name], after[name]) for name in before)


def _share(site: Site, entry: SitePlan, weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> int:
    """Makes matrices views of the transposed copies that a rewrite needs, and returns the bytes of the copies."""
    copies = rewrite_named(entry.method).constants(entry, SiteWeights.from_site(site, weights)).values()
    shared = 0
    for matrix in matrices:
        for copy in copies:
            if copy.shape == matrix.T.shape and _storage(copy) != _storage(matrix) and torch.equal(copy.T, matrix):
                matrix.data = copy.T
                shared += copy.nbytes
    return shared


def _nan_like(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return torch.full((), torch.nan, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)


def _mapped(matrix: Float[Tensor, "rows columns"], folder: Path) -> Float[Tensor, "rows columns"]:
    """The matrix, mapped privately from a file; matrices of equal content share the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest(matrix)}.bin"
    content = matrix.detach().contiguous().view(torch.uint8).flatten()
    if not _holds(path, content):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            written = Path(scratch, path.name)
            with written.open("wb") as file:
                content.numpy().tofile(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)  # processes that have mapped an older file of this name keep it
    mapped = torch.from_file(str(path), shared=False, size=matrix.numel(), dtype=matrix.dtype)
    return mapped.view(matrix.shape)


def _holds(path: Path, content: UInt8[Tensor, " bytes"]) -> bool:
    """Whether a file exists and holds exactly these bytes."""
    if not path.is_file() or path.stat().st_size != content.nbytes:
        return False
    return torch.equal(torch.from_file(str(path), shared=False, size=content.nbytes, dtype=torch.uint8), content)
