"""The packaged language model: an untouched transformers GPT-2, trained by ``examples/train_demo.py``."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tardis_fx.demo.corpus import Split, modules
from tardis_fx.errors import CalibrationError, ConfigError, DemoError
from tardis_fx.measure.extras import needed_by

FOLDER = Path(__file__).parent / "model"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class DemoModel:
    """A language model with its tokenizer and context length.

    Attributes:
        model: transformers' language model (GPT2LMHeadModel in the package), in eval mode, without gradients.
        tokenizer: of the ``tokenizers`` library.
        context: longest sequence, in tokens.
        training: cost and result of the training run that made the checkpoint.
    """

    model: nn.Module
    tokenizer: Any
    context: int
    training: dict[str, float]

    def tokens(self, split: Split) -> Tensor:
        """Token ids of a split's modules, each after a separator, [length]."""
        encoded = self.tokenizer.encode_batch([SEPARATOR + text for _, text in modules(split)])
        return torch.tensor([i for text in encoded for i in text.ids], dtype=torch.int64, device="cpu")

    def read(self, file: Path) -> Tensor:
        """Token ids of a text file, [length].

        Raises:
            CalibrationError: the file cannot be read.
        """
        try:
            ids = self.tokenizer.encode(file.read_text(encoding="utf-8")).ids
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read text from {file}: {error}") from error
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def windows(self, split: Split, count: int) -> Tensor:
        """Windows of text spread evenly over a split, [count, context]."""
        return cut(self.tokens(split), count, self.context)


def cut(ids: Tensor, count: int, length: int, seed: int = 0) -> Tensor:
    """Cuts windows of a text, [count, length].

    Args:
        ids: token ids, [at least length].
        count: number of windows.
        length: of a window.
        seed: 0 spreads windows evenly; other seeds draw the start of each.

    Raises:
        ConfigError: the count is not positive.
    """
    if count < 1:
        raise ConfigError(f"windows must be positive, not {count}")
    last = len(ids) - length
    if seed:
        starts = torch.randint(
            last + 1, (count,), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.int64, device="cpu"
        )
    else:
        starts = torch.linspace(0, last, count, dtype=torch.float32, device="cpu").long()
    return torch.stack([ids[start : start + length] for start in starts])


def load(folder: Path = FOLDER, dtype: str = "float32") -> DemoModel:
    """Loads a causal language model in the form of ``transformers``; the packaged one by default.

    Args:
        folder: holds ``config.json``, the weights and ``tokenizer.json``.
        dtype: of the model; ``"auto"`` uses that of the stored weights.

    Raises:
        DemoError: ``transformers`` or ``tokenizers`` is not installed, or the folder holds no whole checkpoint.
    """
    with needed_by("the demo", DemoError):
        import transformers
        from tokenizers import Tokenizer
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        training = json.loads((folder / "config.json").read_text()).get("training", {})
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise DemoError(f"no checkpoint of a language model in {folder}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise DemoError(f"the checkpoint in {folder} lacks {', '.join(missing[:4])}")
    model.requires_grad_(False)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        raise DemoError(f"the model in {folder} does not say how many positions it has (max_position_embeddings)")
    return DemoModel(model, tokenizer, context, training)
