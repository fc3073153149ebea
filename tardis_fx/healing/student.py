"""The model with trainable planned sites."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tardis_fx.errors import CalibrationError, ConfigError, PlanMismatchError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing.codes import TrainableCodes
from tardis_fx.healing.fold import TrainableFold
from tardis_fx.healing.graft import Grafted
from tardis_fx.healing.site import TrainableSite
from tardis_fx.observation.batches import Batch
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.entry import rewrite_of
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import Plan, SitePlan

_log = logging.getLogger("tardis_fx")

#: Trainable sites by rewrite.
_TRAINABLE: dict[type[Rewrite], type[TrainableSite]] = {PartialLinear: TrainableCodes, GuardedFold: TrainableFold}


class Student(Grafted[TrainableSite]):
    """A model rewritten by its plan with trainable sites."""

    def __init__(self, model: nn.Module, plan: Plan, example: Batch) -> None:
        """Finds the planned sites by running a batch; a later batch must not be the first to reach one.

        Raises:
            CalibrationError: the batch cannot be used.
            ConfigError: the plan has nothing to heal, or a site of a rewrite that cannot be healed.
            PlanMismatchError: the plan has no entry for any site of the model.
            StaleWeightError: a weight changed since the plan was made.
        """
        super().__init__(model, plan)
        self._rewrites, self._complete = _healable(plan), False
        self(example)
        self._complete = True
        self._warn_of_refused("healed")
        if not self.sites:
            raise PlanMismatchError("none of the plan's sites can be healed in this model")
        if missing := [s.name for s in plan.sites if s.fingerprint in self._rewrites.keys() - self.sites.keys()]:
            _log.warning("the plan's entries of %s are not healed: no batch reached them", ", ".join(missing))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all trainable sites."""
        return [parameter for site in self.sites.values() for parameter in site.parameters()]

    def train(self, mode: bool = True) -> None:
        """Sets the mode of all sites; see :class:`TrainableSite`."""
        for site in self.sites.values():
            site.train(mode)

    def _module(self, entry: SitePlan, weights: SiteWeights) -> TrainableSite | None:
        rewrite = self._rewrites.get(entry.fingerprint)
        if rewrite is not None and self._complete:
            raise CalibrationError(f"a later batch is the first to reach {entry.name}: every batch must run every site")
        if rewrite is None:
            return None
        return _trainable(rewrite)(entry, weights, rewrite)


def _healable(plan: Plan) -> dict[str, Rewrite]:
    """The rewrite of every site that can be healed, by fingerprint."""
    rewrites = {entry.fingerprint: rewrite_of(entry) for entry in plan.rewritten}
    for entry in plan.rewritten:
        rewrite = rewrites[entry.fingerprint]
        if not (isinstance(rewrite, tuple(_TRAINABLE)) or rewrite.exact):
            raise ConfigError(
                f"{entry.name} is rewritten by {entry.method!r}, which cannot be healed: "
                f"plans of 'partial_linear', 'guarded_fold' and 'paper' can"
            )
    healable = {identity: rewrite for identity, rewrite in rewrites.items() if isinstance(rewrite, tuple(_TRAINABLE))}
    if not healable:
        raise ConfigError("the plan has no site to heal: every one is refused or exact")
    return healable


def _trainable(rewrite: Rewrite) -> type[TrainableSite]:
    return next(site for kind, site in _TRAINABLE.items() if isinstance(rewrite, kind))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients for the model's parameters, and restores them afterwards.

    Raises:
        CalibrationError: a parameter is an inference tensor, through which no gradient passes.
    """
    if inference := next((name for name, p in model.named_parameters() if p.is_inference()), None):
        raise CalibrationError(
            f"{inference} was made under torch.inference_mode(), so it passes on no gradients: load the model outside"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
