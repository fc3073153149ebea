"""``tardis_fx.finetune``: trains the weights of a plan of dense layers on the batches of a task."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.heal import TUNING
from tardis_fx.healing.dense import DenseSite
from tardis_fx.healing.graft import graft
from tardis_fx.healing.student import frozen
from tardis_fx.observation.batches import Batch, checked
from tardis_fx.observation.capture import Capture, recordable
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Run
from tardis_fx.passes import pipeline
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
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ConfigError(f"epochs must be a positive number of passes, not {epochs!r}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < 1:
        raise ConfigError(f"learning_rate must lie in (0, 1), not {learning_rate!r}")
    given = [recordable(batch) for batch in checked(model, batches)]
    if len(given) < 2:
        raise CalibrationError("fine-tuning needs two batches at the least, one of them to evaluate on")
    held = max(1, int(len(given) * TUNING))
    training, tuning = given[:-held], given[-held:]
    with frozen(model):
        split = _Split(model, plan, training, tuning, _own_loss if loss is None else loss, progress=progress)
        before = best = split.evaluate(tuning)
        kept: dict[str, Tensor] | None = None
        optimiser = torch.optim.Adam(split.sites.parameters(), lr=learning_rate)
        steps = epochs * len(training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        with tqdm(total=steps, desc="fine-tuning", unit="step", disable=not progress) as bar:
            for epoch in range(epochs):
                for i in torch.randperm(
                    len(training), generator=torch.Generator("cpu").manual_seed(epoch), dtype=torch.int64, device="cpu"
                ).tolist():
                    found = split.loss(training[i], gradients=True)
                    found.backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
                    bar.update()
                now = split.evaluate(tuning)
                bar.set_postfix(loss=f"{now:.3g}", before=f"{before:.3g}")
                if now < best:
                    best, kept = now, {name: t.clone() for name, t in split.sites.state_dict().items()}
        if kept is None:
            _log.warning("fine-tuning made nothing better on the held-back batches: the plan stays as it was")
            return plan
        split.sites.load_state_dict(kept)
        return split.trained()


class _Split:
    """The model with trainable planned sites."""

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
        self._plan, self._loss, self.sites = plan, loss, nn.ModuleDict()
        self._known = [site for site in plan.rewritten if not _is_exact(site)]
        if not self._known:
            raise ConfigError("the plan has no site to fine-tune: every one is refused or exact")
        self._outcomes: list[pipeline.Outcome] = []
        self._capture = Capture(model, self._grafted)
        self._observation = BatchObservation(model, tuning, progress=False)
        self._find(training, progress=progress)
        trained_on = set(self.sites)
        self._find(tuning, progress=progress)
        left = pipeline.check(self._outcomes, plan, strict=False)
        for name, reason in dict.fromkeys((o.site.name or "an FFN", o.reason) for o in left):
            _log.warning("%s is not fine-tuned: %s", name, reason)
        # An observation only knows the sites of its first batch until it has run the others.
        self._observation.answer(Run("sites of the batches held back", lambda site: Check(site, nn.Identity()), []))
        self._chosen = [site for site in self._observation.sites if site.fingerprint in trained_on]
        self._choose({site.fingerprint for site in self._chosen})

    def _find(self, batches: Sequence[Batch], *, progress: bool) -> None:
        """Runs all batches, because any of them may be the first to reach a site."""
        for batch in tqdm(batches, desc="sites", unit="batch", disable=not progress, leave=False):
            self._capture(batch)

    def _choose(self, chosen: set[str]) -> None:
        """Restricts training to the chosen sites."""
        left = [site.name or "an FFN" for site in self._known if site.fingerprint not in chosen]
        why = "no batch that is trained on, or none that is held back, reaches them"
        if not chosen:
            raise CalibrationError(f"no site can be fine-tuned, {', '.join(left)}: {why}")
        if left:
            _log.warning("the plan's entries of %s stay as they are: %s", ", ".join(left), why)
        for identity, module in self.sites.items():
            module.requires_grad_(identity in chosen)

    def loss(self, batch: Batch, *, gradients: bool = False) -> Tensor:
        """Loss of one batch, with or without gradients."""
        with torch.set_grad_enabled(gradients):
            found = self._loss(self._capture(batch, gradients=gradients), batch)
        if not isinstance(found, Tensor) or found.numel() != 1 or not math.isfinite(float(found.detach())):
            raise CalibrationError(
                f"the loss must be a finite scalar, not {found!r}: look at the batch, or lower the rate"
            )
        if gradients and not found.requires_grad:
            raise CalibrationError(
                "the loss has no gradient: it must be made of the model's output, neither detached nor under no_grad, "
                "and every batch must run a site that is trained"
            )
        return found

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over batches, without gradients."""
        return sum(float(self.loss(batch)) for batch in batches) / len(batches)

    def trained(self) -> Plan:
        """The plan with the current weights, and their errors on the held-back batches."""
        modules = dict(self.sites.items())
        with torch.no_grad():
            run = Run("errors after fine-tuning", lambda s: Check(s, modules[s.fingerprint]), self._chosen)
            checks = self._observation.answer(run)
        entries = {key: modules[key].trained(check.error) for key, check in checks.items()}  # type: ignore[operator]
        return replace(self._plan, sites=tuple(entries.get(site.fingerprint, site) for site in self._plan.sites))

    def _grafted(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._outcomes += graft(gm, example_inputs, self._plan, self._site)
        return gm.forward

    def _site(self, entry: SitePlan, weights: SiteWeights) -> nn.Module | None:
        if _is_exact(entry):
            return None
        if entry.fingerprint not in self.sites:
            self.sites[entry.fingerprint] = DenseSite(entry, weights, rewrite_of(entry))
        return self.sites[entry.fingerprint]


def _is_exact(entry: SitePlan) -> bool:
    return rewrite_of(entry).exact


def _own_loss(output: Any, batch: Batch) -> Tensor:
    found = getattr(output, "loss", None)
    if found is None:
        raise CalibrationError(
            f"the model's output, {type(output).__name__}, has no loss: put labels into the batches, or give loss=..."
        )
    return found  # type: ignore[no-any-return]
