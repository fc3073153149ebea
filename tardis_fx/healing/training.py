"""Trains a student: steps of Adam that keep the expected bytes constant, with evaluations in between."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tardis_fx.errors import CalibrationError
from tardis_fx.healing.checkpoint import State
from tardis_fx.healing.evaluation import Evaluation, dense
from tardis_fx.healing.student import Student
from tardis_fx.observation.batches import Batch
from tardis_fx.statistics.divergence import divergence

_log = logging.getLogger("tardis_fx")

#: Steps between evaluations, and number of evaluations without improvement after which training ends.
INTERVAL, PATIENCE = 20, 5
#: Number of steps in which the learning rate rises.
WARM_UP = 20


class Training:
    """The optimisation of a student, one evaluation interval at a time.

    Attributes:
        state: after the last evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Student,
        evaluation: Evaluation,
        batches: Sequence[Batch],
        steps: int,
        learning_rate: float,
        state: State | None,
    ) -> None:
        """Starts training on batches that are shuffled in each pass, or resumes it from a state."""
        self._model, self._student, self._evaluation, self._batches = model, student, evaluation, batches
        self._steps = steps
        self._optimiser = torch.optim.Adam(student.parameters, learning_rate, betas=(0.9, 0.99))
        if state is None:
            _finite(evaluation.before, "the tuning split")
            now = self._copies()
            state = State(0, evaluation.before, 0, now, now, self._optimiser.state_dict())
        self.state = state
        self._put(state.parameters)
        self._optimiser.load_state_dict(state.optimiser)
        self._schedule = LambdaLR(self._optimiser, self._rise_and_fall, state.step - 1)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the last evaluations brought no improvement."""
        return self.state.step >= self._steps or self.state.step - self.state.best_step >= PATIENCE * INTERVAL

    def advance(self) -> None:
        """Takes the steps up to the next evaluation, then evaluates."""
        state = self.state
        while state.step < self._steps:
            self._step(state.step)
            state.step += 1
            if state.step % INTERVAL == 0:
                break
        loss = _finite(self._evaluation(), "the tuning split")
        _log.debug("healing, step %d: loss on the tuning split %.4g", state.step, loss)
        state.parameters, state.optimiser = self._copies(), self._optimiser.state_dict()
        if loss < state.best:
            state.best, state.best_step, state.best_parameters = loss, state.step, state.parameters

    def restore(self) -> None:
        """Restores the parameters of the best evaluation."""
        self._put(self.state.best_parameters)

    def _step(self, step: int) -> None:
        epoch, position = divmod(step, len(self._batches))
        order = torch.randperm(
            len(self._batches), generator=torch.Generator("cpu").manual_seed(epoch), dtype=torch.int64, device="cpu"
        )
        batch = self._batches[int(order[position])]
        self._student.train()
        loss = divergence(self._student(batch, gradients=True), dense(self._model, batch), batch)
        _finite(float(loss.detach()), f"batch {int(order[position])}")
        for site in self._student.sites.values():
            if not site.reading.requires_grad:
                raise CalibrationError(f"no gradient reached {site.entry.name}: every batch must run every site")
        parameters = self._student.parameters
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._hold_bytes()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()

    def _rise_and_fall(self, step: int) -> float:
        """Learning rate of a step, as a share of the full one: a linear rise times half a cosine."""
        return min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self._steps)) / 2

    def _hold_bytes(self) -> None:
        """Projects the bounds' gradient so that the expected bytes stay constant, at one price for all sites."""
        sites = self._student.sites.values()
        bounds = [site.bounds for site in sites]
        read = torch.stack([site.reading for site in sites]).sum()
        slopes = torch.autograd.grad(read, bounds)
        gradients = [bound.grad for bound in bounds if bound.grad is not None]
        product = sum(float((gradient * slope).sum()) for gradient, slope in zip(gradients, slopes, strict=True))
        square = sum(float(slope.square().sum()) for slope in slopes)
        for bound, gradient, slope in zip(bounds, gradients, slopes, strict=True):
            bound.grad = gradient - slope * (product / square if square else 0)

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self._student.parameters]

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._student.parameters, values, strict=True):
                parameter.copy_(value)


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise CalibrationError(
            f"the loss on {where} is {loss}: look at the batch, or lower the learning rate if it diverged in training"
        )
    return loss
