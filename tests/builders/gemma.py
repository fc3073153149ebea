"""A tiny Gemma 3 with random weights, and tokens of text for it."""

import torch
import transformers as hf
from torch import Tensor

LAYERS, BOS = 2, 2


def gemma() -> hf.Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=24, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=BOS, eos_token_id=None, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = hf.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model


def text(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(seed))
