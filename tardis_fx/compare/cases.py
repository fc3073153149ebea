"""Cases of a comparison: each makes one rewritten form of the model under comparison."""

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from torch.utils import _pytree as pytree

from tardis_fx.calibrate import calibrate
from tardis_fx.compare.subjects import RewrittenModel, Subject
from tardis_fx.config import Config
from tardis_fx.digest import digest
from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.heal import heal
from tardis_fx.measure import weight_only
from tardis_fx.measure.flops import prefill_share
from tardis_fx.observation.batches import Batch
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import check_rewrites, rewrite_named
from tardis_fx.plan import KeptSite
from tardis_fx.planning import plan_for


@dataclass
class Trial:
    """A model with the calibration text of one seed; expensive parts are computed on first use."""

    subject: Subject
    seed: int

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """The calibration batches of the seed."""
        return self.subject.calibration(self.seed)

    @cached_property
    def identity(self) -> str:
        """Hash of model, calibration text and test text."""
        return digest(self.subject.identity, self.batches)

    @cached_property
    def observation(self) -> BatchObservation:
        """Observation shared by all cases, so that results that do not depend on a case are measured once."""
        return BatchObservation(self.subject.model, self.batches, progress=False)


@dataclass(frozen=True)
class Case(ABC):
    """One row of a comparison.

    Attributes:
        label: of the method, a line in the plot.
    """

    label: str

    @property
    def budget(self) -> float | None:
        """Requested fraction of the dense bytes, or None."""
        return None

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of everything that the figures depend on, except the model and the text."""

    def check(self) -> None:
        """Raises a :class:`tardis_fx.errors.TardisError` if the case cannot be run at all."""
        return

    @abstractmethod
    def prepare(self, trial: Trial) -> RewrittenModel:
        """Makes the rewritten form of the trial's model.

        Raises:
            CalibrationError: the case is out of reach at this budget or for this model.
        """


@dataclass(frozen=True)
class Dense(Case):
    """The original model, for comparison with all other rows."""

    label: str = "dense"
    identity = "dense"

    def prepare(self, trial: Trial) -> RewrittenModel:
        """The original model."""
        return RewrittenModel(trial.subject.model)


@dataclass(frozen=True)
class Planned(Case):
    """A case of a registered rewrite.

    Attributes:
        config: of the fit.
        healed: whether :func:`tardis_fx.heal` improves the plan on the same calibration batches.
    """

    config: Config
    healed: bool = False

    @property
    def budget(self) -> float | None:
        """Fraction of the dense bytes, or None if the config has another goal."""
        return self.config.budget

    @property
    def identity(self) -> str:
        """Hash of the config and of the source of the rewrite."""
        methods = [method for _, method in self.config.methods if method is not None]
        names = dict.fromkeys(name for method in methods for name in (method, *method.split("+")))
        classes = [
            c for name in names for c in type(rewrite_named(name)).__mro__ if c.__module__.startswith("tardis_fx.")
        ]
        sources = [Path(inspect.getfile(c)).read_text(encoding="utf-8") for c in classes]
        return digest(asdict(replace(self.config, progress=False)), self.healed, sources)

    def check(self) -> None:
        """Raises ConfigError if the rewrite is not registered, or lacks an option, or linear layers are to be coded."""
        if self.config.linear_bits is not None:
            raise ConfigError("linear_bits: the comparison is of FFNs alone, whose bytes it shows; leave it out")
        check_rewrites(self.config)

    def prepare(self, trial: Trial) -> RewrittenModel:
        """Fits the plan, and heals it if requested."""
        config = replace(self.config, progress=False)
        if config.target_kl is None:
            plan = plan_for(trial.observation, config)
        else:
            plan = calibrate(trial.subject.model, trial.batches, config=config)
        if not plan.rewritten:
            reasons = Counter(site.reason for site in plan.sites if isinstance(site, KeptSite))
            raise CalibrationError(f"no site is rewritten: {reasons.most_common(1)[0][0]}")
        if self.healed:
            batches = [pair for batch in trial.batches for pair in _pairs(batch)]
            plan = heal(trial.subject.model, plan, batches, progress=False)
        dense = sum(site.dense_bytes for site in plan.sites)
        stored = sum(site.stored_bytes for site in plan.sites)
        flops = prefill_share(plan, trial.observation)
        return RewrittenModel(trial.subject.model, plan, stored / dense, plan.touched_fraction, flops)


def _pairs(batch: Batch) -> list[Batch]:
    """Splits a batch into pairs of rows, because healing takes many small steps."""
    leaves, structure = pytree.tree_flatten(batch)
    return [pytree.tree_unflatten(pair, structure) for pair in zip(*(leaf.split(2) for leaf in leaves), strict=True)]


@dataclass(frozen=True)
class Torchao(Case):
    """A case of FFN projections quantised by torchao to weight-only integers, by rounding.

    Attributes:
        bits: 2, 3, 4 or 8.
    """

    bits: int

    @property
    def identity(self) -> str:
        """Hash of the number of bits."""
        return digest("torchao", self.bits)

    def check(self) -> None:
        """Raises BenchError if torchao cannot be imported."""
        weight_only.ffn_quantiser(self.bits)

    def prepare(self, trial: Trial) -> RewrittenModel:
        """Quantises the FFNs in a copy of the model."""
        quantise = weight_only.ffn_quantiser(self.bits)
        model, share = weight_only.quantise_ffns(trial.subject.model, quantise, trial.observation.sites, self.bits)
        return RewrittenModel(model, stored=share, touched=share)
