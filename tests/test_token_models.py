"""Models that predict tokens, compared without their head or with inputs other than text."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.gemma import BOS, gemma, text
from builders.scripts import load_script
from builders.whisper import features, whisper
from torch.nn import functional as F

from tardis_fx import Config
from tardis_fx.compare.cases import Dense, Planned
from tardis_fx.compare.compare import compare_rewrites
from tardis_fx.compare.records import Records
from tardis_fx.compare.subjects import Subject, token_model
from tardis_fx.measure import quality
from tardis_fx.measure.quality import PADDING, DenseReference, HeadReference

clips = load_script("examples/clips.py")
example = load_script("examples/gemma.py")


def recogniser() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A Whisper, and batches of two clips with transcripts of different lengths."""
    model = whisper()
    sound = features(4)
    return model, clips.batches(model, clips.Clips([""] * 4, sound, [[5, 9, 11], [7], [8, 3, 4, 6, 2], []]))


@pytest.fixture
def language_model(monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(example, "LENGTH", 40)
    model, test = gemma(), example.rows(text(2000, 1), 6, BOS)
    return token_model(
        "tiny", model.model, lambda seed: example.rows(text(2000), 8, BOS, seed).split(4), test.split(4),
        example.targets(test).split(4), example.hidden, model.lm_head,
    )  # fmt: skip


def test_a_model_without_its_head_is_measured_by_its_tokens(language_model: Subject, tmp_path: Path) -> None:
    methods = [Planned("GPTQ", Config(method="gptq", budget=b)) for b in (0.3, 0.6)]
    dense, rough, fine = compare_rewrites(
        language_model, [Dense(), *methods], [1], Records(tmp_path / "r.jsonl"), progress=False
    )
    model, rows = gemma(), example.rows(text(2000, 1), 6, BOS)
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert dense.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert dense.metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert dense.metrics["agreement"] == 1
    assert 1e-5 < fine.metrics["kl"] < rough.metrics["kl"]


def test_the_size_of_a_block_changes_nothing(language_model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(batch: torch.Tensor, **options: Any) -> Any:
        output = language_model.model(batch, **options)
        output.last_hidden_state *= 2
        return output

    whole = language_model.evaluate(double)
    assert whole["kl"] > 1e-3
    monkeypatch.setattr(quality, "BLOCK", 7)
    assert language_model.evaluate(double) == pytest.approx(whole, rel=1e-4)


def test_outputs_and_a_head_are_measured_as_logits_are() -> None:
    model, changed, windows = gemma(), gemma(), text(180).view(3, 60)
    changed.model.norm.weight.data.add_(torch.linspace(-0.3, 0.3, 32))
    by_head = HeadReference(model.model, [windows], [example.targets(windows)], example.hidden, model.lm_head)
    figures = dataclasses.asdict(by_head.quality(changed.model))
    assert figures["kl"] > 1e-3
    assert figures == pytest.approx(dataclasses.asdict(DenseReference(model, windows).quality(changed)), rel=1e-4)


@torch.no_grad()
def test_padding_of_transcripts_counts_nowhere() -> None:
    model, batches = recogniser()
    targets = [clips.targets(model, batch) for batch in batches]
    assert sum(int((row != PADDING).sum()) for row in targets) == 4 + 2 + 6 + 1
    reference = HeadReference(model, batches, targets, clips.logits, torch.nn.Identity())
    losses = [
        F.cross_entropy(clips.logits(model, batch)[target != PADDING], target[target != PADDING], reduction="sum")
        for batch, target in zip(batches, targets, strict=True)
    ]
    assert math.log(reference.dense.perplexity) == pytest.approx(float(sum(losses)) / 13, rel=1e-4)

    def disturbed(**batch: torch.Tensor) -> Any:
        output = model(**batch)
        output.logits[clips.targets(model, batch) == PADDING] += 100 * torch.randn(64)
        return output

    assert reference.quality(disturbed).kl == pytest.approx(0, abs=1e-6)
    assert reference.quality(disturbed).agreement == 1
