"""Snapshots notice every write to all of a tensor at the next call."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tardis_fx.runtime import snapshot


@torch.no_grad()
def test_a_view_of_the_same_storage_is_another_weight() -> None:
    """One storage, one address, one version: only the strides differ."""
    seen = snapshot.Snapshot([matrix := nn.Parameter(torch.randn(8, 8))])
    assert seen.holds([matrix])
    matrix.data = matrix.data.T
    assert not seen.holds([matrix])


@pytest.mark.parametrize("native", [True, False])
@given(
    layout=st.sampled_from(["rows", "columns", "every other", "one number", "expanded", "vector"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
)
def test_any_write_to_all_of_a_tensor_is_seen_at_the_next_call(
    native: bool, layout: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    whole = torch.randn(2 * rows, 2 * columns).mul(20).to(dtype)
    tensor = {
        "rows": whole,
        "columns": whole.T,
        "every other": whole[::2, ::2],
        "one number": whole[0, 0],
        "expanded": whole[:1, :1].expand(rows, columns),
        "vector": whole[0],
    }[layout]
    compare = snapshot._comparison() if native else snapshot._differing_lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_comparison", lambda: compare)
        seen = snapshot.Snapshot([tensor])
        for _ in range(2 * snapshot.LINES):
            assert seen.holds([tensor])
        whole.data.view(torch.int8).bitwise_not_()
        assert not seen.holds([tensor])
        assert not seen.holds_throughout([tensor])
