"""Affine maps from a site's input to its output, and the base class of rewrites that replace an FFN by one."""

from jaxtyping import Float, Float64
from torch import Tensor

from tardis_fx.graph.feed_forward import multiply
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.layout import Expected, Layout, Tensors
from tardis_fx.passes.static import StaticRewrite
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.regression import AffineMap


class AffineRewrite(StaticRewrite):
    """Base class of rewrites that replace FFNs by one affine map, the tensors of :func:`folded`."""

    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the affine map."""
        return map_bytes(weights)

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Folded weight and bias."""
        return map_layout(weights)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The folded weight, read whole."""
        return {"folded_weight": 1.0}

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the map as one linear layer."""
        return multiply(x, constants["folded_weight"], constants["folded_bias"])


def map_bytes(weights: SiteWeights) -> int:
    """Size of an affine map from a site's input to its output."""
    return len(weights.down) * (weights.up.shape[1] + 1) * weights.up.element_size()


def map_layout(weights: SiteWeights) -> Layout:
    """Layout of the tensors of :func:`folded`."""
    dtype, d_out = weights.up.dtype, len(weights.down)
    return {"folded_weight": Expected(dtype, (d_out, weights.up.shape[1])), "folded_bias": Expected(dtype, (d_out,))}


def folded(affine: AffineMap, weights: SiteWeights) -> dict[str, Tensor]:
    """Tensors of a plan for an affine map, in the model's dtype."""
    dtype = weights.up.dtype
    return {"folded_weight": affine.weight.T.to(dtype).contiguous(), "folded_bias": affine.bias.to(dtype)}


def fold(
    weights: SiteWeights, slope: Float64[Tensor, " slopes"], intercept: Float64[Tensor, " slopes"]
) -> dict[str, Tensor]:
    """Tensors of the map of a plain FFN whose activations are lines, computed in float64.

    ``C = W2 diag(slope) W1``, ``B = W2 (slope b1 + intercept) + b2``.

    Args:
        weights: of the site.
        slope: of each neuron, or one for all; its device computes.
        intercept: likewise.
    """
    up, down = weights.up.to(slope), weights.down.to(slope)
    shift = intercept.expand(len(up))
    if weights.up_bias is not None:
        shift = shift + slope * weights.up_bias.to(slope)
    bias = down @ shift
    if weights.down_bias is not None:
        bias = bias + weights.down_bias.to(slope)
    return folded(AffineMap((down * slope @ up).T, bias), weights)
