"""One tiny, untouched model of each transformers family, and the FFNs that must be found in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

from builders.models import VOCABULARY, tokens

Found = tuple[str, str, str | None, str | None]
"""Name, kind, activation, and a part of the reason for refusal."""

STACKED = "stacked, one matrix per expert: its tokens are routed"

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = _IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
_PLAIN = _SHAPE | {"intermediate_size": 64}
_GROUPED = _PLAIN | {"num_key_value_heads": 1}
_OLD = _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_BOTH = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = _IDS | {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}

_TEXT = {"input_ids": tokens(2, 5) % 61 + 3}
_PAIR = _TEXT | {"decoder_input_ids": tokens(2, 4, seed=1) % 61 + 3}
_PIXELS = {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)}
_SOUND = {"input_features": torch.linspace(-9, 9, 2 * 4 * 16).sin().view(2, 4, 16)}
_WAVE = {"input_values": torch.linspace(-90, 90, 2 * 64).sin().view(2, 64)}


_GROUPED_PARTS = ("q", "k", "v", "post_attention", "intermediate", "output")


class Family(NamedTuple):
    """A model and what must be found in it."""

    make: Callable[[], hf.PreTrainedModel]
    inputs: dict[str, Tensor]
    found: list[Found]


def _sites(*names: str, act: str, kind: str = "plain", layers: int = 2, reason: str | None = None) -> list[Found]:
    return [(name.format(i), kind, act, reason) for name in names for i in range(layers)]


def _gated(act: str, reason: str | None = None, name: str = "layers.{}.mlp") -> list[Found]:
    return _sites(name, act=act, kind="gated", reason=reason)


_FALCON = _sites("h.{}.mlp", act="gelu")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        lambda: hf.GPT2Model(hf.GPT2Config(**_OLD)), _TEXT, _sites("h.{}.mlp", act="gelu_tanh")
    ),
    "gpt_neo": Family(
        lambda: hf.GPTNeoModel(
            hf.GPTNeoConfig(
                **_IDS, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
            )
        ),
        _TEXT, _sites("h.{}.mlp", act="gelu_tanh"),
    ),
    "gptj": Family(
        lambda: hf.GPTJModel(hf.GPTJConfig(**_OLD, rotary_dim=8)), _TEXT, _sites("h.{}.mlp", act="gelu_tanh")
    ),
    "codegen": Family(
        lambda: hf.CodeGenModel(hf.CodeGenConfig(**(_OLD | {"n_head": 4}), rotary_dim=8, n_ctx=64)),
        _TEXT, _sites("h.{}.mlp", act="gelu_tanh"),
    ),
    "gpt_bigcode": Family(
        lambda: hf.GPTBigCodeModel(hf.GPTBigCodeConfig(**_OLD)), _TEXT, _sites("h.{}.mlp", act="gelu_tanh")
    ),
    "opt": Family(
        lambda: hf.OPTModel(hf.OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=32)),
        _TEXT, _sites("decoder.layers.{}", act="relu"),
    ),
    "opt, post-norm, projected embeddings": Family(
        lambda: hf.OPTModel(hf.OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False)),
        _TEXT, _sites("decoder.layers.{}", act="relu"),
    ),
    "gpt_neox, parallel": Family(
        lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**_PLAIN)), _TEXT, _sites("layers.{}.mlp", act="gelu")
    ),
    "gpt_neox, sequential": Family(
        lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**_PLAIN, use_parallel_residual=False)),
        _TEXT, _sites("layers.{}.mlp", act="gelu"),
    ),
    "falcon, old, bias": Family(
        lambda: hf.FalconModel(
            hf.FalconConfig(**_SHAPE, alibi=True, bias=True, parallel_attn=False, multi_query=False)
        ),
        _TEXT, _FALCON,
    ),
    "falcon, old, no bias": Family(lambda: hf.FalconModel(hf.FalconConfig(**_SHAPE)), _TEXT, _FALCON),
    "falcon, new, bias": Family(
        lambda: hf.FalconModel(hf.FalconConfig(**_SHAPE, new_decoder_architecture=True, num_kv_heads=1, bias=True)),
        _TEXT, _FALCON,
    ),
    "falcon, new, no bias": Family(
        lambda: hf.FalconModel(hf.FalconConfig(**_SHAPE, new_decoder_architecture=True, num_kv_heads=1)),
        _TEXT, _FALCON,
    ),
    "bloom": Family(
        lambda: hf.BloomModel(hf.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=2)),
        _TEXT, _sites("h.{}.mlp", act="gelu_tanh"),
    ),
    "mpt": Family(
        lambda: hf.MptModel(hf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=2, max_seq_len=64)),
        _TEXT, _sites("blocks.{}.ffn", act="gelu"),
    ),
    "starcoder2": Family(
        lambda: hf.Starcoder2Model(hf.Starcoder2Config(**_GROUPED)), _TEXT, _sites("layers.{}.mlp", act="gelu_tanh")
    ),
    "phi": Family(lambda: hf.PhiModel(hf.PhiConfig(**_GROUPED)), _TEXT, _sites("layers.{}.mlp", act="gelu_tanh")),
    "persimmon": Family(
        lambda: hf.PersimmonModel(hf.PersimmonConfig(**_PLAIN)), _TEXT, _sites("layers.{}.mlp", act="relu2")
    ),
    "nemotron": Family(
        lambda: hf.NemotronModel(hf.NemotronConfig(**_GROUPED, head_dim=16)),
        _TEXT, _sites("layers.{}.mlp", act="relu2"),
    ),
    "xglm": Family(
        lambda: hf.XGLMModel(hf.XGLMConfig(**_IDS, d_model=32, ffn_dim=64, num_layers=2, attention_heads=2)),
        _TEXT, _sites("layers.{}", act="gelu"),
    ),
    "bert": Family(lambda: hf.BertModel(hf.BertConfig(**_PLAIN)), _TEXT, _sites("encoder.layer.{}", act="gelu")),
    "roberta": Family(
        lambda: hf.RobertaModel(hf.RobertaConfig(**_PLAIN)), _TEXT, _sites("encoder.layer.{}", act="gelu")
    ),
    "albert, one layer run twice": Family(
        lambda: hf.AlbertModel(hf.AlbertConfig(**_PLAIN, embedding_size=16)),
        _TEXT, 2 * _sites("encoder.albert_layer_groups.0.albert_layers.0", act="gelu_tanh", layers=1),
    ),
    "distilbert": Family(
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        ),
        _TEXT, _sites("transformer.layer.{}.ffn", act="gelu"),
    ),
    "electra": Family(
        lambda: hf.ElectraModel(hf.ElectraConfig(**_PLAIN, embedding_size=16)),
        _TEXT, _sites("encoder.layer.{}", act="gelu"),
    ),
    "deberta_v2": Family(
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(**_PLAIN, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        _TEXT, _sites("encoder.layer.{}", act="gelu"),
    ),
    "vit": Family(lambda: hf.ViTModel(hf.ViTConfig(**_IMAGE)), _PIXELS, _sites("layers.{}.mlp", act="gelu")),
    "deit": Family(lambda: hf.DeiTModel(hf.DeiTConfig(**_IMAGE)), _PIXELS, _sites("layers.{}.mlp", act="gelu")),
    "segformer, a convolution inside": Family(
        lambda: hf.SegformerModel(
            hf.SegformerConfig(
                num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[32], patch_sizes=[3], strides=[2],
                num_attention_heads=[2], mlp_ratios=[2],
            )
        ),
        _PIXELS, [("stages.0.blocks.0.mlp", "plain", None, "transpose stands between its projections")],
    ),
    "convnextv2, a norm inside": Family(
        lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1])),
        {"pixel_values": _PIXELS["pixel_values"].repeat(1, 1, 2, 2)},
        [
            (f"encoder.stages.{i}.layers.0", "plain", None, "linalg_vector_norm stands between its projections")
            for i in range(2)
        ],
    ),
    "squeezebert, of convolutions": Family(
        lambda: hf.SqueezeBertModel(
            hf.SqueezeBertConfig(
                **_PLAIN, embedding_size=32, **{f"{part}_groups": 1 for part in _GROUPED_PARTS}
            )
        ),
        _TEXT, _sites("encoder.layers.{}", act="gelu", reason="its projection is a convolution"),
    ),
    "mamba, no FFN": Family(
        lambda: hf.MambaModel(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)),
        _TEXT, [],
    ),
    "clip, both towers": Family(
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=_PLAIN, vision_config=_IMAGE, projection_dim=16)),
        _TEXT | _PIXELS, _sites("vision_model.encoder.layers.{}.mlp", "text_model.encoder.layers.{}.mlp", act="gelu_quick"),
    ),
    "siglip, both towers and the pooling head": Family(
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=_PLAIN, vision_config=_IMAGE)),
        _TEXT | _PIXELS,
        [
            *_sites("vision_model.encoder.layers.{}.mlp", act="gelu_tanh"),
            *_sites("vision_model.head.mlp", act="gelu_tanh", layers=1),
            *_sites("text_model.encoder.layers.{}.mlp", act="gelu_tanh"),
        ],
    ),
    "whisper": Family(
        lambda: hf.WhisperModel(
            hf.WhisperConfig(**_IDS, **_BOTH, num_mel_bins=4, max_source_positions=8, max_target_positions=16)
        ),
        _SOUND | {"decoder_input_ids": _PAIR["decoder_input_ids"]},
        _sites("encoder.layers.{}", "decoder.layers.{}", act="gelu", layers=1),
    ),
    "wav2vec2": Family(
        lambda: hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                conv_dim=(8, 8), conv_kernel=(4, 2), conv_stride=(4, 2), num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        _WAVE, _sites("encoder.layers.{}.feed_forward", act="gelu"),
    ),
    "t5 v1.0": Family(
        lambda: hf.T5Model(hf.T5Config(**_T5)),
        _PAIR, _sites("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense", act="relu", layers=1),
    ),
    "bart": Family(
        lambda: hf.BartModel(hf.BartConfig(**_IDS, **_BOTH, max_position_embeddings=64)),
        _PAIR, _sites("encoder.layers.{}", "decoder.layers.{}", act="gelu", layers=1),
    ),
    # Gated: found, and refused by the rewrite.
    "t5 v1.1": Family(
        lambda: hf.T5Model(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
        _PAIR,
        _sites(
            "encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense",
            act="gelu_tanh", kind="gated", layers=1,
        ),
    ),
    "llama": Family(lambda: hf.LlamaModel(hf.LlamaConfig(**_GROUPED)), _TEXT, _gated("silu")),
    "mistral": Family(lambda: hf.MistralModel(hf.MistralConfig(**_GROUPED)), _TEXT, _gated("silu")),
    "qwen2": Family(lambda: hf.Qwen2Model(hf.Qwen2Config(**_GROUPED)), _TEXT, _gated("silu")),
    "qwen3": Family(lambda: hf.Qwen3Model(hf.Qwen3Config(**_GROUPED, head_dim=32)), _TEXT, _gated("silu")),
    "gemma2": Family(lambda: hf.Gemma2Model(hf.Gemma2Config(**_GROUPED, head_dim=32)), _TEXT, _gated("gelu_tanh")),
    "gemma3": Family(
        lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**_GROUPED, head_dim=8)), _TEXT, _gated("gelu_tanh")
    ),
    "phi3, fused": Family(lambda: hf.Phi3Model(hf.Phi3Config(**_GROUPED)), _TEXT, _gated("silu")),
    # Mixtures of experts: stacked weights, and routed tokens.
    "mixtral": Family(
        lambda: hf.MixtralModel(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
        _TEXT, _gated("silu", STACKED, "layers.{}.mlp.experts"),
    ),
    "mixtral, its experts as batches": Family(
        lambda: hf.MixtralModel(
            hf.MixtralConfig(**_GROUPED, num_local_experts=4, experts_implementation="batched_mm")
        ),
        _TEXT, _gated("silu", STACKED, "layers.{}.mlp.experts"),
    ),
    "olmoe, narrow experts": Family(
        lambda: hf.OlmoeModel(hf.OlmoeConfig(**(_GROUPED | {"intermediate_size": 8}), num_experts=4, num_experts_per_tok=2)),
        _TEXT, _gated("silu", STACKED, "layers.{}.mlp.experts"),
    ),
    "qwen2_moe, with a shared expert": Family(
        lambda: hf.Qwen2MoeModel(
            hf.Qwen2MoeConfig(
                **_GROUPED, moe_intermediate_size=48, shared_expert_intermediate_size=48, num_experts=4
            )
        ),
        _TEXT,
        [
            found for i in range(2) for found in (
                (f"layers.{i}.mlp.shared_expert", "gated", "silu", None),
                (f"layers.{i}.mlp.experts", "gated", "silu", STACKED),
            )
        ],
    ),
    "gpt_oss, interleaved gates": Family(
        lambda: hf.GptOssModel(hf.GptOssConfig(**_GROUPED, head_dim=16, num_local_experts=4)),
        _TEXT, [(f"layers.{i}.mlp.experts", "plain", None, STACKED) for i in range(2)],
    ),
}  # fmt: skip


def made(family: Family) -> hf.PreTrainedModel:
    """The model, with weights so large that every FFN matters to the output."""
    torch.manual_seed(0)
    model = family.make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model
