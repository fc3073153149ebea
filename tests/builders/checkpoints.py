"""Folders that hold a model, a tokenizer and a text."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from builders.models import VOCABULARY


def save_checkpoint(folder: Path, model: hf.PreTrainedModel, text: torch.Tensor) -> None:
    """Writes a model, a tokenizer of the words w0, w1, …, and token ids as text.txt."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in text.tolist()))
