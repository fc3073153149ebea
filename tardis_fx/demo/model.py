"""The packaged language model: an untouched transformers GPT-2, trained by ``examples/train_demo.py``."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from tardis_fx.demo.corpus import Split, modules
from tardis_fx.errors import DemoError

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = Path(__file__).parent / "model"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class DemoModel:
    """Model and tokenizer.

    Attributes:
        model: transformers' language model (GPT2LMHeadModel in the package), float32, in eval mode, without gradients.
        tokenizer: of the ``tokenizers`` library.
        context: longest sequence, in tokens.
        training: what the run that made the checkpoint took and reached.
    """

    model: nn.Module
    tokenizer: Any
    context: int
    training: dict[str, float]

    def windows(self, split: Split, count: int) -> Tensor:
        """Windows of text spread evenly over a split, [count, context]."""
        encoded = self.tokenizer.encode_batch([SEPARATOR + text for _, text in modules(split)])
        ids = torch.tensor([i for text in encoded for i in text.ids])
        starts = torch.linspace(0, len(ids) - self.context, count).long()
        return torch.stack([ids[start : start + self.context] for start in starts])


def load(folder: Path = FOLDER) -> DemoModel:
    """Loads the packaged checkpoint.

    Raises:
        DemoError: ``transformers`` or ``tokenizers`` is not installed, or the checkpoint is not there.
    """
    try:
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise DemoError(f"the demo needs {error.name}: pip install 'tardis-fx[demo]'") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        settings = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise DemoError(f"no demo checkpoint in {folder}: {error}") from error
    training = settings.pop("training")
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    model.tie_weights()
    return DemoModel(model, tokenizer, config.max_position_embeddings, training)
