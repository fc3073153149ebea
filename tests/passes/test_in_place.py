"""What a graph does in place is kept, though nothing reads its result."""

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import FFN, expected
from torch import Tensor, nn

from tardis_fx import Plan


class Shard(nn.Module):
    """One rank's part of an embedding, before an FFN: the rows of other ranks' tokens are set to zero in place."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn, self.rows = ffn, nn.Embedding(4, 16)

    def embed(self, ids: Tensor) -> Tensor:
        others = ids >= 4
        rows = self.rows(ids.masked_fill(others, 0))
        rows.masked_fill_(others.unsqueeze(-1), 0)
        return rows  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        return self.ffn(self.embed(ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@torch.no_grad()
def test_rows_set_to_zero_in_place_stay_zero_in_the_rewritten_graph(model: FFN, plan: Plan, inner: str) -> None:
    torch.manual_seed(0)
    shard, ids = Shard(model).eval(), torch.tensor([0, 3, 4, 7, 2])
    found = compiled(shard, plan, inner=inner)(ids)
    torch.testing.assert_close(found, expected(model, plan, shard.embed(ids)))
    assert not torch.allclose(found, expected(model, plan, shard.rows(ids.masked_fill(ids >= 4, 0))))
