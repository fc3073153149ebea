"""``tardis_fx.heal``: improves the small tensors of a plan by distillation on text."""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from tardis_fx.errors import ConfigError
from tardis_fx.healing import checkpoint as checkpoints
from tardis_fx.healing.evaluation import Evaluation
from tardis_fx.healing.student import Student, frozen
from tardis_fx.healing.training import Training
from tardis_fx.observation.batches import Batch, checked, split
from tardis_fx.plan import Plan, resolve

_log = logging.getLogger("tardis_fx")


@torch.inference_mode(mode=False)
@torch.enable_grad()
def heal(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    batches: Iterable[Batch],
    *,
    steps: int = 200,
    learning_rate: float = 1e-2,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Distils the dense model into the small tensors of a plan.

    In a plan of ``partial_linear`` they are scales of rows, biases, surrogates and thresholds; in a plan of
    ``guarded_fold``, C, B, surrogates and bounds of hot ranges.

    The last eighth of the batches, at least one, is held back. Every 20 steps the plan is evaluated there; the best one
    is returned, and training ends after five evaluations without improvement. The healed plan reads no more bytes: if
    training made it read more on the tuning split, all thresholds are raised, and all hot ranges widened, equally until
    it reads as much as the unhealed plan.

    The loss is the Kullback-Leibler divergence from the dense model's ``logits`` over all positions; for a model
    without logits, the mean squared error of its first output tensor. The optimiser is Adam with a rate that rises for
    20 steps and then falls to zero as a cosine.

    Time: a step runs the dense model, and the rewritten one forward and backward, on one batch; 500 to 4,000 tokens per
    batch work well. Memory beyond the model: the matrices of the plan in float32, and the activations of a batch for
    backpropagation.

    The gradient mode of the caller does not matter: ``torch.no_grad()`` and ``torch.inference_mode()`` are suspended
    during the call.

    Args:
        model: the dense model that the plan was made for, in eval mode; it is not changed.
        plan: of ``partial_linear``, ``guarded_fold`` or ``paper``, or the path of its file; it is not changed.
        batches: as in :func:`tardis_fx.calibrate`, two or more; the calibration batches can be used.
        steps: maximum number.
        learning_rate: of Adam. A unit of a scale, bias or surrogate beside codes is a tenth of its size, and of a
            threshold's logarithm 0.3. In a guarded fold, a unit of a tensor is its root mean square, and of a bound a
            tenth of the hot range's width.
        checkpoint: a file for the state after each evaluation; healing resumes from it if it exists.
        progress: show a progress bar.

    Returns:
        A plan with the same sites and settings; the original plan if training does not improve it.

    Raises:
        ConfigError: an argument is out of range, or a site's rewrite cannot be healed.
        CalibrationError: the model is in training mode or was made under ``torch.inference_mode()``, there are fewer
            than two batches, a batch does not run every site, the loss is NaN or infinite, or the model's output has no
            tensor.
        PlanMismatchError: the plan does not fit the model.
        CheckpointError: the checkpoint is damaged, or belongs to another plan, other batches or other settings.
    """
    plan = resolve(plan)
    check_settings("steps", steps, learning_rate)
    training, tuning = split(checked(model, batches))
    settings = {"steps": steps, "learning_rate": learning_rate}
    owner = "" if checkpoint is None else checkpoints.identity(plan, training + tuning, **settings)
    state = None if checkpoint is None else checkpoints.load(checkpoint, owner)
    with frozen(model):
        student = Student(model, plan, tuning[0])
        evaluation = Evaluation(model, student, tuning)
        run = Training(model, student, evaluation, training, steps, learning_rate, state)
        with tqdm(total=steps, initial=run.state.step, desc="healing", unit="step", disable=not progress) as bar:
            while not run.finished:
                run.advance()
                bar.update(run.state.step - bar.n)
                bar.set_postfix(loss=f"{run.state.best:.3g}", before=f"{evaluation.before:.3g}")
                if checkpoint is not None:
                    checkpoints.save(checkpoint, owner, run.state)
        if not run.state.best_step:
            _log.warning("healing did not improve the plan on the tuning split: it is returned unchanged")
            return plan
        _log.info("healed: loss on the tuning split %.4g, %.4g before", run.state.best, evaluation.before)
        run.restore()
        return evaluation.plan(plan)


def check_settings(count_name: str, count: Any, learning_rate: Any) -> None:
    """Checks the settings of a training.

    Raises:
        ConfigError: the named count is not a positive integer, or the learning rate is not in (0, 1).
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{count_name} must be a positive integer, not {count!r}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < 1:
        raise ConfigError(f"learning_rate must lie in (0, 1), not {learning_rate!r}")
