"""Linear layers outside of FFNs in rotated codes: the projections of attention, the head of a language model.

1. Random signs and Hadamard matrices rotate the layer's input, and the rows of its weight with them, as in
   :mod:`tardis_fx.passes.gptq_rotated`; the output is not rotated.
2. Each row has one scale, and codes that index a table of levels (:mod:`tardis_fx.runtime.tables`).
3. GPTQ rounds the rows by the Gram matrix of the layer's inputs. Layers that read the same input share the matrix and
   its factor.
4. ``Config(linear_bits=...)`` sets the bits of all layers. The budget, which is a share of the FFN bytes, does not
   count them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.partial_linear.coding import HELD, Sample
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.layout import Expected, Layout, Tensors, check_settings, setting, table_rows
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.quantisation import Feedback, code_rows
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.cpu.coded_layout import prepare_linear
from tardis_fx.runtime.rotation import random_signs, rotate
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.regression import relative_error

#: Bytes of the sums of one run over the batches; further layers take further runs.
MEMORY = 1 << 30
#: Rows that are coded together: the head of a language model has a row for every token.
TOGETHER = 8192


class CodedLinearLayer(Rewrite):
    """Codes linear layers outside of FFNs; ``Config(linear_bits=...)`` selects it, not ``Config(method=...)``."""

    name: ClassVar[str] = "coded_linear"
    linear = True
    decode_tokens = 32

    def refuse(self, site: Site) -> str | None:
        """Refuses FFNs."""
        return None if site.kind == "linear" else "it is an FFN, and no linear layer outside of one"

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Codes all layers from the Gram matrices of their inputs: one run, or several within :data:`MEMORY`.

        Raises:
            ConfigError: the weights are not on the CPU.
        """
        assert config.linear_bits is not None
        for site in sites:
            self._check_device(site.weights)
        plans: dict[str, Planned] = {}
        for group in within_memory(sites):
            coded = yield Run(
                "linear layers",
                LinearInputs,
                [layers[0] for layers in group.values()],
                finish=partial(self._coded, group, config.linear_bits),
                key=(CodedLinearLayer, config.linear_bits),
            )
            for entries in coded.values():
                plans |= entries
        return [plans[site.fingerprint] for site in sites]

    def _coded(
        self, group: Mapping[str, Sequence[ObservedSite]], bits: int, site: ObservedSite, seen: "LinearInputs"
    ) -> dict[str, SitePlan]:
        """Entries of all layers that read the input of a site, by fingerprint."""
        signs = random_signs(site.weights.up.shape[1], 0)
        feedback = Feedback.from_gram(rotate(rotate(seen.moments.gram, signs).T, signs))
        return {
            layer.fingerprint: self._planned(layer, feedback, signs, seen.held.tokens, bits)
            for layer in group[site.fingerprint]
        }

    def _planned(
        self,
        layer: ObservedSite,
        feedback: Feedback,
        signs: Int8[Tensor, " d"],
        held: Float32[Tensor, "tokens d"],
        bits: int,
    ) -> SitePlan:
        """The entry of a layer, with its error on held-back tokens."""
        weights, rotated = layer.weights, rotate(held, signs)
        coded, missed, total = list[Tensor](), 0.0, 0.0
        bias = weights.up.new_zeros(len(weights.up)) if weights.up_bias is None else weights.up_bias
        for rows, offset in zip(weights.up.split(TOGETHER), bias.split(TOGETHER), strict=True):
            codes = code_rows(rotate(rows.float(), signs), feedback, bits)
            product = F.linear(held, rows.float())
            missed += float((codes(rotated) - product).double().square().sum())
            total += float((product + offset.float()).double().square().sum())
            coded.append(codes.rows)
        tensors = {"rows": torch.cat(coded), "signs": signs}
        touched = sum(tensor.nbytes for tensor in tensors.values())
        return SitePlan.from_site(
            layer.site,
            layer.parameters,
            method=self.name,
            stored_bytes=weights.bytes + touched,
            touched_bytes=float(touched + (0 if weights.up_bias is None else weights.up_bias.nbytes)),
            error=relative_error(missed, total),
            settings={"bits": bits},
            tensors=tensors,
        )

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Rows of codes, and the signs of the rotation."""
        d_out, d = weights.up.shape
        if len(weights.down):
            raise ValueError("it codes linear layers, not FFNs")
        check_settings(plan, "bits")
        bits = setting(plan, "bits", range(1, 9))
        return {"rows": table_rows(d_out, d, bits), "signs": Expected(torch.int8, (d,))}

    def parts(self, plan: SitePlan) -> str:
        """Bits of the codes."""
        return f"{plan.settings['bits']} bits"

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors and the original bias as one, in the layout of the kernel.

        Raises:
            ConfigError: the weights are not on the CPU.
        """
        self._check_device(weights)
        nothing = torch.zeros(0, weights.up.shape[1], dtype=weights.up.dtype, device=weights.up.device)
        rows, signs = plan.tensors["rows"], plan.tensors["signs"]
        return {"layer": prepare_linear(CodedLinear(nothing, rows, signs, weights.up_bias, plan.settings["bits"]))}

    def _check_device(self, weights: SiteWeights) -> None:
        if weights.up.device.type != "cpu":
            raise ConfigError(f"linear_bits is for the CPU alone; on {weights.up.device}, calibrate without it")

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Computes the layer in one op."""
        output: Tensor = torch.ops.tardis.coded_linear(x, constants["layer"], len(plan.tensors["rows"]))
        return output


class LinearInputs:
    """Observer of the Gram matrix of a layer's inputs, and of a sample of held-back tokens.

    Memory: d² / 2 float64, and 5/4 of the sample in float32.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"moments": "parts", "held": "parts"}

    def __init__(self, site: ObservedSite) -> None:
        self.moments, self.held = Moments(site.weights.up.shape[1]), Sample(HELD)

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        cut = fitted_tokens(len(x))
        self.moments.update(x[:cut])
        self.held.update(x[cut:])


def within_memory(sites: Iterable[ObservedSite]) -> Iterator[dict[str, list[ObservedSite]]]:
    """Groups layers so that the sums over the inputs of each group fit in :data:`MEMORY`.

    Yields:
        Lists of layers that read the same input, by the fingerprint of the first.
    """
    inputs: dict[object, list[ObservedSite]] = {}
    for site in sites:
        inputs.setdefault(site.site.input, []).append(site)
    group: dict[str, list[ObservedSite]] = {}
    total = 0
    for layers in inputs.values():
        size = 4 * layers[0].weights.up.shape[1] ** 2
        if group and total + size > MEMORY:
            yield group
            group, total = {}, 0
        group[layers[0].fingerprint] = layers
        total += size
    yield group
