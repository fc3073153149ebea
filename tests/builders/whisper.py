"""A tiny Whisper with random weights, and noise for it to listen to."""

import torch
import transformers as hf
from torch import Tensor

LAYERS, POSITIONS, START, NO_TIMESTAMPS, END = 1, 12, 61, 62, 60


def whisper() -> hf.WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": LAYERS, "attention_heads": 2, "ffn_dim": 96}.items()
    }
    ids = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=POSITIONS, max_target_positions=128,
        use_cache=False, **sides, **ids,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "positions" not in name:
                parameter.normal_(std=0.4)
    model.generation_config = hf.GenerationConfig(
        **ids, is_multilingual=False, no_timestamps_token_id=NO_TIMESTAMPS, suppress_tokens=[61, 62, 63]
    )
    return model


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, 2 * POSITIONS, generator=torch.Generator().manual_seed(seed))
