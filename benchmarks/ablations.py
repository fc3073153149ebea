"""Measures the effect of each choice of the fit: one change per row, on the demo's model cast to bfloat16.

    python benchmarks/ablations.py 0.15 0.1        budgets, as shares of the bfloat16 FFN bytes

Calibrated on the first half of the calibration split and measured on the second, every token through fold and
correction. The choices were made on this data, so the test split played no part. Fisher: the Gram matrix of the
loss's gradients with respect to a site's output, on the calibration text with labels drawn from the model. It weighs a
neuron's error by its column of down: in full, by its diagonal, or by its trace alone (one weight a layer).
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import PreTrainedModel

from tardis_fx import Config, Plan
from tardis_fx.demo.model import WINDOWS, load
from tardis_fx.guarded_fold.draft import Draft
from tardis_fx.guarded_fold.histogram import Histogram
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.guarded_fold.residuals import ResidualObserver
from tardis_fx.guarded_fold.widths import Fitted
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.quality import DenseReference, rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import drive
from tardis_fx.passes.guarded_fold import GuardedFold

Gram = Float[Tensor, "d_out d_out"]
WIDTHS = {"fold_bits": 4, "row_bits": 4}


class Guarded(PricedSite):
    """A priced site in which every neuron has a predictor row."""

    def at(self, price: float) -> Ranges:
        """The cheapest ranges if every neuron is guarded."""
        hot = self.guard.cheapest(self.error - price * self.costs.row * self.sums.count)
        every = torch.ones(hot.shape[1], dtype=torch.bool)
        return self.touching(hot, every, ~every)


class AllGuarded(GuardedFold):
    """Partial linearity with every neuron guarded."""

    def priced(self, draft: Draft, histogram: Histogram, widths: tuple[int, int]) -> PricedSite:
        """The priced site for choosing hot ranges."""
        return Guarded(**vars(super().priced(draft, histogram, widths)))


class OwnColumns(GuardedFold):
    """Partial linearity with rounded, unfitted columns of down."""

    def _fitted(self, observer: ResidualObserver) -> Fitted:
        return self._folded(observer.settled, observer)


class Fisher(GuardedFold):
    """Partial linearity with errors weighted by their effect on the loss."""

    def __init__(self, grams: dict[str, Gram], part: Callable[[Gram], Gram]) -> None:
        self._grams, self._part = grams, part

    def priced(self, draft: Draft, histogram: Histogram, widths: tuple[int, int]) -> PricedSite:
        """The priced site for choosing hot ranges."""
        gram, down = self._part(self._grams[draft.site.site.name]), draft.neurons.down
        return replace(
            super().priced(draft, histogram, widths), importance=((gram @ down) * down).sum(0).clamp(min=0).double()
        )


def gradient_grams(
    model: PreTrainedModel, names: Sequence[str], windows: Int64[Tensor, "windows length"]
) -> dict[str, Gram]:
    """Sum of g gᵀ over the tokens for each site; the sites are modules with these names."""
    grams: dict[str, Gram] = {}

    def add(name: str, g: Float[Tensor, "batch length d_out"]) -> None:
        g = g.flatten(0, 1).float()
        grams[name] = grams.get(name, 0) + g.T @ g

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(add, name))

    hooks = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    torch.manual_seed(0)
    for batch in windows.split(4):
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits.float().flatten(0, 1)
        labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        F.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in hooks:
        handle.remove()
    return grams


def variants(grams: dict[str, Gram]) -> dict[str, tuple[GuardedFold, dict[str, Any]]]:
    """Rewrites and changes of the config, by label."""
    return {
        "fold and rows of 4 bits": (GuardedFold(), {}),
        "widths chosen site by site": (GuardedFold(), {"options": {"fold_bits": None, "row_bits": None}}),
        "rows of 3 bits": (GuardedFold(), {"options": {"row_bits": 3}}),
        "rows of 8 bits": (GuardedFold(), {"options": {"row_bits": 8}}),
        "fold of 8 bits": (GuardedFold(), {"options": {"fold_bits": 8}}),
        "predictor of 3 bits": (GuardedFold(), {"options": {"predictor_bits": 3}}),
        "groups of 64 columns": (GuardedFold(), {"options": {"group_size": 64}}),
        "groups of 32 columns": (GuardedFold(), {"options": {"group_size": 32}}),
        "rounded to nearest": (GuardedFold(), {"options": {"rounding": "nearest"}}),
        "down's own columns": (OwnColumns(), {}),
        "every site the same share": (GuardedFold(), {"allocation": "per_site"}),
        "a predictor row for every neuron": (AllGuarded(), {}),
        "Fisher, full": (Fisher(grams, lambda g: g), {}),
        "Fisher, diagonal": (Fisher(grams, lambda g: g.diagonal().diag()), {}),
        "Fisher, a weight a layer": (Fisher(grams, lambda g: g.trace() / len(g) * torch.eye(len(g))), {}),
        "sites fitted in order": (GuardedFold(), {"sequential": True}),
    }


def main() -> None:
    """Measures and prints a table as Markdown."""
    demo = load()
    calibration, text = demo.windows("calibration", 2 * WINDOWS).split(WINDOWS)
    observation = BatchObservation(demo.model.bfloat16(), calibration.split(8), progress=False)
    grams = gradient_grams(demo.model, [s.site.name for s in observation.sites], calibration)
    reference = DenseReference(demo.model, text)
    budgets = [float(budget) for budget in sys.argv[1:] or ["0.15"]]
    rows = []
    try:
        for budget, (label, (rewrite, changes)) in tqdm([*itertools.product(budgets, variants(grams).items())]):
            options = WIDTHS | changes.get("options", {})
            config = Config(budget=budget, progress=False, **changes | {"options": options})
            plan = Plan(tuple(drive(observation, rewrite.fit(observation.sites, config))), config)
            quality = reference.quality(rewrite_every_token(demo.model, plan))
            error = math.sqrt(sum(site.error**2 for site in plan.rewritten) / len(plan.rewritten))
            corrected = sum(site.outlier_rate for site in plan.rewritten) / len(plan.rewritten)
            rows.append(
                {
                    "change": label,
                    "budget": f"{budget:.0%}",
                    "perplexity rise": f"{quality.rise:+.2%}",
                    "agreement": f"{quality.agreement:.1%}",
                    "corrected": f"{corrected:.1%}",
                    "error of the sites": f"{error:.3f}",
                }
            )
    finally:  # an interrupted run shows its finished rows
        print(markdown(rows))
        print(
            f"\ndense perplexity {reference.dense.perplexity:.3f}, bfloat16; calibrated on {calibration.numel():,} "
            f"tokens, measured on {text.numel():,}; {conditions()}"
        )


if __name__ == "__main__":
    main()
