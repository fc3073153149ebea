"""Tokens that calibration keeps."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.partial_linear.coding import MARGIN, Sample


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 80))
def test_a_sample_is_as_large_as_it_may_be_and_has_tokens_of_every_batch(sizes: list[int], most: int) -> None:
    sample, shown = Sample(most), 0
    for size in sizes:
        sample.update(torch.arange(shown, shown + size, dtype=torch.float32)[:, None])
        shown += size
        assert sum(map(len, sample.parts)) <= MARGIN * most
        tokens = sample.tokens[:, 0].tolist()
        assert len(tokens) == min(most, shown)
        assert tokens == sorted(set(tokens))
        assert all(0 <= token < shown for token in tokens)


def test_batches_have_equal_shares_of_a_sample() -> None:
    sample = Sample(4000)
    for batch in range(64):
        sample.update(torch.full((500, 1), batch, dtype=torch.float32))
    counts = torch.bincount(sample.tokens[:, 0].long(), minlength=64)
    assert int(counts.sum()) == 4000
    assert int(counts.min()) > 35  # of 62.5, with a standard deviation of 7.4
    assert int(counts.max()) < 95
