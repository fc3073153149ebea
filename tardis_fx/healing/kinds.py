"""Trainable sites by the kind of FFN: what stands for a neuron, and when it is corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.healing.site import TrainableSite
from tardis_fx.runtime import reference_gated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class PlainSite(TrainableSite):
    """A line and a hot range for every neuron."""

    OUTWARDS: ClassVar[dict[str, int]] = {"lower": -1, "upper": 1}

    def _open(self, constants: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        self._predictor = self._dequantised(*(constants[name][: self._guarded] for name in ("codes", "scale", "zero")))
        self._w1 = self._projection(constants, "up", self._predictor)
        neurons = constants["neurons"][: self._listed].long()
        self._b1 = constants["up_bias"][neurons].to(self._dtype) if "up_bias" in constants else None
        surrogates = {name: constants[name][: self._listed].to(self._dtype) for name in ("slope", "intercept")}
        bounds = {name: constants[name][: self._guarded] for name in self.OUTWARDS}
        return surrogates, bounds, bounds["upper"] - bounds["lower"]

    def _beyond(self, tokens: Tensor) -> list[Tensor]:
        z_hat = tokens.detach() @ self._predictor.T
        return [self._now("lower") - z_hat, z_hat - self._now("upper")]

    def _residual(self, tokens: Tensor) -> Tensor:
        z = F.linear(tokens, self._w1, self._b1)
        activated = ACTIVATIONS[self.entry.settings["activation"]].eager(z)
        return activated - self._now("slope") * z - self._now("intercept")

    def _guard(self) -> dict[str, Tensor]:
        return {name: self._now(name) for name in ("slope", "intercept", *self.OUTWARDS)}


class GatedSite(TrainableSite):
    """A plane and a threshold of the score for every neuron; the plane that the score is measured from is fixed."""

    OUTWARDS: ClassVar[dict[str, int]] = {"threshold": 1}

    def _open(self, constants: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        both = (constants[name][: self._guarded].flatten(0, 1) for name in ("codes", "scale", "zero"))
        self._predictors = self._dequantised(*both).unflatten(0, (self._guarded, 2)).unbind(1)
        self._matrices = [
            self._projection(constants, name, predictor)
            for name, predictor in zip(("gate", "up"), self._predictors, strict=True)
        ]
        self._biases = constants["biases"][: self._listed].to(self._dtype).T if "biases" in constants else (None, None)
        guard = constants["guard"][: self._guarded]
        self._planes, threshold = guard[:, :3], guard[:, 3]
        surrogate = constants["surrogate"][: self._listed].to(self._dtype)
        return {"surrogate": surrogate}, {"threshold": threshold}, threshold

    def _beyond(self, tokens: Tensor) -> list[Tensor]:
        biases = [None if b is None else b[: self._guarded] for b in self._biases]
        score = self._missed(tokens.detach(), self._predictors, biases, self._planes).abs()
        return [score - self._now("threshold")]

    def _residual(self, tokens: Tensor) -> Tensor:
        return self._missed(tokens, self._matrices, self._biases, self._now("surrogate"))

    def _missed(
        self, tokens: Tensor, matrices: Iterable[Tensor], biases: Iterable[Tensor | None], planes: Tensor
    ) -> Tensor:
        """What planes miss of the products, [tokens, neurons]."""
        both = torch.stack([F.linear(tokens, w, b) for w, b in zip(matrices, biases, strict=True)], -1)
        return reference_gated.beyond(both, planes, self.entry.settings["activation"])

    def _guard(self) -> dict[str, Tensor]:
        threshold = self._now("threshold")[:, None]
        return {"surrogate": self._now("surrogate"), "guard": torch.cat([self._planes, threshold], 1)}


#: By :attr:`tardis_fx.plan.SitePlan.kind`.
KINDS: dict[str, type[TrainableSite]] = {"plain": PlainSite, "gated": GatedSite}
