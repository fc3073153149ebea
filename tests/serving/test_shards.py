from collections.abc import Callable

import pytest
import torch
from builders.ffns import Oracle, oracle, planned
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.errors import ServingError
from tardis_fx.graph.feed_forward import narrowed
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.serving.shards import shard
from tardis_fx.testing.ffn import FFN, GatedFFN, ffn, gated_ffn, inputs
from tardis_fx.testing.observation import observed


def parts(entry: SitePlan, weights: SiteWeights, x: Tensor, size: int) -> list[Tensor]:
    """What each rank gives, from the weights of its neurons alone."""
    rewrite, hidden = rewrite_named(str(entry.method)), len(weights.up)
    outputs = []
    for rank in range(size):
        shard_weights = narrowed(weights, torch.arange(rank * hidden // size, (rank + 1) * hidden // size))
        part = shard(entry, rank, size, hidden)
        outputs.append(rewrite.forward(x, rewrite.constants(part, shard_weights), part))
    return outputs


@given(st.integers(1, 4), st.integers(1, 6), st.data(), st.booleans(), st.integers(0, 99))
def test_the_ranks_sum_to_the_whole_site(size: int, per: int, data: st.DataObject, bias: bool, seed: int) -> None:
    site: Oracle = oracle(8, size * per, 5, "relu", d_out=6, bias=bias, seed=seed)
    order = data.draw(st.permutations(range(size * per)))
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, size * per)] * 2)))
    entry = site.plan(order[:first], order[first:second])
    whole = site.rewritten(order[:first], order[first:second])
    torch.testing.assert_close(sum(parts(entry, site.weights, site.x, size)), whole)


@pytest.mark.parametrize("make", [ffn, gated_ffn])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_the_ranks_sum_to_the_whole_site_at_any_width(make: Callable[[], FFN | GatedFFN], bits: int) -> None:
    model, x = make(), inputs(5, 16)
    entry, weights = planned(model, fold_bits=bits, row_bits=bits).rewritten[0], observed(model).weights
    rewrite = rewrite_named(str(entry.method))
    whole = rewrite.forward(x, rewrite.constants(entry, weights), entry)
    torch.testing.assert_close(sum(parts(entry, weights, x, 2)), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["low_rank", "partial_linear"])
def test_a_rewrite_that_cannot_be_shared_out_is_refused_by_name(original: FFN, method: str) -> None:
    entry = planned(original, method=method).rewritten[0]
    with pytest.raises(ServingError, match=f"{entry.name} is rewritten by {method}, .* --tensor-parallel-size 1"):
        shard(entry, 0, 2, 64)
