"""Untouched transformers models with a head, of tiny configs, with random weights; see also architectures.py."""

import torch
import transformers as hf

VOCABULARY = 64


def gpt2(layers: int = 2, width: int = 32) -> hf.PreTrainedModel:
    """Projections as Conv1D (``addmm``), GELU spelt out in arithmetic."""
    config = hf.GPT2Config(
        n_layer=layers, n_embd=width, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(config).eval()


def llama() -> hf.PreTrainedModel:
    """Gated by SiLU."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        intermediate_size=96,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
