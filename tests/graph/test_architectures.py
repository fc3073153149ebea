"""Untouched transformers models, one a family: every FFN is found, and rewritten or refused for the right reason."""

import pytest
import torch
from builders.architectures import FAMILIES, made
from builders.exact import Exact, assert_same


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_ffn_is_found_and_the_rewritten_model_gives_the_same_output(name: str) -> None:
    family = FAMILIES[name]
    model, backend = made(family), Exact()
    output = torch.compile(model, backend=backend, fullgraph=True)(**family.inputs)
    assert len(backend.sites) == len(family.found), backend.sites
    for site, (path, kind, activation, reason) in zip(backend.sites, family.found, strict=True):
        assert (site.name, site.kind, site.activation) == (path, kind, activation)
        assert reason in str(site.reason) if reason else site.reason is None, site.reason
        assert site.name in dict(model.named_modules())
    assert backend.rewritten == len([site for site in backend.sites if site.reason is None])
    assert_same(output, model(**family.inputs))


@pytest.mark.parametrize("name", ["gpt2", "t5 v1.0", "clip, both towers", "wav2vec2", "llama", "phi3, fused"])
@torch.no_grad()
def test_a_wrong_fold_would_show(name: str) -> None:
    family = FAMILIES[name]
    model = made(family)
    output = torch.compile(model, backend=Exact(wrong=0.05))(**family.inputs)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(output, model(**family.inputs))
