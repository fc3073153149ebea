"""Random plans of ``partial_linear`` that read requested shares of the neurons' parts.

Codes are random bytes, with scales at which pre-activations and outputs are about normal. Thresholds are set at
quantiles of what the parts contribute for a sample of the inputs.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.site import Kind, SiteWeights
from tardis_fx.observation.site import ObservedSite, thinned
from tardis_fx.partial_linear.calls import planned_call
from tardis_fx.partial_linear.precision import PRICED, Widths
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import SitePlan
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_reference import Levels
from tardis_fx.runtime.packing import packed_bytes
from tardis_fx.runtime.rotation import random_signs
from tardis_fx.runtime.touched import Touched

#: Number of neurons on which thresholds are set: all are alike.
NEURONS = 512
#: A threshold that every contribution exceeds, and one that none does.
ALWAYS, NEVER = -1.0, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Reads:
    """What a site reads: its widths, and the shares of (token, neuron) pairs that read each part.

    Attributes:
        widths: of the codes.
        column: share of the pairs that read the column.
        row: share that reads the refinements of the projections.
        column_refinement: share that reads the refinement of the column.
        up: share that reads the second projection of a gated FFN.
    """

    widths: Widths
    column: float
    row: float
    column_refinement: float
    up: float = 1.0

    def __str__(self) -> str:
        w = self.widths
        bits = f"{w.bits}+{w.low_bits}/{w.column_bits}+{w.column_low_bits}/{w.fold_bits} bits"
        shares = [self.column, self.row, self.column_refinement, self.up]
        return f"{bits}, {'/'.join(f'{share:.0%}' for share in shares)}"


@dataclass(frozen=True)
class CodedRecipe:
    """What plain and gated sites read.

    Attributes:
        title: of the plans in tables.
        plain: of FFNs with one projection in front of the activation.
        gated: of FFNs with two.
    """

    title: str
    plain: Reads
    gated: Reads

    @property
    def rewrite(self) -> PartialLinear:
        """The rewrite of the plans."""
        return PartialLinear()

    @property
    def config(self) -> Config:
        """The config of the plans."""
        return Config(method=PartialLinear.name, progress=False)

    def added(self, size: int) -> float:
        """Approximate bytes that a plan adds, in its file's layout and in a kernel's, relative to an FFN's.

        ``size`` is that of a weight in bytes.
        """
        sums = [
            max(w.bits + w.low_bits, w.column_bits + w.column_low_bits) + w.fold_bits / 8
            for w in (self.plain.widths, self.gated.widths)
        ]
        return 2 * max(sums) / (8 * size)

    def site_plan(self, site: ObservedSite, x: Float32[Tensor, "tokens d"]) -> SitePlan:
        """The plan of one site: random codes of all neurons, and thresholds at quantiles of their contributions."""
        weights = site.weights
        reads = self.plain if len(weights.projections) == 1 else self.gated
        widths = reads.widths
        tensors = _random_tensors(weights, widths)
        plan = SitePlan.from_site(
            site.site,
            site.parameters,
            method=PartialLinear.name,
            settings={**widths._asdict(), "activation": str(site.site.activation), "relative": 0},
            tensors=tensors,
        )
        call = planned_call(thinned(x, max(1, PRICED // NEURONS)).cpu(), plan, weights)
        sample = call._replace(listed=call.listed.clamp(max=NEURONS))
        thresholds, parts = _thresholds(sample, reads)
        touched = Touched()
        touched.add(sample, parts)
        read = (touched.per_token - sample.fixed_bytes) / int(sample.listed)  # by a neuron, beyond its base codes
        return replace(
            plan,
            touched_bytes=call.fixed_bytes + read * int(call.listed),
            outlier_rate=float(parts.value.float().mean()),
            tensors=tensors | {"thresholds": thresholds},
        )

    def step(self, entry: SitePlan, weights: SiteWeights, x: Float32[Tensor, "tokens d"]) -> tuple[float, float]:
        """Bytes that a step of several tokens reads, and the share of pairs that read a column; a part counts once."""
        call = planned_call(x, entry, weights)
        parts, touched = coded_reference.parts_read(call), Touched()
        touched.add(call._replace(x=x[:1]), Levels(*(part.any(0, keepdim=True) for part in parts)))
        return touched.per_token, float(parts.value.float().mean())

    def __str__(self) -> str:
        return f"partial_linear, {self.title}"


_FEW_PLAIN = Reads(Widths(2, 2, 4, 2, 4), 0.05, 0.05, 0.01)
_FEW_GATED = Reads(Widths(3, 2, 4, 2, 0), 0.9, 0.2, 0.2, 0.9)
#: One FFN: at the rate of outliers for which guarded folds are timed; or gated, at 22% of its bytes in bfloat16.
FEW: dict[Kind, CodedRecipe] = {
    "plain": CodedRecipe("2/4/4 bits, 5%", _FEW_PLAIN, _FEW_PLAIN),
    "gated": CodedRecipe("3/4 bits, 20% refined", _FEW_GATED, _FEW_GATED),
}
#: What plans of real weights read that lose less than rotated codes of 4 bits: in plain FFNs, 15% of the bytes in
#: bfloat16 (Whisper tiny.en, mean of its sites); in gated ones, 22% (Gemma 3 270M).
CALIBRATED = CodedRecipe(
    "as calibrated",
    plain=Reads(Widths(2, 3, 4, 2, 4), 0.25, 0.12, 0.065),
    gated=Reads(Widths(3, 3, 4, 2, 0), 0.73, 0.2, 0.24, 0.86),
)
_EVERYTHING = Reads(Widths(4, 1, 4, 1, 0), 1.0, 0.0, 0.0)
#: Weight-only quantisation by the same kernel: every neuron in rotated codes of 4 bits.
FOUR_BITS = CodedRecipe("all in 4 bits", _EVERYTHING, _EVERYTHING)


def _thresholds(call: CodedFFN, reads: Reads) -> tuple[Float32[Tensor, " thresholds"], Levels]:
    """Thresholds at which a call reads the requested shares, and what it then reads."""
    z = coded_reference.estimates(call, coded_reference.rounded(call.x, call.signs, wide=call.wide))
    listed = int(call.listed)
    surrogate = None if call.surrogate is None else call.surrogate[:listed].float()
    value, noise = coded_reference.values(z, surrogate, call.activation), coded_reference.noises(call, z[0].dtype)
    norms = call.norms[:listed].float()
    parts, _ = coded_reference.contributions(z, value, noise, norms, surrogate, call.activation, relative=call.relative)
    *up, column, row, refinement = parts
    thresholds, reached = [], torch.ones_like(column, dtype=torch.bool, device="cpu")
    for part in up:
        thresholds.append(_threshold(part, reached, reads.up))
        reached = part > thresholds[-1]
    thresholds.append(_threshold(column, reached, reads.column))
    reached = reached & (column > thresholds[-1])
    thresholds.append(_threshold(row, reached, reads.row))
    thresholds.append(_threshold(refinement, reached, reads.column_refinement))
    table = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
    return table, coded_reference.levels(
        z, value, noise, norms, table, surrogate, call.activation, relative=call.relative
    )


def _threshold(contribution: Float[Tensor, "tokens h"], reached: Bool[Tensor, "tokens h"], share: float) -> float:
    """The threshold that a share of all pairs exceeds, among those that reach the comparison."""
    compared, read = contribution[reached], round(share * contribution.numel())
    if read >= len(compared):
        return ALWAYS
    return float(compared.kthvalue(len(compared) - read).values) if read else NEVER


def _random_tensors(weights: SiteWeights, widths: Widths) -> dict[str, Tensor]:
    """Tensors of a plan that lists all neurons, and reads everything."""
    (hidden, d), d_out, k = weights.up.shape, len(weights.down), len(weights.projections)
    tensors: dict[str, Tensor] = {
        "neurons": torch.arange(hidden, dtype=torch.int32, device="cpu"),
        "columns": _random_rows(hidden, d_out, widths.column_bits, hidden**-0.5),
        "columns_refinement": _random_rows(hidden, d_out, widths.column_low_bits, hidden**-0.5 / 2**widths.column_bits),
        "thresholds": torch.full((k + 2,), ALWAYS, dtype=torch.float32, device="cpu"),
        "signs": random_signs(d, 0),
        "out_signs": random_signs(d_out, 1),
        "bias": torch.zeros(d_out, dtype=weights.up.dtype, device="cpu"),
        "norms": torch.full((hidden, k), (d_out / hidden) ** 0.5, dtype=torch.bfloat16, device="cpu"),
    }
    for name in weights.projections:
        tensors[name] = _random_rows(hidden, d, widths.bits, d**-0.5)
        tensors[f"{name}_refinement"] = _random_rows(hidden, d, widths.low_bits, d**-0.5 / 2**widths.bits)
    scale = float(tables.scales(tensors["up"][:1]))
    tensors["noise"] = torch.full((k,), 2.0**-widths.bits / scale, dtype=torch.float32, device="cpu")
    if widths.fold_bits:
        tensors["fold"] = _random_rows(d_out, d, widths.fold_bits, d**-0.5)
        tensors["surrogate"] = torch.zeros(hidden, k + 1, dtype=torch.bfloat16, device="cpu")
    return tensors


def _random_rows(rows: int, columns: int, bits: int, size: float) -> UInt8[Tensor, "rows row_bytes"]:
    """Rows of random codes; ``size`` is the root mean square of the weights that they stand for."""
    codes = torch.randint(256, (rows, packed_bytes(columns, bits)), dtype=torch.uint8, device="cpu")
    scale = size / tables.levels(bits).square().mean().sqrt()
    return torch.cat([codes, scale.half().view(1, 1).view(torch.uint8).expand(rows, 2)], 1)
