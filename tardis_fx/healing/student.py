"""The model with trainable planned sites, and the divergence of its output from that of the dense model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from tardis_fx.errors import CalibrationError, ConfigError, PlanMismatchError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing.graft import graft
from tardis_fx.healing.site import TrainableSite
from tardis_fx.observation.batches import Batch, real_tokens
from tardis_fx.observation.capture import Capture
from tardis_fx.passes import pipeline
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.entry import rewrite_of
from tardis_fx.plan import Plan, SitePlan

_log = logging.getLogger("tardis_fx")


class Student:
    """A model rewritten by its plan with trainable sites, using the same capture and matcher as compilation."""

    def __init__(self, model: nn.Module, plan: Plan, example: Batch) -> None:
        """Finds the planned sites by running a batch.

        Args:
            model: the dense model, in eval mode.
            plan: with sites of ``partial_linear``, ``paper`` and exact folds only.
            example: a batch.

        Raises:
            CalibrationError: the batch cannot be used. A later call raises it if its batch is the first to reach a
                planned site.
            ConfigError: the plan has nothing to heal, or a site of a rewrite that cannot be healed.
            PlanMismatchError: the plan has no entry for any site of the model.
            StaleWeightError: a weight changed since the plan was made.
        """
        self._plan, self._rewrites = plan, _healable(plan)
        self.sites: dict[str, TrainableSite] = {}
        self._found = False
        self._outcomes: list[pipeline.Outcome] = []
        self._capture = Capture(model, self._rewrite)
        self._capture(example)
        self._found = True
        for outcome in pipeline.check(self._outcomes, plan, strict=False):
            _log.warning("%s is not healed: %s", outcome.site.name or "an FFN", outcome.reason)
        if not self.sites:
            raise PlanMismatchError("none of the plan's sites can be healed in this model")
        if missing := [s.name for s in plan.sites if s.fingerprint in self._rewrites.keys() - self.sites.keys()]:
            _log.warning("the plan's entries of %s stay as they are: no batch reached them", ", ".join(missing))

    def __call__(self, batch: Batch, *, gradients: bool = False) -> Any:
        """Runs the model on a batch, with or without gradients."""
        return self._capture(batch, gradients=gradients)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all trainable sites."""
        return [parameter for site in self.sites.values() for parameter in site.parameters()]

    def train(self, mode: bool = True) -> None:
        """Sets the mode of all sites; see :class:`TrainableSite`."""
        for site in self.sites.values():
            site.train(mode)

    def _rewrite(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._outcomes += graft(gm, example_inputs, self._plan, self._site)
        return gm.forward

    def _site(self, entry: SitePlan, weights: SiteWeights) -> TrainableSite | None:
        rewrite = self._rewrites.get(entry.fingerprint)
        if rewrite is None:
            return None
        if entry.fingerprint not in self.sites:
            if self._found:
                raise CalibrationError(
                    f"a later batch is the first to reach {entry.name}: every batch must run every site"
                )
            self.sites[entry.fingerprint] = TrainableSite(entry, weights, rewrite)
        return self.sites[entry.fingerprint]


def _healable(plan: Plan) -> dict[str, Rewrite]:
    """The rewrite of every site that can be healed, by fingerprint."""
    found: dict[str, Rewrite] = {}
    for entry in plan.rewritten:
        rewrite = rewrite_of(entry)
        if rewrite.heals:
            found[entry.fingerprint] = rewrite
        elif not rewrite.exact:
            raise ConfigError(
                f"{entry.name} is rewritten by {entry.method!r}, which cannot be healed: "
                f"plans of 'partial_linear' and 'paper' can"
            )
    if not found:
        raise ConfigError("the plan has no site to heal: every one is refused or exact")
    return found


def divergence(output: Any, dense: Any, batch: Batch) -> Tensor:
    """Divergence of an output from that of the dense model, a scalar.

    For outputs with ``logits``, it is the Kullback-Leibler divergence of healed from dense distribution, in nats per
    position; otherwise the mean squared error of the first floating-point tensor. Padding does not count.

    Args:
        output: of the healed model.
        dense: output of the dense model.
        batch: input of both.
    """
    if isinstance(getattr(dense, "logits", None), Tensor):
        found, wanted = (F.log_softmax(o.logits.float(), -1) for o in (output, dense))
        errors = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
    else:
        errors = F.mse_loss(_first(output).float(), _first(dense).float(), reduction="none")
        errors = errors.mean(-1) if errors.dim() > 1 else errors
    real = real_tokens(batch, errors.shape)
    return errors.mean() if real is None else errors[real.to(errors.device)].mean()


def _first(output: Any) -> Tensor:
    tensors = (t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    found = next(tensors, None)
    if found is None:
        raise CalibrationError(f"the model returns {type(output).__name__} without any floating-point tensor to match")
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients for the model's parameters, and restores them afterwards.

    Raises:
        CalibrationError: a parameter is an inference tensor, through which no gradient passes.
    """
    if made := next((name for name, p in model.named_parameters() if p.is_inference()), None):
        raise CalibrationError(
            f"{made} was made under torch.inference_mode(), so no gradient can pass through it: load the model outside"
        )
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
