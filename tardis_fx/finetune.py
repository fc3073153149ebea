"""``tardis_fx.finetune``: trains the weights of a plan of dense layers on the batches of a task."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.heal import check_settings
from tardis_fx.healing.dense import DenseSite
from tardis_fx.healing.graft import Grafted
from tardis_fx.healing.student import frozen
from tardis_fx.observation.batches import Batch, checked, split
from tardis_fx.observation.capture import recordable
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.passes.entry import rewrite_of
from tardis_fx.plan import Plan, SitePlan, resolve
from tardis_fx.statistics.check import Check

_log = logging.getLogger("tardis_fx")


@torch.inference_mode(mode=False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    batches: Iterable[Batch],
    *,
    loss: Callable[[Any, Batch], Tensor] | None = None,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    progress: bool = True,
) -> Plan:
    """Trains only the weights of the rewritten FFNs on a task (FFSplit, arXiv 2401.04044).

    The optimiser is Adam with a rate that falls linearly to zero. The last eighth of the batches, at least one, is held
    back: the plan is evaluated there before training and after each epoch, and the best one is returned. The sites'
    errors are measured there, too, against the original FFNs on the original model's inputs.

    The gradient mode of the caller does not matter: ``torch.no_grad()`` and ``torch.inference_mode()`` are suspended
    during the call.

    Memory beyond the model: four float32 copies of the rewritten sites' weights, and the activations of a batch for
    backpropagation.

    Args:
        model: the dense model that the plan was made for, in eval mode; it is not changed.
        plan: of rewrites whose constants are dense weights (``ffsplit``, ``low_rank``, ``hot_fold``, ...), or the path
            of its file; it is not changed. Training of a fine-tuned plan continues from its weights.
        batches: as in :func:`tardis_fx.calibrate`, two or more, with labels if the loss needs them.
        loss: of the model's output and the batch, a scalar with gradients if they are enabled; None takes
            ``output.loss``, which models of ``transformers`` return if labels are among their arguments.
        epochs: passes over the batches.
        learning_rate: its initial value.
        progress: show a progress bar.

    Returns:
        A plan with ``...+finetuned`` at each site, except those that no training batch or no held-back batch reaches,
        which a warning names; the original plan if no epoch improved it.

    Raises:
        ConfigError: an argument is out of range, or a site's rewrite cannot be fine-tuned.
        CalibrationError: the model is in training mode or was made under ``torch.inference_mode()``, there are fewer
            than two batches, or the loss is not a finite scalar or has no gradient.
        PlanMismatchError: the plan does not fit the model.
    """
    plan = resolve(plan)
    check_settings("epochs", epochs, learning_rate)
    training, tuning = split([recordable(batch) for batch in checked(model, batches)])
    with frozen(model):
        tuned = _Tuned(model, plan, training, tuning, _loss_of_output if loss is None else loss, progress=progress)
        before = best = tuned.evaluate()
        best_weights: dict[str, Tensor] | None = None
        optimiser = torch.optim.Adam(tuned.modules.parameters(), lr=learning_rate)
        steps = epochs * len(training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        with tqdm(total=steps, desc="fine-tuning", unit="step", disable=not progress) as bar:
            for epoch in range(epochs):
                for i in torch.randperm(
                    len(training), generator=torch.Generator("cpu").manual_seed(epoch), dtype=torch.int64, device="cpu"
                ).tolist():
                    tuned.loss(training[i], gradients=True).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
                    bar.update()
                now = tuned.evaluate()
                bar.set_postfix(loss=f"{now:.3g}", before=f"{before:.3g}")
                if now < best:
                    best, best_weights = now, {name: t.clone() for name, t in tuned.modules.state_dict().items()}
        if best_weights is None:
            _log.warning("fine-tuning did not improve the plan on the held-back batches: it is returned unchanged")
            return plan
        tuned.modules.load_state_dict(best_weights)
        return tuned.trained()


class _Tuned(Grafted[DenseSite]):
    """The model with dense planned sites, whose weights are trained.

    Attributes:
        modules: all sites; only those that both splits reach require gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        training: Sequence[Batch],
        tuning: Sequence[Batch],
        loss: Callable[[Any, Batch], Tensor],
        *,
        progress: bool,
    ) -> None:
        super().__init__(model, plan)
        self._loss, self._tuning = loss, tuning
        known = [site for site in plan.rewritten if not rewrite_of(site).exact]
        if not known:
            raise ConfigError("the plan has no site to fine-tune: every one is refused or exact")
        self._observation = BatchObservation(model, tuning, progress=False)
        self._find(training, progress=progress)
        trained_on = set(self.sites)
        self._find(tuning, progress=progress)
        self._warn_of_refused("fine-tuned")
        # An observation only knows the sites of its first batch until it has run the others.
        self._observation.answer(Run("sites of the batches held back", lambda site: Check(site, nn.Identity()), []))
        self._chosen = [site for site in self._observation.sites if site.fingerprint in trained_on]
        chosen = {site.fingerprint for site in self._chosen}
        skipped = ", ".join(site.name or "an FFN" for site in known if site.fingerprint not in chosen)
        reason = "no training batch or no held-back batch reaches them"
        if not chosen:
            raise CalibrationError(f"no site can be fine-tuned, {skipped}: {reason}")
        if skipped:
            _log.warning("the plan's entries of %s are not fine-tuned: %s", skipped, reason)
        self.modules = nn.ModuleDict(self.sites)
        for identity, module in self.sites.items():
            module.requires_grad_(identity in chosen)

    def _find(self, batches: Sequence[Batch], *, progress: bool) -> None:
        """Runs all batches, because any of them may be the first to reach a site."""
        for batch in tqdm(batches, desc="sites", unit="batch", disable=not progress, leave=False):
            self(batch)

    def loss(self, batch: Batch, *, gradients: bool = False) -> Tensor:
        """Loss of one batch, with or without gradients."""
        with torch.set_grad_enabled(gradients):
            loss = self._loss(self(batch, gradients=gradients), batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not math.isfinite(float(loss.detach())):
            raise CalibrationError(
                f"the loss must be a finite scalar, not {loss!r}: look at the batch, or lower the learning rate"
            )
        if gradients and not loss.requires_grad:
            raise CalibrationError(
                "the loss has no gradient: it must be computed from the model's output, neither detached nor under "
                "no_grad, and every batch must run a site that is trained"
            )
        return loss

    def evaluate(self) -> float:
        """Mean loss over the held-back batches, without gradients."""
        return sum(float(self.loss(batch)) for batch in self._tuning) / len(self._tuning)

    def trained(self) -> Plan:
        """The plan with the current weights, and their errors on the held-back batches."""
        with torch.no_grad():
            run = Run("errors after fine-tuning", lambda s: Check(s, self.sites[s.fingerprint]), self._chosen)
            checks = self._observation.answer(run)
        entries = {key: self.sites[key].trained(check.error) for key, check in checks.items()}
        return replace(
            self._plan, sites=tuple(entries.get(site.fingerprint, site) for site in self._plan.sites), kl=None
        )

    def _module(self, entry: SitePlan, weights: SiteWeights) -> DenseSite | None:
        rewrite = rewrite_of(entry)
        return None if rewrite.exact else DenseSite(entry, weights, rewrite)


def _loss_of_output(output: Any, batch: Batch) -> Any:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise CalibrationError(
            f"the model's output, {type(output).__name__}, has no loss: put labels into the batches, or give loss=..."
        )
    return loss
