"""Evaluates a student on the tuning split at the bytes of the plan, and makes the healed plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from tardis_fx.healing.site import TrainableSite
from tardis_fx.healing.student import Student
from tardis_fx.observation.batches import Batch
from tardis_fx.observation.capture import arguments
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.statistics.check import Check
from tardis_fx.statistics.divergence import divergence


class Evaluation:
    """Evaluation of a student on the tuning split, compared with the unhealed plan.

    Attributes:
        before: loss of the unhealed plan.
    """

    def __init__(self, model: nn.Module, student: Student, batches: Sequence[Batch]) -> None:
        """Measures the loss and the corrections of the unhealed plan with an untrained student."""
        self._model, self._student, self._batches = model, student, batches
        self.before = self._run()
        self._start = {key: (float(site.read()[0]), site.outlier_rate) for key, site in student.sites.items()}
        self._allowed = sum(site.promised for site in student.sites.values()) * (1 + 1e-6)

    def __call__(self) -> float:
        """The loss after widening all hot ranges equally until the plan's bytes are met."""
        while True:
            loss = self._run()
            within = self._bytes() <= self._allowed
            if within[0]:
                return loss
            step = int(within.byte().argmax()) or len(within) - 1
            for site in self._student.sites.values():
                site.widen(step)

    def _run(self) -> float:
        self._student.train(False)
        with torch.no_grad():
            losses = [float(divergence(self._student(b), dense(self._model, b), b)) for b in self._batches]
        return sum(losses) / len(losses)

    def _bytes(self) -> Float64[Tensor, " widenings"]:
        return torch.stack([self._healed(key, site) for key, site in self._student.sites.items()]).sum(0)

    def _healed(self, key: str, site: TrainableSite) -> Float64[Tensor, " widenings"]:
        """Optional bytes per token at every widening: the plan's number, scaled by the change on these tokens."""
        before, _ = self._start[key]
        return site.read().cpu() * (site.promised / before if before else 1)

    def plan(self, plan: Plan) -> Plan:
        """The plan with the student's tensors and updated figures."""
        self._run()
        entries = {key: self._figures(key, site) for key, site in self._student.sites.items()}
        observation = BatchObservation(self._model, self._batches, progress=False)
        sites = [site for site in observation.sites if site.fingerprint in entries]
        checks = observation.answer(Run("errors", lambda s: Check(s, self._student.sites[s.fingerprint]), sites))
        entries = {key: replace(entry, error=checks[key].error) for key, entry in entries.items()}
        return replace(plan, sites=tuple(entries.get(entry.fingerprint, entry) for entry in plan.sites), kl=None)

    def _figures(self, key: str, site: TrainableSite) -> SitePlan:
        entry, (_, before) = site.planned(), self._start[key]
        touched = entry.touched_bytes + float(self._healed(key, site)[0]) - site.promised
        rate = site.outlier_rate * (entry.outlier_rate / before if before else 1)
        return replace(entry, touched_bytes=touched, outlier_rate=rate)


def dense(model: nn.Module, batch: Batch) -> Any:
    """Output of the dense model for a batch, without gradients."""
    args, kwargs = arguments(batch)
    with torch.no_grad():
        return model(*args, **kwargs)
