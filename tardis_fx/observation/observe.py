"""Runs the calibration batches through a model and shows every site's inputs to an observer."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from tqdm import tqdm

from tardis_fx.errors import CalibrationError, TardisError
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site, SiteWeights, is_freed
from tardis_fx.graph.subclasses import stored_tensors, subclass_name
from tardis_fx.graph.unfuse import unfuse
from tardis_fx.observation.batches import Batch, checked, first_rows, real_tokens, rows_of, uncompiled
from tardis_fx.observation.capture import Capture
from tardis_fx.observation.checkpoint import Checkpoint
from tardis_fx.observation.foreign import raising_typed
from tardis_fx.observation.merging import merge
from tardis_fx.observation.ranks import Ranks
from tardis_fx.observation.run import RepeatableObservation, Run, Seen
from tardis_fx.observation.site import ObservedSite, SiteObserver, fitted_tokens, thinned
from tardis_fx.runtime.fingerprint import fingerprint

_log = logging.getLogger("tardis_fx")

#: Most tokens that a run shows at a site, the same number of every batch; an encoder of speech has more.
MOST_TOKENS = 16384
#: Tokens of a batch that are never thinned out.
FEW_TOKENS = 512
#: Tokens of a trial at the site that sees the fewest; a batch with fewer is tried whole.
TRIAL_TOKENS = 512


class BatchObservation(RepeatableObservation):
    """A model with its calibration batches, and its sites in the order in which they run.

    The sites are found by running the first batch. Batches are kept in a list, because every run of a fit runs all of
    them; a site's inputs are never kept.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        progress: bool = True,
        ranks: Ranks | None = None,
        checkpoint: Checkpoint | None = None,
        linear: bool = False,
    ) -> None:
        """Captures the model and finds its sites.

        Args:
            model: in eval mode.
            batches: all batches, on every rank.
            progress: show progress bars.
            ranks: the processes that share the batches; None means this process alone.
            checkpoint: stores the statistics of the finished runs of one fit; given on at most one rank.
            linear: whether linear layers outside of FFNs are sites.

        Raises:
            CalibrationError: no batches, a model in training mode, or a model without an FFN with its own weights.
        """
        super().__init__(progress=progress)
        model = uncompiled(model)
        self._batches = checked(model, batches)
        self._ranks, self._checkpoint, self._runs = ranks or Ranks(), checkpoint, 0
        self._sites: dict[str, ObservedSite] = {}
        self._observers: Mapping[str, SiteObserver] = {}
        self._batch: Batch = self._batches[0]
        self._counts: dict[str, list[int]] = {}
        self._lengths = dict[str, int]()  # tokens at each FFN in the last batch that reached it
        self._seen: dict[str, Seen] = {}
        self._replaced: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._refused: list[str] = []  # names and reasons of sites without their own weights
        self._graphs = 0  # that have run in a call
        self._linear = linear
        self._capture = Capture(model, self._instrument, linear=linear)
        self._call(0)
        self._whole = self._graphs == 1  # one graph is the whole model
        self._fewest = max(1, min(self._lengths.values(), default=1))  # tokens of the first batch at any FFN
        self._refuse_absent()
        if not self._sites:
            raise CalibrationError(
                f"no feed-forward network of the model can be rewritten: {'; '.join(self._refused[:4])}"
                if self._refused
                else "the model has no feed-forward network that tardis_fx recognises"
            )

    @property
    def sites(self) -> list[ObservedSite]:
        """All sites, including refused ones."""
        return list(self._sites.values())

    def _shown(self, run: Run) -> dict[str, Any]:
        """Runs all batches once, each on one rank.

        Raises:
            CheckpointError: the checkpoint is damaged, belongs to another calibration, or cannot be written.
        """
        if run.moved is not None:
            return self._tried(run, run.moved)
        observers = {site.fingerprint: run.make(site) for site in run.sites}
        self._runs += 1
        checkpoint, contents = self._checkpoint, (self._runs, run.title, observers)

        def store() -> None:
            if checkpoint is not None:
                checkpoint.store(*contents)

        restored = any(self._ranks.attempt(lambda: checkpoint is not None and checkpoint.restore(*contents)))
        if not restored:
            shown = self._ranks.attempt(lambda: self._show(run, observers))
            for identity in observers:
                counts = [counts[identity] for counts in shown if identity in counts]
                self._seen[identity] = Seen(*map(sum, zip(*counts, strict=True))) if counts else Seen(0, 0)
            if unseen := [site.site.name for site in run.sites if not self._seen[site.fingerprint].tokens]:
                raise CalibrationError(f"no token of any batch reached {', '.join(unseen[:4])}")
        if self._ranks.count > 1:
            merge(observers, self._ranks)  # also sends restored statistics to all ranks
        if not restored:
            self._ranks.attempt(store)
        return observers

    def seen(self, site: ObservedSite) -> Seen | None:
        """See :meth:`Observation.seen`; runs restored from a checkpoint do not count."""
        return self._seen.get(site.fingerprint)

    def outputs(self, replaced: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[tuple[Batch, Any, Any]]:
        """Runs this rank's batches twice, and gives each with the model's outputs: the original one, then the changed.

        Args:
            replaced: functions that replace the outputs of some sites, as in :class:`Run`.

        Raises:
            CalibrationError: the model fails.
        """
        for number in self._ranks.share(range(len(self._batches))):
            original = self._call(number)
            with self._replacing(replaced):
                changed = self._call(number)
            yield self._batch, original, changed

    @contextmanager
    def _replacing(self, replaced: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        self._replaced = replaced
        try:
            yield
        finally:
            self._replaced = {}

    def _tried(self, run: Run, moved: Callable[[Any, Any, Any, Any], float | None]) -> dict[str, float]:
        """How far the output moves by each site of a trial, by fingerprint: the mean of the ranks that have a batch."""

        def distances() -> list[float]:
            found: list[float] = []
            for number in self._ranks.share(range(len(self._batches)))[:1]:
                batch, original = self._few_rows(number)
                for site in tqdm(run.sites, desc=run.title, unit="site", disable=not self._progress, leave=False):
                    function = run.make(site)
                    with self._replacing({site.fingerprint: function}):
                        distance = moved(function, batch, original, self._call(number, batch))
                    if distance is None:
                        return []
                    found.append(distance)
            return found

        ranks = [found for found in self._ranks.attempt(distances) if found]
        means = [sum(found) / len(ranks) for found in zip(*ranks, strict=True)]
        return dict(zip([site.fingerprint for site in run.sites], means, strict=False))  # all sites, or none

    def _few_rows(self, number: int) -> tuple[Batch, Any]:
        """The first rows of a batch, and the model's output for them; all rows if it takes no fewer."""
        batch = self._batches[number]
        rows = rows_of(batch) or 0
        if (few := -(-TRIAL_TOKENS * rows // self._fewest)) < rows:
            with suppress(CalibrationError):
                part = first_rows(batch, few)
                return part, self._call(number, part)
        return batch, self._call(number)

    def _show(self, run: Run, observers: Mapping[str, SiteObserver]) -> dict[str, list[int]]:
        """Runs this rank's batches; returns the numbers of tokens and of held-back tokens by fingerprint."""
        self._observers, self._counts = observers, {}
        share = self._ranks.share(range(len(self._batches)))
        try:
            with self._replacing(run.replaced):
                for number in tqdm(share, desc=run.title, unit="batch", disable=not self._progress, leave=False):
                    self._call(number)
        finally:
            self._observers = {}
        return self._counts

    def _call(self, number: int, rows: Batch | None = None) -> Any:
        """Runs one batch, or some rows of it, through the captured model, and returns the output.

        Raises:
            CalibrationError: the model fails; its error is the cause.
        """
        self._batch, self._graphs = self._batches[number] if rows is None else rows, 0
        try:
            return self._capture(self._batch)
        except _AllSeen:
            return None
        except (TardisError, MemoryError, torch.OutOfMemoryError):  # callers handle out-of-memory errors by type
            raise
        except Exception as error:
            raise CalibrationError(f"the model fails on batch {number}: {type(error).__name__}: {error}") from error

    def _instrument(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Inserts taps around every site, and records the sites and their weights."""
        unfuse(gm.graph)
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        moved: dict[fx.Node, fx.Node] = {}  # outputs of sites that feed another site
        sites = set[str]()
        for i, site in enumerate(find_sites(gm.graph, linear=self._linear)):
            if site.reason is not None or any(not isinstance(values.get(p), Tensor) for p in site.parameters):
                parameters = [values[p] for p in site.parameters if isinstance(values.get(p), Tensor)]
                if self._admit(site, parameters) not in self._sites:
                    self._refused.append(f"{site.name}: {site.reason}")
                continue
            sites.add(fingerprint(stored_tensors([values[p] for p in site.parameters]), site.function))
            gm.add_submodule(f"tardis_enter_{i}", _Tap(site, weakref.WeakMethod(self._enter)))
            gm.add_submodule(f"tardis_leave_{i}", _Tap(site, weakref.WeakMethod(self._leave)))
            with gm.graph.inserting_before(site.up.product):
                entering = moved.get(site.input, site.input)
                entered = gm.graph.call_module(f"tardis_enter_{i}", (entering, *site.parameters))
            with gm.graph.inserting_after(site.output):
                leaving = gm.graph.call_module(f"tardis_leave_{i}", (site.output, entered, *site.parameters))
            moved[site.output] = leaving
            site.output.replace_all_uses_with(leaving, delete_user_cb=lambda user, tap=leaving: user is not tap)  # type: ignore[misc]
        gm.recompile()
        observation, whole, short = weakref.ref(self), gm.forward, _up_to_taps(gm)

        def run(*inputs: Any) -> Any:
            owner = observation()
            assert owner is not None  # it makes the call
            owner._graphs += 1
            if not (owner._observers and owner._whole and owner._observers.keys() <= sites):
                return whole(*inputs)
            short(*inputs)
            raise _AllSeen

        return run

    def _admit(self, site: Site, parameters: list[Tensor]) -> str:
        stored = stored_tensors(parameters)
        identity = fingerprint(stored, site.function)
        if len(parameters) == len(site.parameters) and identity not in self._sites:
            # A site with a tensor subclass is refused, and needs only shapes.
            dense = [
                p if subclass_name(p) is None else torch.empty(p.shape, dtype=p.dtype, device="meta")
                for p in parameters
            ]
            weights = SiteWeights.from_site(site, dense)
            self._sites[identity] = ObservedSite(site, identity, weights, tuple(stored))
        return identity

    def _refuse_absent(self) -> None:
        """Refuses sites whose weights exist only during a forward pass, as with FSDP and offloaders."""
        for identity, observed in self._sites.items():
            if any(map(is_freed, observed.parameters)):
                reason = "its weights are freed after every forward pass: calibrate before sharding or offloading"
            elif fingerprint(observed.parameters, observed.site.function) != identity:
                reason = "other weights took the place of its own: calibrate before offloading"
            else:
                continue
            self._sites[identity] = replace(observed, site=observed.site.refused(reason))

    def _enter(self, site: Site, x: Float[Tensor, "*tokens d"], *parameters: Tensor) -> Tensor | None:
        """Shows a site's inputs to its observer; returns a copy of them if the site's output will be replaced."""
        identity = self._admit(site, list(parameters))
        if site.kind != "linear":
            self._lengths[identity] = x.shape[:-1].numel()
        self._observe(site, identity, x)
        return x.clone() if identity in self._replaced else None

    def _leave(self, site: Site, output: Tensor, x: Tensor | None, *parameters: Tensor) -> Tensor:
        """The site's output or its replacement."""
        function = self._replaced.get(self._admit(site, list(parameters)))
        return output if function is None or x is None else function(x).view_as(output)

    def _observe(self, site: Site, identity: str, x: Float[Tensor, "*tokens d"]) -> None:
        observer = self._observers.get(identity)
        if observer is None or x.numel() == 0:
            return
        tokens = x.detach().reshape(-1, x.shape[-1])
        real = real_tokens(self._batch, x.shape[:-1])
        if real is not None:
            tokens = tokens[real.reshape(-1).to(tokens.device)]
        if not len(tokens):
            return
        tokens = tokens.float().cpu()
        if not torch.isfinite(tokens).all():
            raise CalibrationError(
                f"the inputs of {site.name} hold NaN or infinity: look at the batch or at the layers before it"
            )
        tokens = thinned(tokens, max(FEW_TOKENS, MOST_TOKENS // len(self._batches)))
        counts = self._counts.setdefault(identity, [0, 0])
        counts[0] += len(tokens)
        counts[1] += len(tokens) - fitted_tokens(len(tokens))
        with raising_typed(f"{type(observer).__qualname__} at {site.name}"):
            observer.update(tokens)


class _AllSeen(BaseException):
    """All observers of a run have seen their sites, and the rest of the model need not run."""


def _up_to_taps(gm: fx.GraphModule) -> Callable[..., None]:
    """A graph up to its last tap; later nodes stay only where they leave a context."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    *nodes, _ = gm.graph.nodes
    taps = [node for node in nodes if str(node.target).startswith("tardis_")]
    last = nodes.index(taps[-1]) if taps else len(nodes)
    for i, node in enumerate(nodes):
        if i <= last or (node.is_impure() and copies.keys() >= set(node.all_input_nodes)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(None)
    return fx.GraphModule(gm, graph).forward


class _Tap(nn.Module):
    """Calls a method of an observation, which it does not keep alive, with a site and the values at it."""

    def __init__(self, site: Site, method: weakref.WeakMethod[Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self._site, self._method = site, method

    def forward(self, *values: Tensor | None) -> Tensor | None:
        method = self._method()
        assert method is not None  # its owner makes the call
        return method(self._site, *values)
