"""The packaged language model: an untouched transformers GPT-2, trained by ``examples/train_demo.py``."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from tardis_fx.demo.corpus import Split, modules
from tardis_fx.errors import CalibrationError, DemoError
from tardis_fx.measure.requirements import needed_by

FOLDER = Path(__file__).parent / "model"
SEPARATOR = "<|endoftext|>"
#: Number of windows and their maximum length: 16,384 tokens to calibrate on, and as many others to measure quality.
WINDOWS, LENGTH = 64, 256
#: Tokens of the prompt, and tokens that follow, when decoding is timed.
PROMPT, NEW_TOKENS = 64, 65


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

    def tokens(self, split: Split) -> Int64[Tensor, " length"]:
        """Token ids of a split's modules, each after a separator."""
        encoded = self.tokenizer.encode_batch([SEPARATOR + text for _, text in modules(split)])
        return torch.tensor([i for text in encoded for i in text.ids], dtype=torch.int64, device="cpu")

    def read(self, file: Path) -> Int64[Tensor, " length"]:
        """Token ids of a text file.

        Raises:
            CalibrationError: the file cannot be read.
        """
        try:
            ids = self.tokenizer.encode(file.read_text(encoding="utf-8")).ids
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read text from {file}: {error}") from error
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def windows(self, split: Split, count: int) -> Int64[Tensor, "count context"]:
        """Windows of text spread evenly over a split."""
        return cut(self.tokens(split), count, self.context)


def cut(ids: Int64[Tensor, " length"], count: int, length: int, seed: int = 0) -> Int64[Tensor, "{count} {length}"]:
    """Cuts windows of a length out of a text: evenly spread for seed 0, with drawn starts for other seeds.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    last = len(ids) - length
    if last < 0:
        raise CalibrationError(f"{len(ids)} tokens of text are less than one window of {length}: give more text")
    if seed:
        generator = torch.Generator("cpu").manual_seed(seed)
        starts = torch.randint(last + 1, (count,), generator=generator, dtype=torch.int64, device="cpu")
    else:
        starts = torch.linspace(0, last, count, dtype=torch.float32, device="cpu").long()
    return torch.stack([ids[start : start + length] for start in starts])


def load(folder: str | Path = "demo", dtype: str = "float32") -> DemoModel:
    """Loads a causal language model in the form of ``transformers``.

    Args:
        folder: holds ``config.json``, the weights and ``tokenizer.json``; "demo" stands for the packaged model's.
        dtype: of the model; ``"auto"`` uses that of the stored weights.

    Raises:
        DemoError: ``transformers`` or ``tokenizers`` is not installed, or the folder holds no whole checkpoint.
    """
    with needed_by("the demo", DemoError):
        import transformers
        from tokenizers import Tokenizer
    folder = FOLDER if folder == "demo" else Path(folder)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        training = json.loads((folder / "config.json").read_text()).get("training", {})
    except Exception as error:  # tokenizers raises nothing narrower
        raise DemoError(f"no checkpoint of a language model in {folder}: {error}") from error
    model = load_weights(folder, dtype=dtype)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        raise DemoError(f"the model in {folder} does not say how many positions it has (max_position_embeddings)")
    return DemoModel(model, tokenizer, context, training)


def load_weights(folder: Path, **options: Any) -> nn.Module:
    """Loads a causal language model by ``from_pretrained`` with options, in eval mode and without gradients.

    Raises:
        DemoError: the folder holds no whole checkpoint.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors has errors of its own
        raise DemoError(f"no checkpoint of a language model in {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise DemoError(f"the checkpoint in {folder} lacks {', '.join(missing[:4])}")
    model.requires_grad_(False)
    return model  # type: ignore[no-any-return]
