"""Untouched transformers models of tiny configs, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers as hf

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 64
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GATED = _SHAPE | {"intermediate_size": 96}


def gpt2(layers: int = 2, width: int = 32) -> hf.PreTrainedModel:
    """Projections as Conv1D (``addmm``), GELU spelt out in arithmetic."""
    config = hf.GPT2Config(
        n_layer=layers, n_embd=width, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return _made(lambda: hf.GPT2LMHeadModel(config))


def opt() -> hf.PreTrainedModel:
    """ReLU; fc1 and fc2 stand in the layer itself."""
    return _made(lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SHAPE, ffn_dim=128, word_embed_proj_dim=32)))


def gpt_neox() -> hf.PreTrainedModel:
    """Attention and FFN side by side, both on the block's input."""
    return _made(
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SHAPE, intermediate_size=128, use_parallel_residual=True))
    )


def falcon() -> hf.PreTrainedModel:
    """No biases."""
    return _made(lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SHAPE)))


def bert() -> hf.PreTrainedModel:
    """An encoder; up and down projection in different modules."""
    return _made(lambda: hf.BertModel(hf.BertConfig(**_SHAPE, intermediate_size=128)))


def llama() -> hf.PreTrainedModel:
    """Gated by SiLU."""
    return _made(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GATED)))


def gemma() -> hf.PreTrainedModel:
    """Gated by GELU."""
    return _made(lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GATED, num_key_value_heads=2, head_dim=16)))


def phi3() -> hf.PreTrainedModel:
    """Gated, gate and up projection in one matrix."""
    return _made(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GATED, pad_token_id=0, eos_token_id=0)))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _made(make: Callable[[], hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()
