"""``tardis_fx.heal``: a plan and some text in, the same plan with better small tensors out."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from tardis_fx.calibration.observe import checked
from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.healing import checkpoint as checkpoints
from tardis_fx.healing.evaluation import Evaluation, dense
from tardis_fx.healing.student import Student, divergence, frozen
from tardis_fx.plan import resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import nn

    from tardis_fx.calibration.observe import Batch
    from tardis_fx.plan import Plan

_log = logging.getLogger("tardis_fx")

#: Steps between evaluations, and evaluations without a better one after which it ends.
INTERVAL, PATIENCE = 20, 5
#: Steps in which the learning rate rises.
WARM_UP = 20
#: Share of the batches, the last ones, that are the tuning split.
TUNING = 1 / 8


def heal(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    batches: Iterable[Batch],
    *,
    steps: int = 300,
    learning_rate: float = 1e-2,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Distils the dense model into the small tensors of a plan: C, B, slopes, intercepts, bounds of hot ranges.

    The last eighth of the batches, one at the least, is never trained on. Every 20 steps the plan is evaluated there;
    the best one is returned, and training ends after five evaluations without a better one. No more bytes are read than
    before: where training made corrections more frequent on the tuning split, all hot ranges are widened alike until
    they are as frequent as the unhealed plan's.

    The loss is the Kullback-Leibler divergence from the dense model's ``logits``, over all positions; of a model whose
    output has none, the mean squared error of its first tensor. The optimiser is Adam, its rate rising for 20 steps and
    then falling to zero as a cosine.

    Time: a step runs the dense model, and the rewritten one forward and backward, on one batch; batches of 2,000 to
    4,000 tokens are about right. Memory beyond the model's: W1 and W2 of the listed neurons and the predictors in
    float32, and what backpropagation through the model keeps of a batch.

    Args:
        model: the dense model that the plan was made for, in eval mode; it is left as it was.
        plan: of ``partial_linear`` or ``paper``, or the path of its file; it is left as it was.
        batches: as :func:`tardis_fx.calibrate` takes them, two or more; those of calibration will do.
        steps: at the most.
        learning_rate: of Adam, in units of each tensor's root mean square; of bounds, in tenths of the hot range's width.
        checkpoint: a file that holds the state as of the last evaluation, and is gone on from where it exists.
        progress: show a progress bar.

    Returns:
        A plan of the same sites and settings; the one given where training makes nothing better.

    Raises:
        ConfigError: an argument is out of its range, or a site's rewrite cannot be healed.
        CalibrationError: the model is in training mode, fewer than two batches, a loss that is NaN or infinite, or a
            model whose output holds no tensor.
        PlanMismatchError: the plan does not fit the model.
        CheckpointError: the checkpoint is damaged, or of another plan, other batches or other settings.
    """
    plan = resolve(plan)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"steps must be a positive number of steps, not {steps!r}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < 1:
        raise ConfigError(f"learning_rate must lie in (0, 1), not {learning_rate!r}")
    given = checked(model, batches)
    if len(given) < 2:
        raise CalibrationError("healing needs two batches at the least, one of them to evaluate on")
    held = max(1, int(len(given) * TUNING))
    training, tuning = given[:-held], given[-held:]
    owner = "" if checkpoint is None else checkpoints.identity(plan, given, steps=steps, learning_rate=learning_rate)
    state = None if checkpoint is None else checkpoints.load(checkpoint, owner)
    with frozen(model):
        student = Student(model, plan, tuning[0])
        evaluation = Evaluation(model, student, tuning)
        run = _Run(model, student, evaluation, training, steps, learning_rate, state)
        with tqdm(total=steps, initial=run.state.step, desc="healing", unit="step", disable=not progress) as bar:
            while not run.finished:
                run.go_on()
                bar.update(run.state.step - bar.n)
                bar.set_postfix(loss=f"{run.state.best:.3g}", before=f"{evaluation.before:.3g}")
                if checkpoint is not None:
                    checkpoints.save(checkpoint, owner, run.state)
        if not run.state.best_step:
            _log.warning("healing made nothing better on the tuning split: the plan stays as it was")
            return plan
        _log.info("healed: loss on the tuning split %.4g, %.4g before", run.state.best, evaluation.before)
        run.restore()
        return evaluation.plan(plan)


class _Run:
    """The optimisation, from one evaluation to the next."""

    def __init__(
        self,
        model: nn.Module,
        student: Student,
        evaluation: Evaluation,
        batches: Sequence[Batch],
        steps: int,
        learning_rate: float,
        state: checkpoints.State | None,
    ) -> None:
        self._model, self._student, self._evaluation, self._batches = model, student, evaluation, batches
        self._steps, self._rate = steps, learning_rate
        self._optimiser = torch.optim.Adam(student.parameters, betas=(0.9, 0.99))
        if state is None:
            _finite(evaluation.before, "the tuning split")
            now = self._copies()
            state = checkpoints.State(0, evaluation.before, 0, now, now, self._optimiser.state_dict())
        self.state = state
        self._put(state.parameters)
        self._optimiser.load_state_dict(state.optimiser)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the last evaluations were no better."""
        return self.state.step >= self._steps or self.state.step - self.state.best_step >= PATIENCE * INTERVAL

    def go_on(self) -> None:
        """Takes the steps up to the next evaluation, and evaluates."""
        state = self.state
        self._student.train()
        while state.step < self._steps:
            self._step(state.step)
            state.step += 1
            if state.step % INTERVAL == 0:
                break
        loss = _finite(self._evaluation(), "the tuning split")
        _log.debug("healing, step %d: loss on the tuning split %.4g", state.step, loss)
        state.parameters, state.optimiser = self._copies(), self._optimiser.state_dict()
        if loss < state.best:
            state.best, state.best_step, state.kept = loss, state.step, state.parameters

    def restore(self) -> None:
        """Goes back to the best evaluation."""
        self._put(self.state.kept)

    def _step(self, step: int) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self._steps)) / 2
        epoch, position = divmod(step, len(self._batches))
        order = torch.randperm(len(self._batches), generator=torch.Generator().manual_seed(epoch))
        batch = self._batches[int(order[position])]
        loss = divergence(self._student(batch, gradients=True), dense(self._model, batch))
        _finite(float(loss.detach()), f"batch {int(order[position])}")
        parameters = self._student.parameters
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._hold_bytes()
        self._optimiser.step()
        self._optimiser.zero_grad()

    def _hold_bytes(self) -> None:
        """Takes out of the bounds' gradient what would change the expected bytes, at one price for all sites."""
        sites = self._student.sites.values()
        bounds = [bound for site in sites for bound in site.bounds]
        read = torch.stack([site.costs.row * site.corrected for site in sites]).sum()
        slopes = torch.autograd.grad(read, bounds)
        found = [bound.grad for bound in bounds if bound.grad is not None]
        gained = sum(float((gradient * slope).sum()) for gradient, slope in zip(found, slopes, strict=True))
        paid = sum(float(slope.square().sum()) for slope in slopes)
        for bound, gradient, slope in zip(bounds, found, slopes, strict=True):
            bound.grad = gradient - slope * (gained / paid if paid else 0)

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self._student.parameters]

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._student.parameters, values, strict=True):
                parameter.copy_(value)


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise CalibrationError(
            f"the loss on {where} is {loss}: look at the batch, or lower the learning rate if it came in mid-training"
        )
    return loss
