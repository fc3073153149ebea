from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from builders.ffns import FFN, Oracle, oracle, planned
from builders.gated import Gated
from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.errors import ServingError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.base import rewrite_named
from tardis_fx.serving.shards import shard

if TYPE_CHECKING:
    from torch import Tensor

    from tardis_fx.plan import SitePlan


def parts(entry: SitePlan, weights: SiteWeights, x: Tensor, size: int) -> list[Tensor]:
    """What each rank gives, from its rows of the projections and columns of ``down`` alone."""
    rewrite, hidden = rewrite_named(str(entry.method)), len(weights.up)
    found = []
    for rank in range(size):
        own = slice(rank * hidden // size, (rank + 1) * hidden // size)
        rows = {name: getattr(weights, name) for name in ("gate", "gate_bias", "up", "up_bias")}
        rows = {name: None if tensor is None else tensor[own] for name, tensor in rows.items()}
        held = replace(weights, **rows, down=weights.down[:, own])
        part = shard(entry, rank, size, hidden)
        found.append(rewrite.forward(x, rewrite.constants(part, held), part))
    return found


@given(st.integers(1, 4), st.integers(1, 6), st.data(), st.booleans(), st.integers(0, 99))
def test_the_ranks_sum_to_the_whole_site(size: int, per: int, data: st.DataObject, bias: bool, seed: int) -> None:
    made: Oracle = oracle(8, size * per, 5, "relu", d_out=6, bias=bias, seed=seed)
    order = data.draw(st.permutations(range(size * per)))
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, size * per)] * 2)))
    entry = made.plan(order[:first], order[first:second])
    whole = made.rewritten(order[:first], order[first:second])
    torch.testing.assert_close(sum(parts(entry, made.weights, made.x, size)), whole)


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_the_ranks_sum_to_the_whole_site_of_a_calibrated_plan(original: FFN, bits: int, kind: str) -> None:
    model = original if kind == "plain" else Gated()
    entry = planned(model, fold_bits=bits, row_bits=bits).sites[0]
    assert len(entry.tensors["codes"]) > 0
    projections = [model.up, model.down] if isinstance(model, FFN) else [model.up, model.down, model.gate]
    weights = SiteWeights(*(p.detach() for projection in projections for p in projection.parameters()))
    rewrite, x = rewrite_named(str(entry.method)), torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    whole = rewrite.forward(x, rewrite.constants(entry, weights), entry)
    torch.testing.assert_close(sum(parts(entry, weights, x, 2)), whole, rtol=1e-4, atol=1e-4)


def test_a_rewrite_that_cannot_be_shared_out_is_refused_by_name(original: FFN) -> None:
    entry = planned(original, method="low_rank").sites[0]
    with pytest.raises(ServingError, match=f"{entry.name} is rewritten by low_rank, .* --tensor-parallel-size 1"):
        shard(entry, 0, 2, 64)
